# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs a script through `accelerate launch`, on one or several devices."""

from types import ModuleType

from accelerate.commands.launch import launch_command, launch_command_parser
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument


def launch(script: ModuleType, parser: TrlParser, flags: list[str]) -> None:
    """
    Launches a script. Flags that the script does not know, from the command line or from its YAML file, are given to
    `accelerate launch`. `--accelerate_config` takes a file, or the name of a configuration that comes with TRL.

    Args:
        script (`ModuleType`):
            The script.
        parser ([`~trl.TrlParser`]):
            Its parser.
        flags (`list[str]`):
            The flags.
    """
    *_, from_config, from_flags = parser.parse_args_and_config(
        flags, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_flags = resolve_accelerate_config_argument(from_config + from_flags)
    unknown = iter([*from_flags, None])  # in the order of `flags`
    next_unknown, script_flags = next(unknown), []
    for flag in flags:
        if flag == next_unknown:
            next_unknown = next(unknown)
        else:
            script_flags.append(flag)
    # --quiet: a script that fails prints its own error; a traceback of the launcher would hide it
    launch_command(launch_command_parser().parse_args(["--quiet", *launch_flags, script.__file__, *script_flags]))
