# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
A command that runs on several machines ends on all of them where it fails on one, with that one's line. On one machine the launcher
ends the other processes; of other machines it knows nothing, and they would wait.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta


KEY = "trl_diffusion/failed"
EVERY = 1.0  # seconds between two looks
PATIENCE = timedelta(seconds=5)  # for the answer of the first machine


def is_on_several_machines() -> bool:
    """Whether a launcher started this process as one of several, some of them on other machines."""
    env = os.environ
    return "MASTER_ADDR" in env and int(env.get("LOCAL_WORLD_SIZE", 1)) < int(env.get("WORLD_SIZE", 1))


def connect():
    """A connection of its own to what the processes of all machines keep in common."""
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)


def tell_others(line: str) -> None:
    """Says to the processes of other machines why this one ends. Where they have not met yet, nobody waits for it."""
    from torch import distributed

    if not is_on_several_machines() or not distributed.is_initialized():
        return
    with suppress(RuntimeError):
        store = connect()
        if not store.check([KEY]):
            store.set(KEY, f"process {os.environ['RANK']}, on another machine, has ended: {line}")
        time.sleep(3 * EVERY)  # the first process may be the one that keeps it


def failure_of_another(error: Exception) -> str | None:
    """
    Why a process of another machine has ended.

    Args:
        error (`Exception`):
            What it led to in this process, perhaps.

    Returns:
        `str` or `None`: `None` where the error is this process's own.
    """
    from torch.distributed import DistError

    if not is_on_several_machines():
        return None
    with suppress(RuntimeError):
        store = connect()
        for _ in range(int(3 / EVERY)):  # what was cut off here may come before its reason
            if store.check([KEY]):
                return store.get(KEY).decode()
            time.sleep(EVERY)
    if not isinstance(error, DistError) and "gloo" not in str(error):
        return None
    return f"a process of another machine has ended, or the connection to it was cut; see what it says there ({error})"


@contextmanager
def ending_with_others(command: str) -> Iterator[None]:
    """While the context lasts, a failure on another machine ends this process with its line, whatever it waits for."""
    done = threading.Event()

    def watch() -> None:
        from torch import distributed

        while not done.wait(EVERY) and not distributed.is_initialized():
            pass
        with suppress(RuntimeError):  # the first process has ended
            store = connect()
            while not done.wait(EVERY):
                if store.check([KEY]):
                    line = store.get(KEY).decode()
                    print(f"trl-diffusion {command}: error: {line}", file=sys.stderr, flush=True)
                    os._exit(2)

    if is_on_several_machines():
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
