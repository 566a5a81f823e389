# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The configurations of `accelerate launch` that come with the package: each loads, launches, and is found by its name."""

import importlib.resources
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config import config_args
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command

from tests import tiny
from tests.cli import processes
from trl_diffusion import InstanceDPOConfig
from trl_diffusion.cli.accelerate_config import FOLDER, NAMES, find_config, resolve_accelerate_config
from trl_diffusion.cli.launch import launcher_arguments
from trl_diffusion.cli.main import LAUNCHED_COMMANDS, main, script_of


FILES = sorted(FOLDER.iterdir())
# What each must say: kind, processes, machines, whether on the CPU
EXPECTED = {
    "fsdp2": ("FSDP", 8, 1, False),
    "multi_cpu": ("MULTI_CPU", 2, 1, True),
    "multi_gpu": ("MULTI_GPU", 8, 1, False),
    "single_gpu": ("NO", 1, 1, False),
    "two_nodes": ("MULTI_GPU", 16, 2, False),
    "zero2": ("DEEPSPEED", 8, 1, False),
    "zero3": ("DEEPSPEED", 8, 1, False),
}
ADDRESS = ["--main_process_ip", "127.0.0.1"]
THEIRS = {path.stem: path for path in importlib.resources.files("trl.accelerate_configs").iterdir()}
SHARDED = sorted(THEIRS.keys() - {*NAMES})


@pytest.fixture(autouse=True)
def no_default_config(tmp_path, monkeypatch):
    """Nobody has run `accelerate config` here."""
    for name in ("default_config_file", "default_json_config_file", "default_yaml_config_file"):
        monkeypatch.setattr(config_args, name, str(tmp_path / "default_config.yaml"))


@pytest.fixture(autouse=True)
def deepspeed_is_installed(monkeypatch):
    """Or so the launcher believes, which only asks."""
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_available", lambda: True)


def launched(*flags: str):
    """The launcher's arguments once it has read its configuration too."""
    return _validate_launch_command(launcher_arguments([*flags], "x.py", ["--beta", "5"]))[0]


def test_the_folder_holds_these_and_no_others():
    """A new file cannot be forgotten here, and the library supports no kind beside these."""
    assert [path.name for path in FILES] == [f"{name}.yaml" for name in EXPECTED] and NAMES == tuple(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_loads_and_launches(path):
    """Accelerate's own loader takes the file, all keys of which are its settings, and the launcher's arguments are what it says."""
    kind, num_processes, num_machines, on_cpu = EXPECTED[path.stem]
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and yaml.safe_load(path.read_text()).keys() <= vars(config).keys()
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == EXPECTED[path.stem][:3]
    assert not (config.megatron_lm_config or config.dynamo_config)
    assert bool(config.fsdp_config) == (kind == "FSDP") and bool(config.deepspeed_config) == (kind == "DEEPSPEED")
    args = launched("--accelerate_config", path.stem, *(ADDRESS if num_machines > 1 else []))
    assert (args.num_processes, args.num_machines, args.machine_rank) == (num_processes, num_machines, 0)
    sharded = args.use_fsdp, args.use_deepspeed
    assert sharded == (kind == "FSDP", kind == "DEEPSPEED") and args.multi_gpu == (kind != "NO" and not any(sharded))
    assert args.mixed_precision == "no" and args.dynamo_backend == "no"
    expected = (["--use_cpu", "true"] if on_cpu else []) + ["--beta", "5"]
    assert args.training_script_args == expected
    script_args = script_of("instance-dpo").make_parser().parse_args_and_config([*expected, "--output_dir", "x"])
    assert script_args[1].use_cpu == on_cpu


def test_the_command_line_wins():
    """Over the configuration's number of processes, and over the configuration that a YAML file names."""
    assert launched("--accelerate_config", "multi_gpu", "--num_processes", "4").num_processes == 4
    args = launched("--accelerate_config", "multi_gpu", "--accelerate_config", "multi_cpu")
    assert args.config_file == str(FOLDER / "multi_cpu.yaml") and args.use_cpu
    second = launched("--accelerate_config", "two_nodes", *ADDRESS, "--machine_rank", "1", "--num_processes", "4")
    assert (second.machine_rank, second.num_processes, second.main_process_port) == (1, 4, 29500)


def test_how_a_configuration_is_named(tmp_path, monkeypatch):
    """With a dash, with `=`, as a file; a folder or file of the same name does not hide ours, and other flags keep their order."""
    ours = ["--config_file", str(FOLDER / "multi_cpu.yaml"), "--num_processes", "3", "--main_process_ip", "x"]
    for spelling in (["--accelerate_config", "multi_cpu"], ["--accelerate-config=multi_cpu"]):
        assert resolve_accelerate_config(["--num_processes", "3", *spelling, "--main_process_ip", "x"]) == ours
    assert resolve_accelerate_config(["--num_processes", "3"]) == ["--num_processes", "3"]
    monkeypatch.chdir(tmp_path)
    Path("multi_gpu").touch()
    Path("mine.yaml").write_text(
        (FOLDER / "multi_cpu.yaml").read_text().replace("num_processes: 2", "num_processes: 3")
    )
    assert find_config("multi_gpu") == str(FOLDER / "multi_gpu.yaml")
    assert launched("--accelerate_config", "mine.yaml").num_processes == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--accelerate_config"], "is given without a value: name a file, or one of fsdp2, multi_cpu, multi_gpu, single_gpu, two_nodes, zero2, zero3"),
        (["--accelerate_config", "multi-gpus"], "nor one of fsdp2, multi_cpu, multi_gpu, single_gpu, two_nodes, zero2, zero3"),
        (["--accelerate_config", "multi-gpus"], "did you mean `multi_gpu`?"),
        (["--accelerate_config", "two_nodes"], "`--main_process_ip` is missing: with 2 machines"),
        (["--num_machines", "3"], "`--main_process_ip` is missing: with 3 machines"),
        (["--use_fsdp"], "FSDP version 1 is not supported"),
        (["--use_fsdp", "--fsdp_version", "2", "--cpu"], "FSDP is asked for on the CPU"),
        (["--use_deepspeed", "--zero_stage", "1"], "DeepSpeed's ZeRO-1 is not supported"),
        (["--use_megatron_lm"], "Sharded training (MEGATRON_LM) is not supported"),
    ],
)  # fmt: skip
def test_mistakes(flags, message):
    """What is wrong, which names there are, and the way out."""
    with pytest.raises(ValueError) as error:
        launcher_arguments(flags, "x.py", [])
    assert message in str(error.value)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_configurations_are_refused_before_a_launch(name, tmp_path, monkeypatch, capsys):
    """TRL's names for FSDP and DeepSpeed, such files of one's own, and one that `accelerate config` wrote, for every command."""
    monkeypatch.setattr("trl_diffusion.cli.launch.launch_command", lambda args: pytest.fail("launched"))
    flags = {"evaluate": ["--models", "x"]}
    for command in LAUNCHED_COMMANDS:
        own = flags.get(command, ["--output_dir", str(tmp_path / "out")])
        assert main([command, *own, "--accelerate_config", name]) == 2
        error = capsys.readouterr().err
        assert "is not supported: what is saved would not be what diffusers loads" in error, error
    (tmp_path / "own.yaml").write_bytes(THEIRS[name].read_bytes())
    for flag in ("--accelerate_config", "--config_file"):
        with pytest.raises(ValueError, match="is not supported: what is saved would not be"):
            launcher_arguments([flag, str(tmp_path / "own.yaml")], "x.py", [])
    (tmp_path / "default_config.yaml").write_bytes(THEIRS[name].read_bytes())
    with pytest.raises(ValueError, match="is not supported: what is saved would not be"):
        launcher_arguments([], "x.py", [])


def test_an_evaluation_is_not_sharded(capsys):
    """Each process would have a whole model, which is said before a launch."""
    for name in ("fsdp2", "zero3"):
        assert main(["evaluate", "--models", "x", "--accelerate_config", name]) == 2
        assert "an evaluation shards nothing" in capsys.readouterr().err


def test_deepspeed_that_is_not_installed(monkeypatch, capsys):
    """Is said before a launch, with the command that installs it."""
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_available", lambda: False)
    assert main(["instance-dpo", "--output_dir", "x", "--accelerate_config", "zero2"]) == 2
    assert "pip install 'trl-diffusion[deepspeed]'" in capsys.readouterr().err


def test_trl_has_sharded_configurations():
    """The test above does not pass for want of names."""
    assert {"fsdp1", "zero1"} <= set(SHARDED)


@pytest.mark.parametrize(
    "text", ["", "beta: 5", "[1, 2]", "a: b: c", "distributed_type: SIDEWAYS", "distributed_type: 'NO'\nbeta: 5"]
)
def test_files_that_are_no_configuration(tmp_path, text):
    """Such as a recipe: the message names the file."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match="mine.yaml is no configuration of `accelerate launch`: "):
        launcher_arguments(["--accelerate_config", str(tmp_path / "mine.yaml")], "x.py", [])


def test_a_default_for_several_processes_on_the_cpu_is_kept(tmp_path):
    """What `accelerate config` wrote asks for two processes: the launcher alone would start one and say nothing."""
    (tmp_path / "default_config.yaml").write_bytes((FOLDER / "multi_cpu.yaml").read_bytes())
    args = launcher_arguments([], "x.py", [])
    assert args.multi_gpu and args.training_script_args == ["--use_cpu", "true"]


def test_the_help_names_them(capsys):
    """`--help` of a launched command lists the names."""
    for command in LAUNCHED_COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"one of {', '.join(NAMES)}." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "launched, flags, gpu_has_bf16, expected",
    [
        ("no", {}, True, torch.bfloat16),
        ("no", {}, False, None),
        ("no", {"fp16": True}, True, torch.float16),
        ("fp16", {}, True, torch.float16),
        ("fp16", {"bf16": True}, True, torch.bfloat16),
        ("bf16", {}, True, torch.bfloat16),
        ("bf16", {"bf16": False}, True, None),
        ("bf16", {"fp16": True}, True, torch.float16),
    ],
)
def test_flags_come_before_the_launchers_precision(tmp_path, monkeypatch, launched, flags, gpu_has_bf16, expected):
    """A configuration with `mixed_precision` decides where no flag does, and what it decides is what the run says of itself."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    for module in ("trl_diffusion.trainer.diffusion_config", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: gpu_has_bf16)
    args = InstanceDPOConfig(str(tmp_path), **flags)
    assert args.half_dtype is expected
    assert args.mixed_precision == {torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}[expected]


def test_a_process_trains_on_one_gpu(tmp_path, monkeypatch):
    """Where several are visible and nothing is launched, as with `uv run`: a batch is not cut over them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = InstanceDPOConfig(str(tmp_path), per_device_train_batch_size=3)
    assert args.n_gpu <= 1 and args.train_batch_size == 3


def run_tiny(folder: Path, *flags) -> list:
    """The flags of a training of two steps."""
    tiny.sd_pipeline().save_pretrained(folder / "model")
    tiny.pairs(8).to_parquet(folder / "pairs.parquet")
    own = ["--model_name_or_path", folder / "model", "--dataset_name", folder / "pairs.parquet", "--use_peft"]
    own += [
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        2,
        "--report_to",
        "none",
        "--output_dir",
        folder / "out",
    ]
    return ["-c", processes.COMMAND, "instance-dpo", *own, *flags]


def pairs_per_step(folder: Path) -> int:
    card = (folder / "out" / "README.md").read_text()
    return int(card.split("| pairs per optimizer step | ")[1].split(" ")[0])


@pytest.mark.slow
def test_two_processes_on_the_cpu(tmp_path):
    """`multi_cpu` for real, its name in the recipe: a step has the rows of both processes, and one of them writes."""
    (tmp_path / "recipe.yaml").write_text("accelerate_config: multi_cpu\n")
    result = processes.run(run_tiny(tmp_path, "--config", tmp_path / "recipe.yaml"))
    assert result.returncode == 0, result.stderr
    assert pairs_per_step(tmp_path) == 4 and result.stdout.count("Training completed.") == 1
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.slow
def test_two_machines(tmp_path):
    """`two_nodes` for real, with this machine as both: one process each, one training."""
    with processes.socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = ["--accelerate_config", "two_nodes", *ADDRESS, "--main_process_port", port, "--num_processes", 2]
    commands = [[*run_tiny(tmp_path, *flags), "--machine_rank", rank] for rank in (0, 1)]
    results = processes.run_together(commands, [{}, {}], env=dict(os.environ))
    assert all(result.returncode == 0 for result in results), results[0].stderr + results[1].stderr
    assert pairs_per_step(tmp_path) == 4
    assert all(result.stdout.count("Training completed.") == 1 for result in results)
