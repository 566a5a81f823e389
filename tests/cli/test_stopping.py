# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Every command ends when it is asked to: soon, with one line, with its status, and without leaving a process behind."""

import multiprocessing
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.cli.processes import stopped
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.cli.stopping import stopping
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset
from trl_diffusion.trainer.callbacks import StopCallback


STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SECONDS = 30  # generous: two seconds when nothing else runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    tiny.sd_pipeline().save_pretrained(folder / "model")
    for name, rows in (("pairs", tiny.pairs()), ("scenes", preference_dataset(100, seed=0))):
        (folder / name).mkdir()
        rows.to_parquet(folder / name / "train.parquet")
    (folder / "prompts.txt").write_text("a red circle and a blue square\n")
    return folder


@pytest.fixture
def silent_server():
    """A server that takes connections and never answers; the connections so far."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], connections


def check(ended, number: int, command: str) -> str:
    """The one line of a command that was stopped."""
    assert ended.status == STATUS[number] and ended.seconds < SECONDS and ended.left == 0
    assert "Traceback" not in ended.stderr
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    lines = [line for line in ended.stderr.splitlines() if "stopped by" in line]
    assert len(lines) == 1 and f"trl-diffusion {command}: stopped by {name}." in lines[0]  # perhaps behind a bar
    assert ended.stderr.rstrip().endswith(lines[0])  # nothing comes behind it
    return lines[0]


def training(folders, output_dir) -> list:
    flags = ["--model_name_or_path", folders / "model", "--dataset_name", folders / "pairs", "--report_to", "none"]
    flags += ["--per_device_train_batch_size", 2, "--logging_steps", 1, "--max_steps", 100000]
    return ["instance-dpo", *flags, "--output_dir", output_dir]


def trains(output: str) -> bool:
    return output.count("'loss'") > 2


@pytest.mark.parametrize(
    "number, group, flags",
    [
        (signal.SIGINT, True, ["--num_processes", 1, "--dataloader_num_workers", 2]),
        (signal.SIGTERM, False, ["--num_processes", 2]),
    ],
    ids=["Ctrl-C, workers", "SIGTERM, two processes"],
)
def test_a_training_saves_and_ends(folders, tmp_path, number, group, flags):
    """The step is finished, a checkpoint saved and named; processes and workers end, by Ctrl-C or a signal to the first one."""
    ended = stopped([*training(folders, tmp_path / "out"), *flags], tmp_path, trains, number, group)
    line = check(ended, number, "instance-dpo")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"saved in {checkpoint}: the same command with `--resume_from_checkpoint {checkpoint}` continues." in line
    assert (checkpoint / "trainer_state.json").exists() and (checkpoint / "optimizer.pt").exists()
    assert not (tmp_path / "out" / "unet").exists()  # no result of an unfinished training


def test_a_training_without_checkpoints_says_so(folders, tmp_path):
    """Where the run saves no checkpoints, none is saved, and the line says that nothing is."""
    flags = ["--num_processes", 1, "--save_strategy", "no"]
    ended = stopped([*training(folders, tmp_path / "out"), *flags], tmp_path, trains)
    assert "nothing is saved, because `save_strategy` is `no`" in check(ended, signal.SIGINT, "instance-dpo")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_an_annotation_ends_while_a_server_is_silent(folders, tmp_path, silent_server):
    """Requests in flight are not waited for."""
    port, connections = silent_server
    flags = ["--dataset_name", folders / "pairs", "--vlm", "model", "--vlm_base_url", f"http://127.0.0.1:{port}/v1"]
    command = ["annotate-instances", *flags, "--detector", "oracle", "--output_dir", tmp_path / "out"]
    ended = stopped(command, tmp_path, lambda output: len(connections) > 2)
    assert "the same command continues" in check(ended, signal.SIGINT, "annotate-instances")


def test_an_evaluation_ends(folders, tmp_path):
    """Through the launcher, in the middle of an image."""
    flags = ["--models", f"a={shipped('base_pipeline')}", "--prompts", folders / "prompts.txt", "--use_cpu"]
    flags += ["--num_inference_steps", 900, "--metrics", "caption_match", "--vlm", "oracle", "--detector", "oracle"]
    command = ["evaluate", *flags, "--num_processes", 1, "--output_dir", tmp_path / "out"]
    ended = stopped(command, tmp_path, lambda output: "Sampling" in output, signal.SIGTERM, group=False)
    assert "the same command continues" in check(ended, signal.SIGTERM, "evaluate")


def test_show_masks_ends(folders, tmp_path):
    """A command without workers."""
    command = ["show-masks", "--dataset_name", folders / "scenes", "--num_rows", 100, "--output_dir", tmp_path / "out"]
    ended = stopped(command, tmp_path, lambda output: (tmp_path / "out" / "0001.png").exists(), signal.SIGTERM)
    check(ended, signal.SIGTERM, "show-masks")


@pytest.mark.parametrize("number, group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_the_quickstart_ends(tmp_path, number, group):
    """Both of its processes end in the middle of a training."""
    flags = ["--num_pairs", 64, "--num_paintings", 64, "--max_steps", 100000, "--output_dir", tmp_path / "out"]
    ended = stopped(["quickstart", *flags], tmp_path, lambda output: "[2/11]" in output, number, group)
    check(ended, number, "quickstart")


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path):
    """Stopped after the second of four steps and resumed, it ends on the weights of a run that was not stopped."""
    weights = []
    for name, stops in (("whole", False), ("stopped", True)):
        settings = tiny.FAST | {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
        args = InstanceDPOConfig(str(tmp_path / name), **settings)

        def trainer(args=args):
            return InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs())

        run = trainer()
        run.add_callback(StopCallback(lambda run=run, stops=stops: stops and run.state.global_step == 2))
        run.train()
        assert run.state.global_step == (2 if stops else 4)
        if stops:
            run = trainer()
            run.train(resume_from_checkpoint=True)
        run.save_model()
        weights.append(load_file(next((tmp_path / name / "unet").glob("*.safetensors"))))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# What stands around the line at which the signal arrives; `arrive` is that line.
AROUND = {
    "nothing": "arrive()",
    "a task": "asyncio.run(awaited())",
    "gathered tasks": "asyncio.run(gathered())",
    "a callback of the loop": "asyncio.run(called_back())",
    "a task group of anyio": "anyio.run(grouped, anyio.create_task_group)",
    "a task group of asyncio": "asyncio.run(grouped(asyncio.TaskGroup))",
    "an error made of it": "made_an_error()",
    "an exit made of it": "made_an_exit()",
    "a finalizer": "Finalized()",
}
SCRIPT = """
import asyncio, os, signal, sys, time, types
import anyio
from trl_diffusion.cli.script import run_script

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

def arrive():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)

async def awaited():
    arrive()
    await asyncio.sleep(60)

async def gathered():
    await asyncio.gather(asyncio.sleep(60), awaited())

async def called_back():
    asyncio.get_running_loop().call_soon(arrive)
    await asyncio.sleep(60)

async def grouped(group):
    async with group() as tasks:
        getattr(tasks, "start_soon", lambda function, *args: tasks.create_task(function(*args)))(awaited)
        await asyncio.sleep(60)

def made_an_error():
    try:
        arrive()
    except BaseException as error:
        raise RuntimeError("something broke") from error

def made_an_exit():
    try:
        arrive()
    except BaseException:
        sys.exit(3)

class Finalized:
    def __del__(self):
        arrive()

class Parser:
    description = ""

    def parse_args_and_config(self, flags):
        return ()

def main():
    AROUND
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
script = types.ModuleType("script", "A script.")
script.main, script.make_parser = main, lambda prog: Parser()
sys.exit(run_script("show-masks", lambda: script, []))
"""


@pytest.mark.parametrize("around", AROUND)
def test_a_signal_ends_the_command_wherever_it_arrives(around):
    """Event loops, groups of tasks and errors made of the signal do not turn it into a traceback."""
    code = SCRIPT.replace("AROUND", AROUND[around])
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 130
    assert ended.stderr.strip().splitlines()[-1].startswith("trl-diffusion show-masks: stopped by Ctrl-C.")
    assert around == "a finalizer" or "Traceback" not in ended.stderr  # Python itself prints what a finalizer raises


def test_a_process_that_is_kept_does_not_hold_the_end():
    """Workers of a data loader that are kept were forked while the command ran, and outlive it: it ends all the same, at once."""
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True)
    with stopping("instance-dpo"):
        worker.start()
        end = time.perf_counter()
    assert time.perf_counter() - end < 10
    worker.kill()
    worker.join()
