# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The console entry. A command's imports happen only when that command runs."""

import argparse
import sys
from importlib import import_module
from types import ModuleType


# Each command is a script in `trl_diffusion/scripts/` that can also be run alone, see `script_of`.
COMMANDS = {
    "instance-dpo": "Train with instance-aware preference optimization (IAPO), or with Diffusion-DPO",
    "attribute-sft": "Train the expert of complex preference optimization (CPO) on images with attributes",
    "complex-po": "Train with complex preference optimization (CPO), with the help of an expert",
    "annotate-instances": "Find the instances that both images of a pair show, and judge which image shows each of them better (IAPO)",
    "annotate-attributes": "Find which attributes of a tree of criteria each image has (CPO)",
    "evaluate": "Generate images with several models from the same prompts and noise, and score the images",
    "export-lora": "Write a LoRA with the names that ComfyUI and A1111 read",
    "show-masks": "Draw the instance masks of a dataset over its images",
    "show-criteria": "Print a tree of criteria, and draw it as a picture",
    "quickstart": "Train IAPO and CPO on two small worlds and compare them with other methods, in minutes on a CPU",
    "env": "Print the environment information",
}
# These run through `accelerate launch`, which gets the flags that the script does not know.
LAUNCHED_COMMANDS = ("instance-dpo", "attribute-sft", "complex-po", "evaluate")


def script_of(command: str) -> ModuleType:
    """The script of a command."""
    # A script named `evaluate.py`, run alone, would hide the package `evaluate` from itself
    name = "evaluate_models" if command == "evaluate" else command.replace("-", "_")
    return import_module(f"..scripts.{name}", package=__package__)


def main(argv: list[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`list[str]`, *optional*):
            The command and its flags. Defaults to those of the process.

    Returns:
        `int`: the exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="trl-diffusion",
        description="Preference alignment for text-to-image diffusion models. `trl-diffusion COMMAND --help` lists the "
        "flags of a command.",
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
    except ValueError as error:  # a mistake of the user: one line, no traceback
        print(f"trl-diffusion {command}: error: {error}", file=sys.stderr)
        return 2
    return 0
