# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Commands that are killed, and started again.

A command is killed with SIGKILL, all of its processes at once: after some time ([`kill_after`]), or when it is about to change a
folder for the k-th time ([`kill_at`]): to open a file for writing, once it is open and empty, in the middle of a file that is
written past Python, to rename, link or remove a file, to make or remove a folder. Then the same command is repeated until it ends
([`finish`]), and folders are compared ([`contents`]).
"""

import builtins
import importlib
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.cli.processes import COMMAND, MARK, descendants, run, start


SECONDS = 120  # until a command that does not end is a failure
WRITING = ("w", "a", "x", "+")
# Functions that write a file past Python's own `open`, and the place of its path among their arguments
WRITERS = [
    ("torch", "save", 1),
    ("safetensors.torch", "serialize_file", 1),
    ("pyarrow.parquet", "write_table", 1),
    ("pyarrow", "OSFile", 0),
]
# Events of Python's auditing and their arguments: paths, and the descriptor of the folder that a path is relative to
CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),),
}


def command(*flags) -> list:
    """The arguments of Python for `trl-diffusion FLAGS`."""
    return ["-c", COMMAND, *flags]


def finish(args: list, **settings) -> subprocess.CompletedProcess:
    """Runs what `python ARGS` is, as [`tests.cli.processes.run`], which must succeed."""
    ended = run(args, **settings)
    assert ended.returncode == 0, ended.stderr
    return ended


def kill_after(args: list, seconds: float, **settings) -> bool:
    """
    Starts what `python ARGS` is and kills all its processes after a time.

    Args:
        args (`list`):
            The arguments of Python.
        seconds (`float`):
            How long it runs, from the fork on.

    Returns:
        `bool`: whether it was killed. If it ended earlier, it must have succeeded.
    """
    with tempfile.TemporaryDirectory() as name:
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        env = (settings.pop("env", None) or os.environ) | {MARK: mark}
        process = start(args, Path(name, "stdout"), Path(name, "stderr"), env=env, **settings)
        process.join(seconds)
        if process.exitcode is None:
            for pid in {process.pid, *descendants(process.pid, mark)}:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # it ended by itself
                    continue
        return _ended_or_killed(process, Path(name, "stderr"))


def kill_at(args: list, folder: Path, number: int, **settings) -> bool:
    """
    Starts what `python -c CODE ...` is and kills its processes right before their k-th change of a folder.

    Args:
        args (`list`):
            The arguments of Python: `"-c"`, the code, and what it gets.
        folder (`Path`):
            The folder.
        number (`int`):
            The change, from 1.

    Returns:
        `bool`: whether it was killed. If it ended earlier, it must have succeeded.
    """
    with tempfile.TemporaryDirectory() as name:
        process = start(armed(args, folder, number), Path(name, "stdout"), Path(name, "stderr"), **settings)
        process.join(SECONDS)
        return _ended_or_killed(process, Path(name, "stderr"))


def _ended_or_killed(process: multiprocessing.process.BaseProcess, stderr: Path) -> bool:
    process.join(SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL), f"{process.exitcode}: {stderr.read_text()}"
    return process.exitcode != 0


def changes(args: list, folder: Path, **settings) -> list[str]:
    """Runs what `python -c CODE ...` is to its end, and lists its changes of a folder, such as `"os.rename a.tmp"`."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name, "changes")
        finish(armed(args, folder, log=log), **settings)
        return log.read_text().splitlines()


def kill_and_finish(args: list, seconds: list[float], **settings) -> int:
    """Kills a command after each of these times, then repeats it until it ends. Returns how often it was killed."""
    killed = sum(kill_after(args, duration, **settings) for duration in seconds)
    finish(args, **settings)
    return killed


def times(number: int, start: float, end: float, seed: int = 0) -> list[float]:
    """Random times in seconds, one in each of `number` parts of the range, in a random order."""
    rng = random.Random(seed)
    values = [start + (end - start) * (index + rng.random()) / number for index in range(number)]
    rng.shuffle(values)
    return values


def contents(folder: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, bytes]:
    """All files of a folder by their paths in it, of those whose path is wanted."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if is_wanted(name)}


# ----- in the process that is killed -----


def armed(args: list, folder: Path, number: int | None = None, log: Path | None = None) -> list:
    """Arguments of Python for the same code, in a process that is killed at its k-th change of a folder, or lists them."""
    arguments = (str(folder), number, log and str(log))
    return ["-c", f"from tests.kills.killing import arm\narm(*{arguments!r})\n{args[1]}", *args[2:]]


def arm(folder: str, number: int | None, log: str | None) -> None:
    """Counts the changes of a folder from here on, in this process and those that it forks."""
    folder = os.path.realpath(folder)
    descriptor = log and os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0

    def is_inside(path, parent: int | None = None) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):  # a descriptor
            return False
        path = os.fsdecode(path)
        if parent not in (None, -1) and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{parent}"), path)
        path = os.path.abspath(path)
        return path == folder or path.startswith(f"{folder}{os.sep}")

    def happen(what: str, path, spoil: Callable[[], None] = lambda: None) -> None:
        nonlocal count
        count += 1
        if descriptor:
            os.write(descriptor, f"{what} {os.path.basename(os.fsdecode(path))}\n".encode())
        if count == number:
            spoil()
            os.killpg(0, signal.SIGKILL)
            time.sleep(SECONDS)  # it arrives

    def hook(event: str, args: tuple) -> None:
        places = CHANGES.get(event)
        if places:
            for place, parent in places:
                if is_inside(args[place], None if parent is None else args[parent]):
                    if event != "os.mkdir" or not os.path.exists(args[place]):  # else it changes nothing
                        happen(event, args[place])
                    return
        elif event == "open" and isinstance(args[1], str) and set(args[1]) & set(WRITING) and is_inside(args[0]):
            happen("open", args[0])

    def opening(file, mode="r", *args, **kwargs):
        opened = real_open(file, mode, *args, **kwargs)
        if set(mode) & set(WRITING) and is_inside(file):
            happen("opened", file)
        return opened

    def writing(function: Callable, place: int) -> Callable:
        def write(*args, **kwargs):
            path = args[place] if len(args) > place else None
            if not is_inside(path):
                return function(*args, **kwargs)
            happen(function.__name__, path)
            result = function(*args, **kwargs)
            if os.path.isfile(path):
                happen(f"half {function.__name__}", path, lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        return write

    real_open = builtins.open
    builtins.open = io.open = opening
    for module, name, place in WRITERS:
        if module in sys.modules:
            found = importlib.import_module(module)
            setattr(found, name, writing(getattr(found, name), place))
    sys.addaudithook(hook)
