# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""How a command ends when it is asked to: by Ctrl-C (SIGINT) or by SIGTERM, with one line, its status, and no process left."""

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil


SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0  # seconds until a command that does not end by itself is ended
REPEAT = 1.0  # seconds in which a signal that comes again, from the terminal and from a launcher, is the same
END = b"\0"  # no signal: the command is done
# What a command leaves behind, said when it is stopped
KEPT = {
    "annotate-instances": "Finished shards are kept: the same command continues.",
    "annotate-attributes": "Finished shards are kept: the same command continues.",
    "evaluate": "Finished images and scores are kept: the same command continues.",
    "show-masks": "The pictures drawn so far are kept.",
    "quickstart": "Finished steps are kept: the same command continues.",
    **dict.fromkeys(
        ("instance-dpo", "attribute-sft", "complex-po", "ddspo"),
        "Nothing was trained yet; the same command starts again.",
    ),
}


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first signal. Event loops and pools let a `KeyboardInterrupt` through, and no other."""


class Stop:
    """
    The request to end, for one command.

    Args:
        command (`str`):
            The command.
        forwards (`bool`):
            Whether the command only waits for processes that it launched, to which the signal is passed on. A second one ends
            them.

    Attributes:
        number (`int`, *optional*):
            The signal, once it came.
        waits (`bool`):
            Whether the first signal is a request only, because the work ends at the next good moment. A second one ends it.
        said (`bool`):
            Whether the line has been printed.
    """

    def __init__(self, command: str, forwards: bool):
        self.command = command
        self.forwards = forwards
        self.number: int | None = None
        self.waits = False
        self.said = False
        self.process = os.getpid()

    @property
    def status(self) -> int:
        """The exit status: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number

    def say(self, text: str) -> None:
        """Prints the one line, in the first of several processes."""
        if not self.said and os.environ.get("RANK", "0") == "0":
            self.said = True
            name = "Ctrl-C" if self.number == signal.SIGINT else "SIGTERM"
            start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
            print(f"{start}trl-diffusion {self.command}: stopped by {name}. {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends this process and all that it started, at once."""
        if not self.forwards:
            self.say("The step was not finished." if self.waits else KEPT.get(self.command, ""))
        descendants = psutil.Process().children(recursive=True)
        for process in descendants:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        os._exit(self.status)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals, in the main thread."""
        if os.getpid() != self.process:  # a worker, which its parent ends
            return
        is_first, self.number = self.number is None, self.number or number
        if is_first and not self.waits and not self.forwards:
            logging.disable()  # what libraries say from here on is about the signal
            raise Stopped

    def watch(self, pipe: int) -> None:
        """Passes the signal on, and ends the process where the main thread does not: it may wait for what never comes."""
        first = None
        while True:
            may_last = first is None or self.waits or self.forwards
            if not select.select([pipe], [], [], None if may_last else max(0, first + GRACE - time.monotonic()))[0]:
                self.end()
            number = os.read(pipe, 1)
            if number == END:
                return
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first, self.number = time.monotonic(), self.number or number[0]
                if self.forwards:
                    self.forward()
            elif time.monotonic() - first > REPEAT:
                self.end()

    def forward(self) -> None:
        """Passes the signal on to the launched processes. Where there are none yet, this process ends."""
        launched = psutil.Process().children()
        if not launched:
            self.forwards = False
            self.end()
        for process in launched:
            try:
                process.send_signal(self.number)
            except psutil.NoSuchProcess:
                continue


_current: list[Stop] = []


@contextmanager
def stopping(command: str, forwards: bool = False) -> Iterator[Stop]:
    """
    Handles the signals while a command runs. A signal that was ignored before, as by `nohup`, still is.

    Args:
        command (`str`):
            The command.
        forwards (`bool`, *optional*, defaults to `False`):
            See [`Stop`].

    Yields:
        [`Stop`]
    """
    stop = Stop(command, forwards)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=stop.watch, args=(reading,), daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop.handle)
    _current.append(stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher blocks them until here
    try:
        yield stop
    finally:
        _current.remove(stop)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.write(
            writing, END
        )  # to close it is not enough: processes that were forked, such as kept workers, have it too
        watcher.join()
        os.close(writing)
        os.close(reading)


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that are launched in this context get no signal until they handle it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def finishing() -> Iterator[Stop | None]:
    """In this context the first signal is a request only. Yields the request, or `None` if no command runs."""
    stop = _current[-1] if _current else None
    if stop is None:
        yield None
        return
    stop.waits = True
    try:
        yield stop
    finally:
        stop.waits = False
