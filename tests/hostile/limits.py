# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Calls something in a process of its own, with limits of time and memory, and says how it ended."""

import os
import pickle
import resource
import select
from collections.abc import Callable
from typing import Any, NamedTuple


MEMORY = 24 * 2**30  # bytes of addresses, of which the libraries take most


class Outcome(NamedTuple):
    """How a call ended: `"ok"`, the name of an exception, `"slow"` or `"died"`; and its message."""

    kind: str
    message: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it worked, or was refused in one line that somebody can read."""
        line = self.message
        return self.kind == "ok" or (self.kind == "ValueError" and "\n" not in line and 20 < len(line) < 1_500)


def outcome(call: Callable[[], Any], seconds: float = 10) -> Outcome:
    """
    Calls in a fork.

    Args:
        call (`Callable`):
            What is called.
        seconds (`float`, *optional*, defaults to 10):
            How long it may take.

    Returns:
        [`Outcome`]
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            call()
            ended = Outcome("ok")
        except BaseException as error:
            ended = Outcome(type(error).__name__, str(error)[:5_000])
        os.write(writer, pickle.dumps(tuple(ended)))
        os._exit(0)
    os.close(writer)
    is_ready = bool(select.select([reader], [], [], seconds)[0])
    content = os.read(reader, 2**16) if is_ready else b""
    if not is_ready:
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(reader)
    return Outcome(*pickle.loads(content)) if content else Outcome("died" if is_ready else "slow")
