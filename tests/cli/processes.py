# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Commands as processes of their own: started, signalled, timed, and looked for what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


MARK = "TRL_DIFFUSION_TEST_RUN"  # an environment variable that all descendants inherit, so that orphans are found too


class Ended(NamedTuple):
    """How a command ended: its status, the seconds from the signal to the end, its output, and how many processes were left."""

    status: int
    seconds: float
    stdout: str
    stderr: str
    left: int


def stopped(
    args: list[str], folder: Path, is_busy: Callable[[str], bool], number: int = signal.SIGINT, group: bool = True
) -> Ended:
    """
    Starts a command, sends it a signal once it is busy, and waits for its end.

    Args:
        args (`list[str]`):
            The command and its flags, for `python -m trl_diffusion`.
        folder (`Path`):
            Where its output is kept.
        is_busy (`Callable`):
            Tells from the output so far whether the command is busy.
        number (`int`, *optional*, defaults to `signal.SIGINT`):
            The signal.
        group (`bool`, *optional*, defaults to `True`):
            Whether all its processes get the signal, as from a terminal, or only the first one, as from `kill`.

    Returns:
        [`Ended`]
    """
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "stdout", folder / "stderr"
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from trl_diffusion.cli import main; sys.exit(main())",
                *map(str, args),
            ],
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # ignored where the tests run in the background
            env=os.environ | {MARK: mark},
        )
    try:
        wait_until(lambda: process.poll() is not None or is_busy(out.read_text() + err.read_text()), 90)
        assert process.poll() is None, f"ended too early: {err.read_text()}"
        start = time.perf_counter()
        os.killpg(process.pid, number) if group else process.send_signal(number)
        process.wait(60)
        seconds = time.perf_counter() - start
        left = len(marked(mark))
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    return Ended(process.returncode, seconds, out.read_text(), err.read_text(), left)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits until a condition holds, and fails if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """The processes that inherited a mark and have not ended."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended in the meantime, or somebody else's
            continue
    return found
