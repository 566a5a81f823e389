# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Two machines with no disk in common train what one does, or say in one line on both why not; none waits for the other for ever."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.processes import COMMAND, wait_until

from .nodes import free_port, run_on_nodes
from .trainings import NUM_ROWS, Run, Trainings, difference


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


def train(trainings: Trainings, folder: Path, *changes: dict, trainer: str = "instance_dpo", **changed):
    """Trains on two machines, each of which has some flags of its own."""
    settings = {"per_device_train_batch_size": 2, "output_dir": "out", **changed}
    script = ["-m", f"trl_diffusion.scripts.{trainer}"]
    commands = [[*script, *trainings.arguments(trainer, "sd", **settings | change)] for change in changes or ({}, {})]
    return run_on_nodes(commands, folder)


def refusals(ended: list) -> list[str]:
    """The one line that each machine ends with."""
    assert [process.returncode for process in ended] == [2, 2], [process.stderr for process in ended]
    lines = [[line for line in process.stderr.splitlines() if ": error: " in line] for process in ended]
    assert all(
        len(said) == 1 and "Traceback" not in process.stderr for said, process in zip(lines, ended, strict=True)
    )
    return [said[0].split(": error: ")[1] for said in lines]


def encoded(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.glob("*.arrow"))


def test_machines_precompute_each_their_own_files(trainings, tmp_path):
    """Without a common disk each machine encodes all that its processes read; only the first one has the model, and says so."""
    ended = train(trainings, tmp_path, precompute=True, precompute_dir="cache")
    assert all(process.returncode == 0 for process in ended), ended[1].stderr
    assert difference(trainings.reference("instance_dpo", "sd"), Run(tmp_path / "node-0" / "out")) <= 1e-6
    for node, process in enumerate(ended):
        assert encoded(tmp_path / f"node-{node}" / "cache") == ["images", "prompts"]
        assert f"Precomputing images of train_dataset: {NUM_ROWS} of {NUM_ROWS} rows are missing" in process.stdout
    assert not list((tmp_path / "node-1").rglob("*.safetensors"))
    assert ["Model saved" in process.stdout for process in ended] == [True, False]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_checkpoint_that_one_machine_lacks_is_refused_on_both(trainings, tmp_path):
    """The first machine alone has saved: both say where the checkpoint is missing, and the way out."""
    ended = train(trainings, tmp_path, max_steps=2, save_steps=1)
    assert all(process.returncode == 0 for process in ended), ended[1].stderr
    missing = str(tmp_path / "node-1" / "out" / "checkpoint-1")
    for resume in ("out/checkpoint-1", "true"):
        lines = refusals(train(trainings, tmp_path, max_steps=3, resume_from_checkpoint=resume))
        assert lines[0] == lines[1] and missing in lines[0] and "--save_on_each_node" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["instance_dpo", "complex_po"])
def test_a_common_folder_is_written_together(trainings, tmp_path, trainer):
    """Machines that see the same folder split its files: of what one process would write, each file is written once."""
    cache = tmp_path / "cache"
    ended = train(trainings, tmp_path, trainer=trainer, precompute=True, precompute_dir=cache)
    assert all(process.returncode == 0 for process in ended), ended[1].stderr
    assert difference(trainings.reference(trainer, "sd"), Run(tmp_path / "node-0" / "out")) <= 1e-6
    assert ["Precomputing images" in process.stdout for process in ended] == [True, False]
    bars = [process.stderr.count("Precomputing images of train_dataset: 100%") > 0 for process in ended]
    assert sum(bars) <= 1 and encoded(cache).count("images") == 1


@pytest.mark.slow
def test_each_machine_resumes_what_it_has_saved(trainings, tmp_path):
    """With `save_on_each_node`, from its own checkpoint and the best one of its own, to the end of one undisturbed process."""
    flags = {"save_steps": 2, "save_on_each_node": True}
    train(trainings, tmp_path, **flags, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    for node in ("node-0", "node-1"):
        shutil.rmtree(tmp_path / node / "out" / "checkpoint-5")
    ended = train(trainings, tmp_path, resume_from_checkpoint="out/checkpoint-4", **flags)
    assert all(process.returncode == 0 for process in ended), ended[1].stderr
    for node in ("node-0", "node-1"):
        assert difference(trainings.reference("instance_dpo", "sd"), Run(tmp_path / node / "out")) <= 1e-6
    other = {"resume_from_checkpoint": "out/checkpoint-2"}
    lines = refusals(train(trainings, tmp_path, other, {"resume_from_checkpoint": "out/checkpoint-4"}, **flags))
    assert lines[0] == lines[1] and "`resume_from_checkpoint` is 'checkpoint-2' and 'checkpoint-4'" in lines[0]


@pytest.mark.slow
def test_checkpoints_with_other_weights_are_refused(trainings, tmp_path):
    """A checkpoint of the same step of another run, on one machine."""
    flags = {"max_steps": 1, "save_on_each_node": True}
    train(trainings, tmp_path / "a", **flags)
    train(trainings, tmp_path / "b", **flags, learning_rate=0.5)
    shutil.rmtree(tmp_path / "a" / "node-1" / "out")
    shutil.copytree(tmp_path / "b" / "node-1" / "out", tmp_path / "a" / "node-1" / "out")
    flags |= {"max_steps": 2, "resume_from_checkpoint": "out/checkpoint-1"}
    lines = refusals(train(trainings, tmp_path / "a", **flags))
    assert lines[0] == lines[1] and "the weights of the checkpoint differ" in lines[0]


@pytest.fixture(scope="module")
def others(trainings) -> Path:
    """A folder with models and rows that are other ones."""
    folder = trainings.folder / "others"
    tiny.sd_pipeline(seed=1).save_pretrained(folder / "model")
    pipeline = tiny.sd_pipeline()
    pipeline.text_encoder = tiny.sd_pipeline(seed=1).text_encoder
    pipeline.save_pretrained(folder / "text")
    shutil.copytree(trainings.dataset("instance_dpo"), folder / "pairs")
    tiny.pairs(NUM_ROWS - 1).to_parquet(folder / "pairs" / "train.parquet")
    (folder / "file").touch()
    return folder


# Flags of both machines, those of the second one, of which `others/` is a file there, and what both say
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
PRECOMPUTE = {"precompute": True, "precompute_dir": "cache"}
DIFFERENT = [
    ({}, {"seed": 7}, "`seed` is 42 and 7"),
    (
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 1},
        "`per_device_train_batch_size` is 2 and 1",
    ),
    ({}, {"logging_steps": 2}, "`logging_steps` is 1.0 and 2"),
    ({}, {"lora_r": 2}, "the settings of the LoRA differ"),
    (PRECOMPUTE, {"dataset_name": "others/pairs"}, "the rows of `train_dataset` differ"),
    ({}, {"model_name_or_path": "others/model"}, "the weights of `model` differ"),
    ({}, {"model_name_or_path": "others/text"}, "the weights of `text_encoder` differ"),
    ({}, {"model_name_or_path": "others/none"}, "There is no folder or file"),
    ({}, {"dataset_name": "others/none"}, "There is no file or folder"),
    (PRECOMPUTE, {"precompute_dir": "others/file"}, "File exists"),
    (BEST, {}, "only the first one would have the best checkpoint"),
    ({"save_on_each_node": True, "output_dir": "others/out"}, {}, "where each would write the same files"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "change", "said"), DIFFERENT, ids=[said for *_, said in DIFFERENT])
def test_what_is_not_alike_is_refused_on_both(trainings, others, tmp_path, flags, change, said):
    """Both machines end at once, with a line that names what differs or is missing."""

    def placed(values: dict) -> dict:
        return {name: others.parent / x if str(x).startswith("others/") else x for name, x in values.items()}

    lines = refusals(train(trainings, tmp_path, {}, placed(change), **placed(flags)))
    assert all(said in line for line in lines), lines


@pytest.mark.slow
def test_the_launcher_ends_on_both(trainings, tmp_path):
    """As `two_nodes` is used: what one machine lacks ends `accelerate launch` on both."""
    machines = ["--accelerate_config", "two_nodes", "--main_process_ip", "127.0.0.1", "--num_processes", 2]
    machines += ["--main_process_port", free_port(), *trainings.arguments("instance_dpo", "sd", output_dir="out")]
    command = ["-c", COMMAND, "instance-dpo", *machines]
    missing = ["--machine_rank", 1, "--dataset_name", tmp_path / "none"]
    lines = refusals(run_on_nodes([command, [*command, *missing]], tmp_path, is_launched=False))
    assert all("There is no file or folder" in line for line in lines) and lines[0].startswith("process 1, on another")


@pytest.mark.slow
def test_a_killed_machine_ends_the_other(trainings, tmp_path):
    """The other one says so in one line, and does not wait."""
    log, pids = tmp_path / "node-1" / "stdout", []

    def kill() -> None:
        wait_until(lambda: log.exists() and "'loss'" in log.read_text(), 120)
        pids.extend(pid_of("node-1", tmp_path))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    ended = train(trainings, tmp_path, max_steps=2000)
    killer.join()
    assert len(pids) == 1 and [process.returncode for process in ended] == [2, -signal.SIGKILL]
    assert "a process of another machine has ended" in ended[0].stderr and "Traceback" not in ended[0].stderr


def pid_of(node: str, folder: Path) -> list[int]:
    """The processes whose current directory is that of a machine."""
    return [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if os.access(path / "cwd", os.R_OK) and (path / "cwd").resolve() == folder / node
    ]


@pytest.mark.slow
def test_an_evaluation_needs_a_common_folder(trainings, tmp_path):
    """Images are dealt out and the first process scores them: refused on both machines, and done where they see one folder."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    script = ["-m", "trl_diffusion.scripts.evaluate_models", "--models", f"base={trainings.model('sd')}", "--use_cpu"]
    settings = ["--prompts", tmp_path / "prompts.txt", "--num_inference_steps", 2, "--metrics", "caption_match"]
    command = [*script, *settings, "--vlm", "oracle", "--detector", "oracle", "--output_dir"]
    lines = refusals(run_on_nodes([[*command, "out"]] * 2, tmp_path))
    assert all("do not see the same" in line and "Put `--output_dir` on a disk" in line for line in lines)
    ended = run_on_nodes([[*command, tmp_path / "evaluated"]] * 2, tmp_path)
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    assert len(list((tmp_path / "evaluated" / "images" / "base").glob("*.png"))) == 2
