# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The console entry. A command's imports happen only when that command runs."""

import argparse
import difflib
import os
import sys
from importlib import import_module
from types import ModuleType

from .. import __version__
from ..machine import without_secrets


# Each command is a script in `trl_diffusion/scripts/` that can also be run alone, see `script_of`.
COMMANDS = {
    "instance-dpo": "Train with instance-aware preference optimization (IAPO), or with Diffusion-DPO",
    "attribute-sft": "Train the expert of complex preference optimization (CPO) on images with attributes",
    "complex-po": "Train with complex preference optimization (CPO), with the help of an expert or without one",
    "ddspo": "Train with direct diffusion score preference optimization (DDSPO), with degraded prompts",
    "annotate-instances": "Find the instances that both images of a pair show, and judge which image shows each of them better (IAPO)",
    "annotate-attributes": "Find which attributes of a tree of criteria each image has (CPO)",
    "evaluate": "Generate images with several models from the same prompts and noise, and score the images",
    "model-card": "Write the model card of a training again, with an evaluation in it, and push it",
    "check-dataset": "Read every row of a dataset as a trainer does, and say all that is wrong with it and what it holds",
    "export-lora": "Write a LoRA with the names that ComfyUI and A1111 read",
    "show-masks": "Draw the instance masks of a dataset over its images",
    "show-criteria": "Print a tree of criteria, and draw it as a picture",
    "quickstart": "Train IAPO and CPO on two small worlds and compare them with other methods, in minutes on a CPU",
    "env": "Print the environment information",
}
# These run through `accelerate launch`, which gets the flags that the script does not know.
LAUNCHED_COMMANDS = ("instance-dpo", "attribute-sft", "complex-po", "ddspo", "evaluate")
SHELLS = ("bash", "zsh", "fish")
COMPLETION = "Print a script that completes commands and flags in bash, zsh or fish"


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
        `int`: the exit status: 0, 2 after a mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        return run_command(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        return 0
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def run_command(argv: list[str]) -> int:
    """Runs a command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="trl-diffusion",
        description="Preference alignment for text-to-image diffusion models. `trl-diffusion COMMAND --help` lists the "
        "flags of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-diffusion {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False, allow_abbrev=False)
    completion = commands.add_parser("completion", help=COMPLETION, description=f"{COMPLETION}.")
    completion.add_argument("shell", choices=SHELLS)
    command, rest = known_command(argv, parser)
    if command is None:
        parser.parse_args(rest)
        parser.print_help()
        return 0

    if command == "completion":
        if rest not in ([shell] for shell in (*SHELLS, "-h", "--help")):
            parser.exit(2, f"trl-diffusion completion: error: name one shell: {', '.join(SHELLS)}\n")
        from .completion import completion_script

        shell = parser.parse_args(argv).shell
        print(completion_script(shell, {**COMMANDS, "completion": COMPLETION}), end="")
        return 0

    if rest in (["-h"], ["--help"]):
        from .help import find_page, parser_for

        if page := find_page(command):
            parser_for(f"trl-diffusion {command}", page).print_help()
            parser.exit()

    from .script import run_launched, run_script

    if command in LAUNCHED_COMMANDS and "LOCAL_RANK" not in os.environ:  # that a launcher, such as `torchrun`, has set
        return run_launched(command, lambda: script_of(command), rest)
    return run_script(command, lambda: script_of(command), rest)


def known_command(argv: list[str], parser: argparse.ArgumentParser) -> tuple[str | None, list[str]]:
    """The command and its flags. Without a command, all flags."""
    if not argv or argv[0].startswith("-"):
        return None, argv
    known = (*COMMANDS, "completion")
    if argv[0] not in known:
        close = difflib.get_close_matches(argv[0].replace("_", "-"), known, n=1)
        suggestion = f"; did you mean `{close[0]}`?" if close else ""
        parser.exit(
            2, f"trl-diffusion: error: `{without_secrets(argv[0])}` is no command{suggestion} (`--help` lists them)\n"
        )
    return argv[0], argv[1:]
