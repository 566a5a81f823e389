# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The console entry: one line a command, and whatever a command needs is imported when it runs."""

import argparse
import sys
from importlib import import_module
from types import ModuleType


# Each is a script in `trl_diffusion/scripts/` that can also be run alone, see `script_of`.
COMMANDS = {
    "instance-dpo": "Train with instance-aware preference optimization (IAPO), or with Diffusion-DPO",
    "attribute-sft": "Train the expert of complex preference optimization (CPO) on images with attributes",
    "complex-po": "Train with complex preference optimization (CPO), asking an expert",
    "annotate-instances": "Find the instances that the images of a pair share, and judge which image draws each better (IAPO)",
    "annotate-attributes": "Find the attributes of a tree of criteria that each image has (CPO)",
    "evaluate": "Draw the same prompts with several models, from the same noise, and score what they draw",
    "show-masks": "Draw the instance masks of a dataset over its images",
    "show-criteria": "Print a tree of criteria, and draw it",
    "quickstart": "Train IAPO and CPO on two embedded worlds and compare them with what they improve on, in minutes on a CPU",
    "env": "Print the environment information",
}
# These run through `accelerate launch`, which takes the flags that the script does not know.
LAUNCHED_COMMANDS = ("instance-dpo", "attribute-sft", "complex-po", "evaluate")


def script_of(command: str) -> ModuleType:
    """The script of a command."""
    # As `evaluate.py` it would hide the package of that name from itself
    name = "evaluate_models" if command == "evaluate" else command.replace("-", "_")
    return import_module(f"..scripts.{name}", package=__package__)


def main(argv: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`list[str]`, *optional*):
            The command and its flags. Defaults to the process's.

    Returns:
        `int`: the exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="trl-diffusion",
        description="Preference alignment for text-to-image diffusion models. `trl-diffusion COMMAND --help` lists a "
        "command's flags.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    command = parser.parse_known_args(argv)[0].command
    if command is None:
        parser.print_help()
        return 0

    flags = argv[argv.index(command) + 1 :]
    script = script_of(command)
    script_parser = script.make_parser(prog=f"trl-diffusion {command}")
    try:
        if command in LAUNCHED_COMMANDS:
            from .launch import launch

            launch(script, script_parser, flags)
        else:
            script.main(*script_parser.parse_args_and_config(flags))
    except ValueError as error:  # a mistake of the user's, see design law 8: no traceback
        print(f"trl-diffusion {command}: error: {error}", file=sys.stderr)
        return 2
    return 0
