# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Flags, YAML files and mistakes: what a user gets wrong is said in one line, with status 2."""

import re
import subprocess
import sys

import pytest
import yaml

import trl_diffusion
from tests import tiny
from tests.cli import processes
from tests.cli.test_cli import run
from trl_diffusion.cli.launch import launcher_arguments
from trl_diffusion.cli.main import COMMANDS, LAUNCHED_COMMANDS, main, script_of
from trl_diffusion.cli.script import is_mistake


def error_of(capsys, *flags) -> str:
    """The one line of a command that ends with status 2."""
    try:
        status = main([*map(str, flags)])
    except SystemExit as end:  # of argparse
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error
    return error


def parsed(text: str, tmp_path) -> tuple:
    """The dataclasses of instance-dpo with a YAML file."""
    (tmp_path / "config.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\n{text}")
    return script_of("instance-dpo").make_parser().parse_args_and_config(["--config", str(tmp_path / "config.yaml")])


def test_the_version_is_printed():
    """`trl-diffusion --version`, and as a module from a folder whose names are those of packages."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0


def test_it_runs_as_a_module_beside_files_named_like_packages(tmp_path):
    """`python -m trl_diffusion` reads no `datasets.py` or `evaluate.py` of the folder it is called in."""
    for name in ("datasets", "evaluate", "trl"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('the wrong file')")
    command = [sys.executable, "-m", "trl_diffusion"]
    for flags, text in ((["--version"], trl_diffusion.__version__), (["show-masks", "--help"], "--num_rows")):
        result = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0 and text in result.stdout, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_the_commands_own_flags_first(command, capsys):
    """80 columns at most, groups in their order, each flag once, transformers' last."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    order = [
        "flags of this command",
        "dataset",
        "dataset and run",
        "model",
        "LoRA",
        "vision-language model",
        "detector",
    ]
    order += ["diffusion training", "training loop (transformers)"]
    titles = [title for title in titles if title in order]
    assert titles == sorted(titles, key=order.index) and len(titles) == len(set(titles))
    assert (titles[-1:] == order[-1:]) == (command in LAUNCHED_COMMANDS and command != "evaluate")
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags)) and not re.search(r"^  --\w+-", text, re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "env"])
def test_unknown_flags_are_errors(command, capsys):
    """In every command, with the flag that was meant; an abbreviation is one too."""
    line = error_of(capsys, command, "--outptu_dir" if command != "show-criteria" else "--outptu", "x")
    assert f"is no flag of `trl-diffusion {command}`; did you mean `--output" in line
    assert "`--outp` is no flag" in error_of(capsys, command, "--outp", "x")


def test_unknown_commands_are_errors(capsys):
    """With the one that was meant."""
    assert "`instance_dpo` is no command; did you mean `instance-dpo`?" in error_of(capsys, "instance_dpo")
    assert "`xyz` is no command (" in error_of(capsys, "xyz")


def test_a_script_alone_refuses_unknown_flags():
    """`python -m trl_diffusion.scripts.instance_dpo` too, with status 2 and one line."""
    result = processes.run(["-m", "trl_diffusion.scripts.instance_dpo", "--bata", "5", "--output_dir", "x"])
    assert result.returncode == 2 and "did you mean `--beta`?" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("btea: 5", "`btea` in {} is no setting of `trl-diffusion instance-dpo`; did you mean `beta`?"),
        ("beta: much", "`beta` in {}: invalid float value: 'much'."),
        ("max_steps: 1.5", "`max_steps` in {}: invalid int value: '1.5'."),
        ("learning_rate: true", "`learning_rate` in {}: invalid float value: 'true'."),
        ("beta:", "`beta` in {} has no value"),
        ("mask_overlap: all", "`mask_overlap` in {}: invalid choice: 'all'"),
        ("output_dir: {a: 1}", "`output_dir` in {} is a mapping; it takes one value."),
        ("timestep_range: [a, b]", "`timestep_range` in {}: invalid int value: 'a'."),
        ("beta: 5\nw_neg: 0\nbeta: 6", "`--config` {} is no valid YAML: line 3, column 1: the key `beta` stands there twice."),
        ("beta: [5", "`--config` {} is no valid YAML: line "),
        ("- beta", "`--config` {} must hold lines of the form `flag: value`."),
        ("env: 5", "`env` in {} must hold names and values"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(tmp_path, capsys, text, message):
    """A key, a value or a form that is wrong is an error that names it and the file."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert message.format(path) in error_of(capsys, "instance-dpo", "--config", path)


def test_files_that_cannot_be_read(tmp_path, capsys):
    """A missing file, a folder, no text, no name, and two."""
    assert "missing.yaml cannot be read: No such file" in error_of(
        capsys, "env", "--config", tmp_path / "missing.yaml"
    )
    assert "cannot be read: Is a directory" in error_of(capsys, "env", f"--config={tmp_path}")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is no text file in UTF-8" in error_of(capsys, "env", "--config", tmp_path / "image.yaml")
    assert "`--config` is given without a file" in error_of(capsys, "env", "--config")
    assert "`--config` is given twice" in error_of(capsys, "env", "--config", "a", "--config", "b")


def test_values_of_a_file_are_those_of_the_flags(tmp_path):
    """What YAML reads as a string, a boolean, nothing, a number or a mapping becomes what the flag would give."""
    text = "learning_rate: 1e-4\neval_strategy: no\nresume_from_checkpoint: true\nresolution: null\n"
    text += "sample_prompts: [a cat, 7]\nmodel_init_kwargs: {variant: fp16}\nuse_peft: yes\ntimestep_range: [0, 500]\n"
    _, training_args, model_args = parsed(text, tmp_path)
    assert training_args.learning_rate == 0.0001 and training_args.eval_strategy == "no"
    assert training_args.resume_from_checkpoint is True and training_args.resolution is None
    assert training_args.sample_prompts == ["a cat", "7"] and training_args.timestep_range == [0, 500]
    assert training_args.model_init_kwargs == {"variant": "fp16"} and model_args.use_peft is True


@pytest.mark.parametrize(
    "word, value", [("true", True), ("True", True), ("false", None), ("no", None), ("x/y", "x/y")]
)
def test_where_to_resume_is_read_in_words(tmp_path, word, value):
    """`true` is the last checkpoint, `false` none, and anything else a folder, for commands and scripts alike."""
    _, training_args, _ = parsed(f'resume_from_checkpoint: "{word}"', tmp_path)
    assert training_args.resume_from_checkpoint == value


def test_the_launchers_flags_are_still_taken(tmp_path):
    """From the command line and the file, on or off; without a value only where they take none."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"num_processes": 2, "multi_gpu": True, "tpu": False, "beta": 5, "use_cpu": True}))
    flags = ["--config", str(path), "--num_machines", "1", "--output_dir", str(tmp_path)]
    *_, from_config, from_flags = (
        script_of("instance-dpo")
        .make_parser()
        .parse_args_and_config(flags, return_remaining_strings=True, separate_remaining_strings=True)
    )
    assert from_config in (["--num_processes", "2", "--multi_gpu"], ["--multi_gpu", "--num_processes", "2"])
    assert from_flags == ["--num_machines", "1"]


def test_several_processes_are_several_or_an_error(tmp_path):
    """On a machine without a GPU as well, whether flags or a configuration ask for them; with `--cpu` the launcher has one."""
    assert launcher_arguments(["--num_processes", "2"], "x.py", []).multi_gpu
    assert not launcher_arguments(["--num_processes", "1"], "x.py", []).multi_gpu
    assert launcher_arguments(["--accelerate_config", "single_gpu", "--num_processes", "2"], "x.py", []).multi_gpu
    assert not launcher_arguments(["--accelerate_config", "single_gpu"], "x.py", []).multi_gpu
    with pytest.raises(ValueError, match="starts one process, not the 2"):
        launcher_arguments(["--num_processes", "2", "--cpu"], "x.py", [])
    with pytest.raises(ValueError, match="`stray` stands behind no flag"):
        launcher_arguments(["--num_processes", "2", "stray"], "x.py", [])


def test_several_processes_share_a_training(tmp_path):
    """With `--num_processes 2` on a CPU, a step has the rows of both processes, and one of them writes."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    tiny.pairs(8).to_parquet(tmp_path / "pairs.parquet")
    flags = [
        "--model_name_or_path",
        tmp_path / "model",
        "--dataset_name",
        tmp_path / "pairs.parquet",
        "--max_steps",
        2,
    ]
    flags += ["--per_device_train_batch_size", 2, "--num_processes", 2, "--report_to", "none", "--logging_steps", 1]
    result = run("instance-dpo", *flags, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "| pairs per optimizer step | 4 |" in (tmp_path / "out" / "README.md").read_text()
    assert result.stdout.count("'loss'") == 2 and "parallel_mode" not in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--model_name_or_path", "a b/c?"], "a b/c?"),
        (["--num_processes", "1", "--fp16", "true", "--bf16", "true"], "fp16 and bf16"),
    ],
)
def test_mistakes_come_through_the_launcher(tmp_path, flags, message):
    """The script's line alone, and its status: no traceback of the script's or of the launcher's."""
    tiny.pairs(2).to_parquet(tmp_path / "train.parquet")
    base = ["--output_dir", tmp_path / "out", "--dataset_name", tmp_path, "--use_cpu", "--report_to", "none"]
    result = run("instance-dpo", *base, *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_what_is_a_mistake():
    """Bad input, a full disk, a missing package: the message says all. A failure of the code keeps its traceback."""
    assert all(is_mistake(kind("x")) for kind in (ValueError, FileNotFoundError, ConnectionError, ImportError))
    assert is_mistake(OSError(28, "No space left on device"))
    assert is_mistake(RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`."))
    assert not any(is_mistake(kind("x")) for kind in (RuntimeError, TypeError, KeyError, AssertionError))


def test_a_closed_pipe_is_silent():
    """`trl-diffusion show-criteria | head -1` ends without a word."""
    code = "import sys; from trl_diffusion.cli import main; sys.exit(main())"
    command = f"{sys.executable} -c '{code}' show-criteria | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stdout.count("\n") == 1 and not result.stderr
