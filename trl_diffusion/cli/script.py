# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs the script of a command: a mistake of the user's and a request to end are one line and a status, not a traceback."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from ..machine import without_secrets
from ..messages import cut, printable
from .others import ending_with_others, failure_of_another, tell_others
from .quiet import quiet
from .stopping import stopping


if TYPE_CHECKING:
    from .parser import CommandParser


LONGEST = 10_000  # characters of a mistake


def run_script(command: str, find_script: Callable[[], ModuleType], flags: list[str] | None = None) -> int:
    """
    Runs a command in this process.

    Args:
        command (`str`):
            The command.
        find_script (`Callable`):
            Imports its script, with `main` and `make_parser`.
        flags (`list[str]`, *optional*):
            Its flags. Defaults to those of the process.

    Returns:
        `int`: the exit status: what `main` returns or 0, 2 after a mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    status, sys.excepthook = 0, say_traceback
    with quiet() as cut, stopping(command) as stop:
        try:
            with mistakes(command) as made, ending_with_others(command):
                script = find_script()
                status = script.main(*parser_of(command, script).parse_args_and_config(flags)) or 0
        except BaseException:
            if stop.number is None:
                raise
            stop.end()  # the signal, alone or in a group of exceptions, or what broke because of it
    if os.environ.get("RANK", "0") == "0":
        cut.say(command)
    if stop.number is not None:
        return stop.status
    return 2 if made else status


def run_launched(command: str, find_script: Callable[[], ModuleType], flags: list[str]) -> int:
    """
    Runs a command through `accelerate launch`.

    Args:
        command (`str`):
            The command.
        find_script (`Callable`):
            Imports its script.
        flags (`list[str]`):
            Its flags, and the launcher's.

    Returns:
        `int`: the exit status, that of the script.
    """
    status = 2
    with quiet(), stopping(command, forwards=True) as stop, mistakes(command):
        script = find_script()
        parser = parser_of(command, script)
        from .launch import launch

        status = launch(script, parser, flags, stop)
    return status


def parser_of(command: str, script: ModuleType) -> "CommandParser":
    """The parser of a command, which says what the script's first lines say."""
    parser = script.make_parser(prog=f"trl-diffusion {command}")
    parser.description = parser.description or script.__doc__.strip().split("\n\n")[0]
    return parser


@contextmanager
def mistakes(command: str) -> Iterator[list[str]]:
    """Says a mistake of the user's in one line. Yields a list that holds it afterwards."""
    made: list[str] = []
    try:
        yield made
    except BrokenPipeError:
        raise
    except Exception as error:
        line = describe(error) if is_mistake(error) else failure_of_another(error)
        if line is None:
            tell_others(f"{type(error).__name__}: {describe(error)}")
            raise
        made.append(line)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)  # the first process of this machine says the same, and its end ends this one
        print(f"trl-diffusion {command}: error: {line}", file=sys.stderr, flush=True)
        if is_mistake(error):
            tell_others(line)


def say_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python says of an error that nobody expected, without secrets."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(without_secrets(text), end="", file=sys.stderr, flush=True)


def is_mistake(error: Exception) -> bool:
    """Whether the message of an error says all: something is wrong with what was given, or missing on this machine."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    package = type(error).__module__.partition(".")[0]
    # datasets cannot read a file; transformers misses the package of a tracker, or the device of a precision
    return package == "datasets" or (type(error) is RuntimeError and "pip install" in str(error))


def describe(error: Exception) -> str:
    """What an error says, in one line and with the reason behind it where that is another error."""
    text = printable(str(error)) or type(error).__name__
    cause = error.__cause__
    if type(error).__module__.startswith("datasets.") and cause is not None and printable(str(cause)) not in text:
        text = f"{text} {type(cause).__name__}: {printable(str(cause))}"
    return cut(without_secrets(text), LONGEST)
