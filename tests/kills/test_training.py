# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
A training is killed, and the same command repeated: what it ends with is what an undisturbed one ends with.

Compared are the weights, bit by bit, what was logged but for times, the card and its facts but for times, and every picture.
"""

import json
import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers.trainer_pt_utils import safe_globals

from tests import tiny
from tests.cli.processes import SERVER, run_distributed
from tests.kills.killing import arm, command, contents, finish, kill_after, times
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.trainer.checkpoint_folders import LIST_NAME, checkpoints_in, what_is_wrong


STEPS = ["--max_steps", 4, "--save_steps", 1, "--save_total_limit", 2, "--logging_steps", 1, "--learning_rate", 1e-3]
SETTINGS = [
    "--per_device_train_batch_size",
    2,
    "--use_cpu",
    "true",
    "--report_to",
    "none",
    "--resume_from_checkpoint",
    "true",
]
SAMPLES = ["--sample_prompts", "a cat", "--sample_steps", 2, "--num_inference_steps", 1]
LORA = ["--use_peft", "--lora_r", 2]
TIMES = re.compile(r"runtime|per_second|seconds|flos|^(train_loss|duration)$")
TIME_ON_CARD = re.compile(r"\d+:\d\d:\d\d")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, datasets, a tree, and an expert for the second stage of CPO."""
    folder = tmp_path_factory.mktemp("training")
    tiny.sd_pipeline().save_pretrained(folder / "model")
    tiny.pairs(8).to_parquet(folder / "pairs.parquet")
    tiny.paintings(8).to_parquet(folder / "paintings.parquet")
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    finish(training(folder, "attribute-sft", folder / "expert"))
    return folder


def training(folders: Path, name: str, output_dir: Path, *flags) -> list:
    """A command that trains; `instance-dpo all` trains all weights."""
    name, _, is_full = name.partition(" ")
    rows = "pairs" if name == "instance-dpo" else "paintings"
    data = ["--model_name_or_path", folders / "model", "--dataset_name", folders / f"{rows}.parquet"]
    own = {
        "instance-dpo": SAMPLES if is_full else SAMPLES + LORA,
        "attribute-sft": ["--criteria", folders / "criteria.yaml", "--lora_r", 2],
        "complex-po": ["--criteria", folders / "criteria.yaml", "--lora_r", 2, "--expert", folders / "expert"],
    }
    return command(name, *data, *own[name], *STEPS, *SETTINGS, "--output_dir", output_dir, *flags)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(each) for name, each in value.items() if not TIMES.search(name)}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def result(folder: Path) -> dict[str, Any]:
    """
    What a run has left: everything but times, the folder's name and what is a function of the other files. Of random states those of
    torch and NumPy: libraries draw from Python's own for names and waits.
    """
    left = {}
    for name, content in contents(folder).items():
        if name.startswith(".lock") or name.endswith(LIST_NAME):
            continue
        if name.endswith(".json"):
            left[name] = json.loads(json.dumps(without_times(json.loads(content))).replace(folder.name, "OUT"))
        elif name.endswith((".md", ".yaml")):
            left[name] = TIME_ON_CARD.sub("TIME", content.decode().replace(folder.name, "OUT"))
        elif name.endswith(".safetensors"):  # tensors of one size come in any order
            left[name] = {key: value.numpy().tobytes() for key, value in load(content).items()}
        elif name.endswith(".pth"):
            with safe_globals():
                states = torch.load(folder / name)
            left[name] = {key: str(value) for key, value in states.items() if key != "python"}
        else:
            left[name] = content
    return left


def check_same(folder: Path, undisturbed: Path) -> None:
    """All of the result is that of the undisturbed run, its checkpoints too, and nothing half done is left."""
    found, expected = result(folder), result(undisturbed)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-3", "checkpoint-4"]
    assert [what_is_wrong(path) for path in checkpoints_in(folder)] == [None, None]


def check_whole(folder: Path) -> None:
    """Whatever has the name of a checkpoint is whole."""
    assert [(path.name, wrong) for path in checkpoints_in(folder) if (wrong := what_is_wrong(path))] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, number", [("instance-dpo", 20), ("instance-dpo all", 12), ("attribute-sft", 10), ("complex-po", 10)]
)
def test_killed_at_random_moments(folders, tmp_path, name, number):
    """Killed again and again at random moments, saving included, then the same command: nothing differs."""
    start = time.perf_counter()
    finish(training(folders, name, tmp_path / "undisturbed"))
    seconds = time.perf_counter() - start
    args, killed = training(folders, name, tmp_path / "killed"), 0
    for moment in times(4 * number, 0.1 * seconds, 0.9 * seconds):
        if kill_after(args, moment):
            killed += 1
            check_whole(tmp_path / "killed")
        else:  # it was done before: another one begins
            check_same(tmp_path / "killed", tmp_path / "undisturbed")
            shutil.rmtree(tmp_path / "killed")
        if killed == number:
            break
    finish(args)
    assert killed == number
    check_same(tmp_path / "killed", tmp_path / "undisturbed")


# ----- at each change of the folder; processes are forked from one that holds the model -----


def make_trainer(name: str, folder: Path):
    """A trainer of two steps, which saves at both and keeps one checkpoint."""
    settings = tiny.FAST | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    settings |= {"logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True}
    pipeline = tiny.sd_pipeline()
    if name == "attribute-sft":
        args = AttributeSFTConfig(str(folder), criteria=str(folder.parent / "criteria.yaml"), **settings)
        return AttributeSFTTrainer(pipeline, args, train_dataset=tiny.paintings(), peft_config=tiny.lora(2, 2))
    args = InstanceDPOConfig(str(folder), sample_prompts=["a cat"], num_inference_steps=1, sample_steps=1, **settings)
    peft_config = None if name.endswith("all") else tiny.lora(2, 2)
    return InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(), peft_config=peft_config)


def go_on(trainer) -> None:
    """What a command does behind its flags."""
    trainer.args.resume_from_checkpoint = True
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.create_model_card()


def forked(work: Callable[[], None]) -> int:
    """Does something in a process of its own, in a session of its own. Returns its status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_each(name: str, folder: Path) -> None:
    """See [`test_killed_at_every_change`]; writes the number of changes into the file `number`."""
    torch.set_num_threads(1)
    out, template, log = folder / "out", folder / "template", folder / "log"
    trainer = make_trainer(name, out)
    assert forked(lambda: go_on(trainer)) == 0
    undisturbed = result(out)
    shutil.rmtree(out)

    def begin():
        arm(str(out), None, str(log))
        go_on(trainer)

    assert forked(begin) == 0
    names = log.read_text().splitlines()
    first = names.index("os.rename checkpoint-1")
    shutil.rmtree(out)

    def until(number: int) -> None:
        arm(str(out), number, None)
        go_on(trainer)

    assert forked(lambda: until(first + 2)) == -signal.SIGKILL
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-1"]
    shutil.copytree(out, template)
    number, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        number += 1
        shutil.rmtree(out)
        shutil.copytree(template, out)
        status = forked(lambda: until(number))  # noqa: B023
        assert status in (0, -signal.SIGKILL)
        check_whole(out)
        assert checkpoints_in(out)
        assert forked(lambda: go_on(trainer)) == 0
        found = result(out)
        different = [key for key in found.keys() | undisturbed.keys() if found.get(key) != undisturbed.get(key)]
        assert different == [], (number, different)
    (folder / "number").write_text(str(number - 1))


@pytest.mark.slow
@pytest.mark.parametrize("name, least", [("attribute-sft", 60), ("instance-dpo all", 140)])
def test_killed_at_every_change(tmp_path, name, least):
    """
    A run of two steps that goes on from its first checkpoint is killed at each change of its output directory: while it saves,
    rotates, and writes model, card and pictures. Each time a whole checkpoint is there, none that is not, and the run that goes on
    from it ends with the files of an undisturbed one.
    """
    (tmp_path / "criteria.yaml").write_text(tiny.CRITERIA)
    process = SERVER.Process(target=kill_at_each, args=(name, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert int((tmp_path / "number").read_text()) >= least


# ----- two processes -----


@pytest.mark.slow
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
def test_two_processes(folders, tmp_path, victims):
    """One or both of two processes are killed in the middle of a training: the same command in two ends as if nothing had been."""
    args = training(folders, "attribute-sft", tmp_path / "killed")
    if not (folders / "two").exists():
        assert [
            ended.returncode for ended in run_distributed(training(folders, "attribute-sft", folders / "two"))
        ] == [0, 0]
    code = f"import os, signal\nfrom trl_diffusion.trainer.saving import Saver\n{KILLS.format(victims=victims)}\n{args[1]}"
    ended = run_distributed(["-c", code, *args[2:]])
    assert -signal.SIGKILL in [each.returncode for each in ended]
    check_whole(tmp_path / "killed")
    ended = run_distributed(args)
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr
    check_same(tmp_path / "killed", folders / "two")


# Kills the process when it saves for the second time, with its own files written
KILLS = """
save, count = Saver.save, 0
def killing(self, output_dir, write):
    global count
    count += 1
    def die():
        write()
        if count == 2 and self.args.process_index in {victims}:
            os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir, die)
Saver.save = killing
"""
