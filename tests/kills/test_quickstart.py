# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The quickstart that is killed in any of its steps ends, by the same command, as one that was not, and repeats no finished step."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.cli.processes import MARK, descendants, start, wait_until
from tests.kills.killing import command, contents, finish


SIZES = ["--num_pairs", 64, "--num_paintings", 64, "--max_steps", 1, "--num_samples", 8]
STEPS = 9  # two bases, three and four arms


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(command("quickstart", "--output_dir", folder, *SIZES))
    return folder


def results(folder: Path) -> dict:
    """What came out, without the time that it took."""
    found = json.loads((folder / "results.json").read_text())
    pictures = contents(folder, lambda name: name.endswith(("s.png", ".parquet")) or "manifest" in name)
    return {"results": {key: value for key, value in found.items() if key != "seconds"}, **pictures}


def kill_once(args: list, out: Path, folder: Path, steps: int) -> None:
    """Starts the quickstart and kills it and its workers when so many steps are done."""
    mark = f"{os.getpid()}-{steps}"
    process = start(args, folder / "stdout", folder / "stderr", env=os.environ | {MARK: mark})
    wait_until(lambda: process.exitcode is not None or len(list(out.glob("steps/*.json"))) >= steps, 300)
    assert process.exitcode is None, (folder / "stderr").read_text()
    os.kill(process.pid, signal.SIGKILL)  # alone: its workers must end by themselves
    process.join(60)
    wait_until(lambda: not descendants(process.pid, mark), 60)


@pytest.mark.slow
def test_killed_between_steps(undisturbed, tmp_path):
    """Killed after three steps, it does the others only; then the same command does none."""
    out = tmp_path / "out"
    args = command("quickstart", "--output_dir", out, *SIZES)
    done: dict[str, int] = {}
    for steps in (3,):
        kill_once(args, out, tmp_path, steps)
        for path in out.glob("steps/*.json"):
            done.setdefault(path.name, path.stat().st_mtime_ns)
    ended = finish(args)
    assert ended.stdout.count("(of an earlier run)") == len(done) >= 3
    files = {path.name: path.stat().st_mtime_ns for path in out.glob("steps/*.json")}
    assert len(files) == STEPS and {name: files[name] for name in done} == done
    assert results(out) == results(undisturbed)
    assert not list(out.rglob("*.tmp")) and not [path for path in out.glob("steps/*") if path.is_dir()]
    assert finish(args).stdout.count("(of an earlier run)") == STEPS
    assert results(out) == results(undisturbed)
