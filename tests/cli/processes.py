# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Commands as processes of their own: started, signalled, timed, and looked for what they leave behind.

Importing the libraries takes longer than what most tests look at. Processes are therefore forked from a server that has
imported them once, and in which nothing else happened. What has to start as a user starts it uses `subprocess`:
`test_quiet.py` a whole training through `accelerate launch`, `test_parser.py` `python -m`. Where `accelerate launch` starts two
processes, Python starts anew in both.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
MARK = "TRL_DIFFUSION_TEST_RUN"  # an environment variable that all descendants inherit, so that orphans are found too
COMMAND = "import sys; from trl_diffusion.cli import main; sys.exit(main())"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.cli.preload"])


def start(args: list, stdout: Path, stderr: Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> BaseProcess:
    """
    Starts what `python ARGS` is: a script, a module behind `-m`, or code behind `-c`.

    Args:
        args (`list`):
            The arguments of Python.
        stdout (`Path`):
            File of the output.
        stderr (`Path`):
            File of the errors.
        cwd (`Path`, *optional*):
            The current folder. Defaults to the repository.
        env (`dict[str, str]`, *optional*):
            All of the environment. What libraries read when they are imported has no effect. Defaults to that of this process.

    Returns:
        `BaseProcess`: the first process of a session of its own.
    """
    environment = dict(os.environ if env is None else env)
    process = SERVER.Process(target=begin, args=([*map(str, args)], str(stdout), str(stderr), str(cwd), environment))
    process.start()
    return process


def run(args: list, **settings) -> subprocess.CompletedProcess:
    """Runs what `python ARGS` is, see [`start`], as `subprocess.run` does with `capture_output` and `text`."""
    return run_together([args], [{}], **settings)[0]


def run_distributed(args: list, num_processes: int = 2, **settings) -> list[subprocess.CompletedProcess]:
    """Runs what `python ARGS` is in several processes that know of each other, as `torch.distributed.run` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1"}
    ranks = [{**world, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank} for rank in range(num_processes)]
    return run_together([args] * num_processes, ranks, **settings)


def run_together(commands: list[list], environments: list[dict], **settings) -> list[subprocess.CompletedProcess]:
    """Runs several at the same time, each with some variables added to its environment. When one fails, the others end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env, processes = settings.pop("env", None) or os.environ, []
        for number, (args, variables) in enumerate(zip(commands, environments, strict=True)):
            added = {name: str(value) for name, value in variables.items()}
            files = (folder / f"stdout-{number}", folder / f"stderr-{number}")
            processes.append(start(args, *files, env={**env, **added}, **settings))
        waiting = list(processes)
        while waiting:
            multiprocessing.connection.wait([process.sentinel for process in waiting])
            waiting = [process for process in waiting if process.exitcode is None]
            if any(process.exitcode for process in processes):
                for process in waiting:
                    process.kill()
        return [
            subprocess.CompletedProcess(
                args,
                process.exitcode,
                (folder / f"stdout-{number}").read_text(),
                (folder / f"stderr-{number}").read_text(),
            )
            for number, (args, process) in enumerate(zip(commands, processes, strict=True))
        ]


def begin(args: list[str], stdout: str, stderr: str, cwd: str, environment: dict[str, str]) -> None:
    """The first function of a forked process: makes it one that was started alone."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    forget_signals()
    multiprocessing.set_start_method(None, force=True)  # that of the server is passed on
    for number, file in enumerate((os.devnull, stdout, stderr)):
        descriptor = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    replace_environment(environment)
    launcher = sys.modules["accelerate.commands.launch"]
    launcher.subprocess = SimpleNamespace(Popen=Forked, CalledProcessError=subprocess.CalledProcessError)
    become(args)


def forget_signals() -> None:
    """The handlers with which Python starts, even where SIGINT was ignored because the tests run in the background."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def become(args: list[str]) -> None:
    """Runs what `python ARGS` runs, in this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        if args[0] == "-m":
            sys.argv, sys.path[0:0] = args[1:], [os.getcwd()]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        elif args[0] == "-c":
            sys.argv, sys.modules["__main__"] = ["-c", *args[2:]], ModuleType("__main__")
            exec(args[1], vars(sys.modules["__main__"]))
        else:
            sys.argv, sys.path[0:0] = args, [str(Path(args[0]).parent)]
            runpy.run_path(args[0], run_name="__main__")


class Forked:
    """Stands for `subprocess.Popen` where `accelerate launch` starts one process, `python SCRIPT`: forks instead."""

    def __init__(self, command: list[str], env: dict[str, str]):
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                forget_signals()
                replace_environment(env)
                become(command[1:])
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
            multiprocessing.util._exit_function()  # ends workers, as the end of a process does
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


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
            The command and its flags.
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
    out.touch()
    err.touch()
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    process = start(["-c", COMMAND, *args], out, err, env=os.environ | {MARK: mark})
    try:
        wait_until(lambda: process.exitcode is not None or is_busy(out.read_text() + err.read_text()), 90)
        assert process.exitcode is None, f"ended too early: {err.read_text()}"
        start_time = time.perf_counter()
        os.killpg(process.pid, number) if group else os.kill(process.pid, number)
        process.join(60)
        seconds = time.perf_counter() - start_time
        assert process.exitcode is not None, f"did not end: {err.read_text()}"
        left = len(descendants(process.pid, mark))
    finally:
        for pid in descendants(process.pid, mark):
            os.kill(pid, signal.SIGKILL)
    return Ended(process.exitcode, seconds, out.read_text(), err.read_text(), left)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits until a condition holds, and fails if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def descendants(session: int, mark: str) -> list[int]:
    """
    The processes that have not ended, of a session or with a mark: a fork has the session of its parent, and Python that is
    started anew has the mark in the environment that it started with.
    """
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            is_marked = wanted in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # ended in the meantime, or somebody else's
            continue
        if state != "Z" and (is_marked or int(its_session) == session):
            found.append(int(folder.name))
    return found
