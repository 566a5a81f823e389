# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The flags of a command and its YAML file: unknown and mistyped ones are errors, and the help is in groups."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import os
import sys
import typing
from collections.abc import Iterable
from typing import Any

from trl import TrlParser

from ..machine import without_secrets
from ..messages import CONTROL
from .accelerate_config import NAMES
from .config_file import read_config
from .help import HelpFormatter, keep_page


# Titles of the groups of flags in the help, by the class that defines a flag. All others are the command's own.
GROUPS = {
    "ScriptArguments": "dataset",
    "DatasetArguments": "dataset",
    "ModelConfig": "model",
    "VLMArguments": "vision-language model",
    "DetectorArguments": "detector",
    "AnnotationArguments": "dataset and run",
    "DiffusionConfig": "diffusion training",
    "_BaseConfig": "training loop (transformers)",
    "TrainingArguments": "training loop (transformers)",
}
OWN = "flags of this command"
JSON_FLAGS = ("columns", "vlm_request")  # JSON on the command line, a mapping in a file
LORA = "LoRA"
LORA_PREFIXES = ("use_peft", "lora_", "use_rslora")
ORDER = (OWN, "dataset", "dataset and run", "model", LORA, "vision-language model", "detector", "diffusion training")
LAUNCHER = (
    "Flags of `accelerate launch` are accepted too, such as --num_processes; see `accelerate launch --help`. "
    f"--accelerate_config takes a file for it, or one of {', '.join(NAMES)}."
)


class CommandParser(TrlParser):
    """
    Parser of a command, of its flags and of the YAML file that `--config` names. Flags and keys that nothing knows are errors,
    abbreviations too, and so is a value in the file that the flag would not take.

    Args:
        dataclass_types (`Iterable[type]`, *optional*):
            The dataclasses whose fields are the flags.
        prog (`str`, *optional*):
            Name of the command.
        description (`str`, *optional*):
            What the command does.
        is_launched (`bool`, *optional*, defaults to `False`):
            Whether `accelerate launch` runs the command, so that its flags are known too.
    """

    def __init__(
        self,
        dataclass_types: Iterable[type] = (),
        prog: str | None = None,
        description: str | None = None,
        is_launched: bool = False,
    ):
        self.is_launched = is_launched
        self.hints: dict[str, Any] = {}  # the type of each field
        self.titled: dict[str, Any] = {}
        self.has_file = False
        super().__init__(
            dataclass_types,
            prog=prog,
            usage="%(prog)s [flags]",
            description=description,
            epilog=LAUNCHER if is_launched else None,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        # Read before the other flags, and so never a value here
        self.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with flags; those given win."
        )

    def _add_dataclass_arguments(self, dtype: type) -> None:
        if not self.titled:
            self.titled = {title: self.add_argument_group(title) for title in (*ORDER, GROUPS["TrainingArguments"])}
        self.dtype = dtype
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        self.hints[field.name] = field.type
        super()._parse_dataclass_field(self.titled[group_of(self.dtype, field.name)], field)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {without_secrets(message)} (`--help` lists the flags)\n")

    def print_help(self, file=None) -> None:
        super().print_help(file)
        if not self.has_file:  # whose values are the defaults then
            keep_page(self)

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple:
        """
        Parses flags and the YAML file, as [`~trl.TrlParser`] does.

        Args:
            args (`Iterable[str]`, *optional*):
                The flags. Defaults to those of the process.
            return_remaining_strings (`bool`, *optional*, defaults to `False`):
                Return the launcher's flags too.
            fail_with_unknown_args (`bool`, *optional*, defaults to `True`):
                Without effect: what neither the command nor its launcher knows is always an error.
            separate_remaining_strings (`bool`, *optional*, defaults to `False`):
                Return the launcher's flags of the file and those of the command line separately.

        Returns:
            `tuple`: the dataclasses, and the launcher's flags if asked for.

        Raises:
            `ValueError`: If the file cannot be read, or if a flag, a key or a value is wrong.
        """
        flags, path = self._take_config(list(sys.argv[1:] if args is None else args))
        self.has_file = path is not None
        from_config = [] if path is None else self._set_defaults(read_config(path), path)
        from_flags = self.parse_known_args(flags)[1]
        self._check_unknown(from_flags)
        parsed = self.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)[:-1]
        if not return_remaining_strings:
            return parsed
        return (
            (*parsed, from_config, from_flags) if separate_remaining_strings else (*parsed, from_config + from_flags)
        )

    def _take_config(self, flags: list[str]) -> tuple[list[str], str | None]:
        """The flags without `--config`, and its file."""
        own, paths, rest = [], [], iter(flags)
        for flag in rest:
            if flag == "--config":
                paths.append(next(rest, None))
            elif flag.startswith("--config="):
                paths.append(flag.partition("=")[2])
            else:
                own.append(flag)
        if len(paths) > 1:
            raise ValueError("`--config` is given twice; a run has one file.")
        if paths and (not paths[0] or paths[0].startswith("--")):
            raise ValueError("`--config` is given without a file: name the YAML file behind it.")
        return own, paths[0] if paths else None

    def _set_defaults(self, config: dict[str, Any], path: str) -> list[str]:
        """Makes the values of a file the defaults. Returns its flags for the launcher."""
        environment = config.pop("env", None) or {}
        if not isinstance(environment, dict) or not all(map(is_variable, environment.items())):
            raise ValueError(f"`env` in {path} must hold names and values of environment variables.")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        launcher_flags = []
        for key, value in config.items():
            if key not in self.hints:
                launcher_flags += self._launcher_flags(key, value, path)
                continue
            actions = [action for action in self._actions if action.dest == key]
            value = self._value(actions[0], value, path)
            for action in actions:
                action.default, action.required = value, False
        return launcher_flags

    def _value(self, action: argparse.Action, value: Any, path: str) -> Any:
        """A value of a file as the flag would give it."""
        hint, name = self.hints[action.dest], f"`{action.dest}` in {path}"
        kinds = [getattr(kind, "__origin__", kind) for kind in (typing.get_args(hint) or (hint,))]
        if value is None:
            if type(None) not in kinds:
                raise ValueError(f"{name} has no value: give it one, or take the line out.")
            return None
        if isinstance(value, dict | list) and action.nargs != "+":
            if type(value) not in kinds and not (isinstance(value, dict) and action.dest in JSON_FLAGS):
                what = "a mapping" if isinstance(value, dict) else "a list"
                raise ValueError(f"{name} is {what}; it takes one value.")
            return value
        try:
            if action.nargs == "+":
                values = value if isinstance(value, list) else [value]
                return [self._scalar(action, item) for item in values]
            return self._scalar(action, value)
        except argparse.ArgumentError as error:
            raise ValueError(f"{name}: {error.message}.") from None

    def _scalar(self, action: argparse.Action, value: Any) -> Any:
        is_number = type(value) in (int, float) and math.isfinite(value)
        if action.type in (int, float) and is_number and action.type(value) == value:
            return value  # as it is written: the card says it so
        # YAML reads `no` as a boolean, and 1e-4 as a string: a flag's text says which it is
        text = {True: "true", False: "no"}[value] if isinstance(value, bool) else str(value)
        value = self._get_value(action, text)
        self._check_value(action, value)
        return value

    def _launcher_flags(self, key: Any, value: Any, path: str) -> list[str]:
        """A key of a file that the command does not know, as flags of the launcher."""
        flag = f"--{key}"
        if not self.is_launched or flag not in launcher_options():
            raise ValueError(f"`{key}` in {path} is no setting of `{self.prog}`{self._suggestion(flag, '')}")
        if isinstance(value, bool) and launcher_options()[flag].nargs == 0:
            return [flag] if value else []
        return [flag, str(value)]

    def _check_unknown(self, flags: list[str]) -> None:
        """Refuses flags that the launcher does not know either."""
        for flag in flags:
            name = flag.partition("=")[0]
            if flag.startswith("-") and not (self.is_launched and name in launcher_options()):
                raise ValueError(f"`{name}` is no flag of `{self.prog}`{self._suggestion(name, '--')}")
        if flags and not flags[0].startswith("-"):
            raise ValueError(f"`{flags[0]}` stands behind no flag of `{self.prog}`.")

    def _suggestion(self, flag: str, prefix: str) -> str:
        known = [option for option in self._option_string_actions if "-" not in option.lstrip("-")]
        known += launcher_options() if self.is_launched else []
        close = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, n=1)
        return f"; did you mean `{prefix}{close[0].lstrip('-')}`?" if close else "."


def is_variable(item: tuple[Any, Any]) -> bool:
    """Whether a name and a value can be those of an environment variable."""
    name, value = map(str, item)
    return name != "" and "=" not in name and not CONTROL.search(name + value)


def group_of(dtype: type, name: str) -> str:
    """The title under which the help shows a field: that of the class which defines it last."""
    owner = next(parent for parent in dtype.__mro__ if name in inspect.get_annotations(parent))
    if owner.__name__ == "ModelConfig" and name.startswith(LORA_PREFIXES):
        return LORA
    return GROUPS.get(owner.__name__, OWN)


@functools.cache
def launcher_options() -> dict[str, argparse.Action]:
    """The flags of `accelerate launch`, and the one that names its configuration."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.add_argument("--accelerate_config")
    return parser._option_string_actions
