# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""An evaluation that is killed at any moment ends, by the same command, as one that was not, and repeats no more than the piece at hand."""

import os
import shutil
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.cli.processes import start, wait_until
from tests.kills.commands import code
from tests.kills.killing import changes, contents, finish, kill_after, kill_at, times


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny models and prompts, and the folder of an evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        tiny.sd_pipeline().save_pretrained(folder / "models" / name)
    (folder / "models" / "prompts.txt").write_text("a red circle\na blue square\n")
    finish(evaluation(folder, folder / "undisturbed"))
    return folder


def evaluation(world: Path, output_dir: Path) -> list:
    return code("evaluate", world / "models", output_dir, output_dir.with_suffix(".log"))


def files(folder: Path) -> dict[str, bytes]:
    return contents(folder, lambda name: not name.endswith(".lock"))


def check(world: Path, output_dir: Path, kills: int) -> None:
    """The folder is that of an undisturbed run, and at most an image and the scores of a model were made twice for each kill."""
    assert files(output_dir) == files(world / "undisturbed")
    done = Counter(output_dir.with_suffix(".log").read_text().split("\n"))
    once = Counter((world / "undisturbed.log").read_text().split("\n"))
    assert done.keys() == once.keys()
    assert sum((done - once).values()) <= 4 * kills  # of one image at a time, or the four scores of one part


@pytest.mark.parametrize("number", [5, 12, 20, 40])
def test_killed_at_a_change(world, tmp_path, number):
    """Killed right before a change of its folder, the same command completes it."""
    out = tmp_path / "out"
    assert kill_at(evaluation(world, out), out, number)
    finish(evaluation(world, out))
    check(world, out, 1)


@pytest.mark.slow
def test_killed_at_every_change(world, tmp_path):
    """The same at each of the changes that an evaluation makes in its folder."""
    made = changes(evaluation(world, tmp_path / "listed"), tmp_path / "listed")
    assert len(made) > 50
    for number in range(1, len(made) + 1):
        out = tmp_path / f"out-{number}"
        assert kill_at(evaluation(world, out), out, number), number
        finish(evaluation(world, out))
        check(world, out, 1)


@pytest.mark.slow
def test_killed_at_random_moments(world, tmp_path):
    """Ten kills of the same evaluation, one after the other; where it ends in between, another one begins."""
    start_time = time.monotonic()
    finish(evaluation(world, tmp_path / "timed"))
    taken = time.monotonic() - start_time
    out, killed, of_this = tmp_path / "out", 0, 0
    for seconds in times(60, 0.1 * taken, 0.9 * taken):
        if kill_after(evaluation(world, out), seconds):
            killed, of_this = killed + 1, of_this + 1
        else:
            check(world, out, of_this)
            shutil.rmtree(out)
            out.with_suffix(".log").unlink()
            of_this = 0
        if killed == 10:
            break
    finish(evaluation(world, out))
    assert killed == 10
    check(world, out, of_this)


def test_one_of_two_processes_is_killed(world, tmp_path):
    """The other one ends too, and one process then completes what both began."""
    out = tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start(
            evaluation(world, out),
            tmp_path / f"stdout-{rank}",
            tmp_path / f"stderr-{rank}",
            env=os.environ | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    wait_until(lambda: any(out.rglob("*.png")), 90)
    os.kill(processes[1].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert processes[1].exitcode == -signal.SIGKILL and processes[0].exitcode not in (0, None)
    finish(evaluation(world, out))
    assert files(out) == files(world / "undisturbed")
