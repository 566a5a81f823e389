# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs a script through `accelerate launch`, on one or several devices."""

import argparse
import logging
import subprocess
from types import ModuleType

from accelerate.commands.launch import launch_command, launch_command_parser

from .accelerate_config import check_is_supported, read_launch_config, resolve_accelerate_config
from .parser import CommandParser
from .stopping import Stop, blocked


def launch(script: ModuleType, parser: CommandParser, flags: list[str], stop: Stop) -> int:
    """
    Launches a script. Flags of `accelerate launch`, from the command line or from the YAML file, are given to it.
    `--accelerate_config` takes a file, or the name of a configuration that comes with this package.

    Args:
        script (`ModuleType`):
            The script.
        parser ([`CommandParser`]):
            Its parser.
        flags (`list[str]`):
            The flags.
        stop ([`Stop`]):
            The request to end.

    Returns:
        `int`: the exit status, that of the script.

    Raises:
        `ValueError`: If a flag is wrong.
    """
    *_, from_config, from_flags = parser.parse_args_and_config(
        flags, return_remaining_strings=True, separate_remaining_strings=True
    )
    args = launcher_arguments([*from_config, *from_flags], script.__file__, without(flags, from_flags))
    with blocked():
        status = run(args)
    return status if stop.number is None else stop.status


def without(flags: list[str], others: list[str]) -> list[str]:
    """The flags but for others, which are in the same order among them."""
    rest, others = [], iter([*others, None])
    other = next(others)
    for flag in flags:
        if flag == other:
            other = next(others)
        else:
            rest.append(flag)
    return rest


def launcher_arguments(launcher_flags: list[str], script: str, flags: list[str]) -> argparse.Namespace:
    """
    The launcher's arguments. Several processes on a machine without a GPU are started as several, where the launcher alone
    would start one and say nothing.

    Args:
        launcher_flags (`list[str]`):
            Its flags.
        script (`str`):
            The file to run.
        flags (`list[str]`):
            The flags of the script.

    Returns:
        `argparse.Namespace`

    Raises:
        `ValueError`: If something stands there that belongs to no flag, if several processes are asked for that the launcher
            would not start, or if the trainers would refuse what is asked for.
    """
    args = launch_command_parser().parse_args([*resolve_accelerate_config(launcher_flags), script, *flags])
    if args.training_script != script:
        raise ValueError(f"`{args.training_script}` stands behind no flag.")
    config = read_launch_config(args)
    check_is_supported(args, config)
    kind, num_processes = None, args.num_processes or 1
    if config is not None:
        kind = config.distributed_type
        if kind == "MULTI_CPU":  # a configuration for one device may name any number
            num_processes = args.num_processes or config.num_processes
        if config.use_cpu:  # of which the launcher tells one process, and not several
            args.training_script_args = ["--use_cpu", "true", *args.training_script_args]
    if num_processes > 1 and kind in (None, "NO", "MULTI_CPU") and not (args.tpu or args.mpirun_hostfile):
        if args.cpu:
            raise ValueError(
                f"With `--cpu` the launcher starts one process, not the {num_processes} of `--num_processes`: leave `--cpu` out; "
                "`--use_cpu` keeps the processes on the CPU."
            )
        args.multi_gpu = True
    args.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are handled here
    return args


def run(args: argparse.Namespace) -> int:
    """Runs `accelerate launch`, and returns the status of the script. What it printed is all that there is to say."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    else:
        return 0
    return 128 - status if status < 0 else status  # a signal, as a shell says it
