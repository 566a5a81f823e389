# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The help of the commands, without their imports: `help.json` holds its texts, which are only wrapped here."""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from ..files import write_file


SHIPPED = Path(__file__).with_name("help.json")
PACKAGES = ("transformers", "trl")  # others whose flags a command has


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that fits into 80 columns: one spelling of each flag, and the defaults that say something."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, 100) - 2)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.metavar
        flags = ", ".join(flag for flag in action.option_strings if "-" not in flag.lstrip("-"))
        if action.nargs == 0 or isinstance(action.const, bool):  # on or off: a value is not needed
            return flags
        return f"{flags} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "value").strip("_").upper() if action.type in (int, float) else "VALUE"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{default_metavar} ..."
        if action.choices and len(action.choices) > 6:
            return default_metavar
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)

    def lines_of(self, action: argparse.Action) -> Iterator[str]:
        """The two texts of a flag, before they are wrapped: how it is written, and what it does."""
        yield self._format_action_invocation(action)
        yield self._expand_help(action) if action.help else ""


def page_of(parser: argparse.ArgumentParser) -> dict:
    """The texts of a parser's help: its description, its end, and its flags under their titles; and the choices of flags."""
    formatter = HelpFormatter(parser.prog)
    groups = {
        group.title: [list(formatter.lines_of(action)) for action in group._group_actions]
        for group in parser._action_groups
    }
    choices = {
        flag: list(action.choices)
        for action in parser._actions
        if action.choices
        for flag in action.option_strings
        if "-" not in flag.lstrip("-")
    }
    return {"description": parser.description, "epilog": parser.epilog, "groups": groups, "choices": choices}


def parser_for(prog: str, page: dict) -> argparse.ArgumentParser:
    """A parser that knows nothing but its help, which is that of the parser that the page was made of."""
    parser = argparse.ArgumentParser(
        prog,
        usage="%(prog)s [flags]",
        description=page["description"],
        epilog=page["epilog"],
        formatter_class=HelpFormatter,
        add_help=False,
    )
    for title, flags in page["groups"].items():
        group = parser.add_argument_group(title)
        for flag, text in flags:
            group.add_argument("flag", metavar=flag, help=text.replace("%", "%%"))
    return parser


def versions() -> dict[str, str]:
    """The installed versions of what a page depends on."""
    return {name: version(name) for name in PACKAGES}


def kept_file() -> Path:
    """Where pages for other versions are kept. A change of any module of this package is another version."""
    changed = max(path.stat().st_mtime_ns for path in Path(__file__).parents[1].rglob("*.py"))
    name = "-".join(["help", *versions().values(), str(changed)])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_diffusion" / f"{name}.json"


def read_pages(file: Path) -> dict[str, dict]:
    """The pages of a file, by command. Without a file that can be read there are none."""
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))["pages"]
    return {}


def is_shipped() -> bool:
    """Whether the pages that come with the package are those of the installed versions."""
    return json.loads(SHIPPED.read_text(encoding="utf-8"))["versions"] == versions()


def find_page(command: str) -> dict | None:
    """
    The help of a command, if it is known.

    Args:
        command (`str`):
            The command.

    Returns:
        `dict`, *optional*: its page, see [`page_of`].
    """
    return read_pages(SHIPPED if is_shipped() else kept_file()).get(command)


def keep_page(parser: argparse.ArgumentParser) -> None:
    """Keeps the help of a command for the next time, where the package has none for the installed versions."""
    if is_shipped():
        return
    pages = {**read_pages(kept_file()), parser.prog.split()[-1]: page_of(parser)}
    with suppress(ValueError, OSError):  # a folder that cannot be written to
        write_file(kept_file(), json.dumps({"pages": pages}).encode())
