# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Which checkpoint a training goes on from, which ones stay, and what is said where a folder cannot be used."""

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.files import lock_folder, sha256_of
from trl_diffusion.trainer import checkpoint_folders
from trl_diffusion.trainer.checkpoint_folders import (
    LIST_NAME,
    SAVING,
    checkpoints_in,
    clear_left_overs,
    rotate,
    spoiled_components,
    what_is_wrong,
)


WEIGHTS = "pytorch_lora_weights.safetensors"


def make_trainer(folder: Path, is_lora: bool = True, **kwargs) -> InstanceDPOTrainer:
    settings = {
        **tiny.FAST,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        **kwargs,
    }
    args = InstanceDPOConfig(str(folder), **settings)
    datasets = {"train_dataset": tiny.pairs(), "eval_dataset": tiny.pairs(2) if "eval_strategy" in kwargs else None}
    return InstanceDPOTrainer(
        tiny.sd_pipeline(), args=args, peft_config=tiny.lora(2, 2) if is_lora else None, **datasets
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a LoRA and of a whole model, each of three steps with a checkpoint at each."""
    folders = {is_lora: tmp_path_factory.mktemp("trained") / "out" for is_lora in (True, False)}
    for is_lora, folder in folders.items():
        make_trainer(folder, is_lora).train()
    return folders


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained[True], tmp_path / "out"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run_record.json"]
DAMAGES = [(how, name) for how in (cut, flip, empty, remove) for name in (*STATE, WEIGHTS)]


@pytest.mark.parametrize("how, name", [*DAMAGES, (pickled, "optimizer.pt"), (cut, LIST_NAME), (empty, LIST_NAME)])
def test_a_damaged_checkpoint_is_seen(folder, how, name):
    """Any file of a checkpoint that is missing, cut off or changed in a bit is named."""
    assert what_is_wrong(folder / "checkpoint-3") is None
    how(folder / "checkpoint-3" / name)
    assert name in what_is_wrong(folder / "checkpoint-3")


# A bit in JSON, or in the values of a weight, cannot be seen without a list; a record was not there in older versions
UNSEEN = [(flip, "trainer_state.json"), (flip, "run_record.json"), (flip, WEIGHTS), (remove, "run_record.json")]


@pytest.mark.parametrize("how, name", [case for case in DAMAGES if case not in UNSEEN] + [(pickled, "optimizer.pt")])
def test_a_damaged_checkpoint_of_an_older_version_is_seen(folder, how, name):
    """Without a list of its files a checkpoint is looked at as far as they tell: archives of PyTorch have checksums of their own."""
    (folder / "checkpoint-3" / LIST_NAME).unlink()
    assert what_is_wrong(folder / "checkpoint-3") is None
    how(folder / "checkpoint-3" / name)
    wrong = what_is_wrong(folder / "checkpoint-3")
    assert wrong and (name in wrong or (how, name) == (remove, WEIGHTS) and "no weights" in wrong)


def test_a_missing_process_is_seen(folder):
    """Of the random states of several processes, each has to be there."""
    checkpoint = folder / "checkpoint-3"
    (checkpoint / LIST_NAME).unlink()
    os.rename(checkpoint / "rng_state.pth", checkpoint / "rng_state_1.pth")
    assert what_is_wrong(checkpoint) == "rng_state_0.pth is missing"


def test_a_pickle_is_not_loaded(folder):
    """A file that runs code when it is unpickled is refused, and its code does not run."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(folder / "attacked"),)

    (folder / "checkpoint-3" / LIST_NAME).unlink()
    torch.save({"state": Attack()}, folder / "checkpoint-3" / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer.pt holds something else than tensors.* is not loaded"):
        make_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert not (folder / "attacked").exists()


@pytest.mark.parametrize("how, name", [(remove, "trainer_state.json"), (cut, "optimizer.pt"), (flip, WEIGHTS)])
def test_the_newest_whole_one_is_taken(folder, trained, caplog, how, name):
    """What is passed over is said with its reason, and the run ends on the weights of the undisturbed one."""
    how(folder / "checkpoint-3" / name)
    how(folder / "checkpoint-2" / name)
    trainer = make_trainer(folder)
    with caplog.at_level(logging.WARNING, "trl_diffusion"):
        trainer.train(resume_from_checkpoint=True)
    (said,) = [record.message for record in caplog.records if "goes on from" in record.message]
    assert f"{folder / 'checkpoint-1'}." in said
    assert all(f"checkpoint-{step}: {name}" in said for step in (2, 3))
    assert [what_is_wrong(path) for path in checkpoints_in(folder)] == [None] * 3  # saved again
    assert tiny.max_difference(*(load_file(each / "checkpoint-3" / WEIGHTS) for each in (folder, trained[True]))) == 0


def test_a_named_checkpoint_must_be_whole(folder):
    """One line names the file, and the newest whole one beside it."""
    cut(folder / "checkpoint-3" / "optimizer.pt")
    trainer = make_trainer(folder, max_steps=4)
    with pytest.raises(
        ValueError, match=r"checkpoint-3: optimizer.pt has \d+ bytes in place of \d+. Name .*checkpoint-2"
    ):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    with pytest.raises(ValueError, match="checkpoint-9: there is no such folder. Name .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-9"))


def test_without_a_checkpoint_the_training_starts(tmp_path, caplog):
    """The same command works from the first second on, and says that it begins."""
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    assert "There is no whole checkpoint in" in caplog.text and "starts from the beginning" in caplog.text


def test_a_model_alone_cannot_be_resumed(tmp_path, caplog):
    """Checkpoints of `save_only_model` are passed over, and say why when they are named."""
    make_trainer(tmp_path, save_only_model=True, max_steps=1).train()
    with pytest.raises(
        ValueError, match="the model alone, and no optimizer.pt, as `save_only_model` saves it. Name another"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert "Passed over: checkpoint-1: it holds the model alone" in caplog.text


def test_frozen_components_do_not_hinder(trained, tmp_path, caplog):
    """A flipped bit in a VAE, which all checkpoints share, is said, and the training goes on: it does not read it."""
    folder = Path(shutil.copytree(trained[False], tmp_path / "out"))
    flip(folder / "checkpoint-2" / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(folder / "checkpoint-3")
    assert what_is_wrong(folder / "checkpoint-2") is None
    assert "vae/diffusion_pytorch_model.safetensors is damaged" in spoiled_components(folder / "checkpoint-2")[0]
    make_trainer(folder, is_lora=False).train(resume_from_checkpoint=True)
    assert "does not load as a pipeline: vae/diffusion_pytorch_model.safetensors is damaged" in caplog.text
    assert spoiled_components(folder / "checkpoint-3") == []
    flip(folder / "checkpoint-3" / "unet" / "diffusion_pytorch_model.safetensors")
    assert "unet/diffusion_pytorch_model.safetensors is damaged" in what_is_wrong(folder / "checkpoint-3")


def test_a_shared_file_is_read_once(trained, monkeypatch, tmp_path):
    """The list of a checkpoint takes the checksums of files that it shares from the one before; it is the list of all of them anew."""
    folder = trained[False]
    hashed = []
    monkeypatch.setattr(checkpoint_folders, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    second, expected = folder / "checkpoint-2", json.loads((folder / "checkpoint-2" / LIST_NAME).read_text())
    kept = tmp_path / LIST_NAME
    shutil.copyfile(second / LIST_NAME, kept)
    (second / LIST_NAME).unlink()
    try:
        checkpoint_folders.write_list(second, "unet", folder / "checkpoint-1")
        assert json.loads((second / LIST_NAME).read_text()) == expected
        shared = {second / name for name in expected["frozen"] if name.endswith(".safetensors")}
        assert len(shared) == 2 and not shared & set(hashed)
        assert {second / name for name in expected["needed"]} <= set(hashed)
        hashed.clear()
        (second / LIST_NAME).unlink()
        checkpoint_folders.write_list(second, "unet")
        assert json.loads((second / LIST_NAME).read_text()) == expected and shared <= set(hashed)
    finally:
        shutil.copyfile(kept, second / LIST_NAME)


# ----- which ones stay -----


def test_later_checkpoints_of_an_earlier_run_stay(folder, caplog):
    """A run that goes on from an older checkpoint keeps the one that it saved last, and leaves later ones until it comes there."""
    trainer = make_trainer(folder, save_total_limit=1, max_steps=2)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert "holds checkpoint-2, checkpoint-3 of an earlier run" in caplog.text


@pytest.mark.parametrize(
    "step, limit, best, kept, left",
    [
        (4, None, None, [], [1, 2, 3, 4, 5]),
        (4, 0, None, [], [1, 2, 3, 4, 5]),
        (4, 2, None, [], [3, 4, 5]),
        (4, 1, None, [], [4, 5]),
        (4, 1, 2, [], [2, 4, 5]),
        (4, 2, 2, [], [2, 4, 5]),
        (4, 3, 1, [], [1, 3, 4, 5]),
        (4, 1, 4, [], [4, 5]),
        (5, 2, None, [3], [3, 4, 5]),
        (5, 9, None, [], [1, 2, 3, 4, 5]),
    ],
)
def test_which_checkpoints_stay(tmp_path, step, limit, best, kept, left):
    """The last, the best, later ones, those passed over, and of the others the last ones; other folders are no checkpoints."""
    others = ["checkpoint-best", "checkpoint-2-mine", "my-checkpoint-1"]
    for name in (*(f"checkpoint-{number}" for number in range(1, 6)), *others):
        (tmp_path / name).mkdir()
    rotate(tmp_path, step, limit, best, [tmp_path / f"checkpoint-{number}" for number in kept])
    assert {path.name for path in tmp_path.iterdir()} == {*(f"checkpoint-{number}" for number in left), *others}


def test_the_best_checkpoint_survives_a_resumed_run(tmp_path):
    """With `load_best_model_at_end` a run that is resumed knows the best step, keeps its checkpoint and ends on its weights."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 4}

    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **settings)
    stopped.add_callback(Stop(2))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = make_trainer(tmp_path / "stopped", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_global_step == whole.state.best_global_step
    assert get_last_checkpoint(tmp_path / "stopped").endswith(f"checkpoint-{whole.state.best_global_step}")
    assert tiny.max_difference(*(tiny.weights(each.policy) for each in (whole, again))) == 0


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_is_done_ends_as_it_would_have(folder):
    """Killed after its last checkpoint was saved, before older ones were deleted: they are, and nothing is trained."""
    trainer = make_trainer(folder, save_total_limit=1, resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-3"]


# ----- what killed runs leave -----


def test_left_overs_are_cleared(tmp_path):
    """What was replaced comes back where nothing is in its place; half-written files of this library go, and no file of the user's."""
    theirs = ["notes.tmp", "images/mine.png.tmp", "README.md", ".saving.txt", "samples/mine.tmp", "checkpoint-1/x.tmp"]
    ours = ["README.md.tmp", "training.json.tmp", "images/sample-0-base.png.tmp", "samples/step-000002.png.tmp"]
    ours += [f"{SAVING}/checkpoint-3/optimizer.pt", f"{SAVING}/replaced/checkpoint-1/old"]
    for name in (*theirs, *ours, f"{SAVING}/replaced/checkpoint-2/trainer_state.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    clear_left_overs(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*theirs, "checkpoint-2/trainer_state.json"}


# ----- a folder that cannot be used -----

HOLD = """
import sys, time
from pathlib import Path
from trl_diffusion.files import lock_folder, sha256_of
from trl_diffusion.trainer import checkpoint_folders
lock = lock_folder(Path(sys.argv[1]), "in use")
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_in_use(tmp_path):
    """Another run's folder is refused before a model is loaded; a killed run's is free at once, and one process may use it again."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="Another run is using the output directory"):
            InstanceDPOTrainer("/no/model", args=InstanceDPOConfig(str(tmp_path)), train_dataset=tiny.pairs())
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    first, second = (make_trainer(tmp_path, max_steps=1) for _ in range(2))
    first.train()
    second.train()
    second.save_model()
    lock_folder(tmp_path, "in use").release()


def test_a_folder_that_is_none(tmp_path):
    """Where a file has the name, one line says so before a model is loaded."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(
        ValueError, match="The output directory .*out cannot be written: File exists. Make its folder writable"
    ):
        InstanceDPOTrainer("/no/model", args=InstanceDPOConfig(str(tmp_path / "out")), train_dataset=tiny.pairs())
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture
def mounted(tmp_path):
    """A file system of its own, of 3 MB, where the tests may mount one."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_folder(mounted):
    """One line before a model is loaded."""
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    with pytest.raises(
        ValueError, match="cannot be written: Read-only file system. Make its folder writable, or name another"
    ):
        InstanceDPOTrainer("/no/model", args=InstanceDPOConfig(str(mounted / "out")), train_dataset=tiny.pairs())


@pytest.mark.slow
def test_a_full_disk(mounted, trained, monkeypatch):
    """
    Whatever amount of space is left, one line says what is not there; the checkpoints before it are whole, nothing half done is left,
    and with more space the same command goes on, and ends as if nothing had been.
    """
    folder, ballast, missing = mounted / "out", mounted / "ballast", set()
    shutil.copytree(trained[True], folder, ignore=shutil.ignore_patterns("checkpoint-[23]"))
    for left in (8, 20, 40, 70, 3000):
        if left == 20:  # less than the card takes, which is written first
            monkeypatch.setattr(InstanceDPOTrainer, "create_model_card", lambda trainer: None)
        ballast.write_bytes(b"")
        free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_bsize
        ballast.write_bytes(bytes(max(0, free - left * 1024)))
        try:
            make_trainer(folder).train(resume_from_checkpoint=True)
        except ValueError as error:
            assert "Free some disk space" in str(error) and "\n" not in str(error)
            missing.add(str(error).split(" cannot be ")[0].split("/")[-1])
        assert [what_is_wrong(path) for path in checkpoints_in(folder)] == [None] * len(checkpoints_in(folder))
        assert checkpoints_in(folder) and not (folder / SAVING).exists() and not list(folder.rglob("*.tmp"))
    assert missing & {"checkpoint-2", "checkpoint-3"} and missing - {"checkpoint-2", "checkpoint-3"}
    assert tiny.max_difference(*(load_file(each / "checkpoint-3" / WEIGHTS) for each in (folder, trained[True]))) == 0


def test_the_list_is_of_what_is_there(trained):
    """Every file but the list itself is in it; frozen components apart from what is trained."""
    for is_lora, folder in trained.items():
        listed = json.loads((folder / "checkpoint-3" / LIST_NAME).read_text())
        there = {
            path.relative_to(folder / "checkpoint-3").as_posix() for path in (folder / "checkpoint-3").rglob("*.*")
        }
        files = {name for name in there if (folder / "checkpoint-3" / name).is_file()} - {LIST_NAME}
        assert listed["needed"].keys() | listed["frozen"].keys() == files
        frozen = {name.split("/")[0] for name in listed["frozen"]}
        assert frozen == (set() if is_lora else {"vae", "text_encoder", "tokenizer", "scheduler"})
