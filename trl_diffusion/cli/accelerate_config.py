# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The configurations of `accelerate launch`: those that come with the package, by their names, and one's own files."""

import argparse
import difflib
import os
from importlib.resources import files
from pathlib import Path


FOLDER = Path(__file__).parents[1] / "accelerate_configs"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
SUPPORTED = ("FSDP", "DEEPSPEED")


def resolve_accelerate_config(flags: list[str]) -> list[str]:
    """
    Replaces `--accelerate_config` by the launcher's `--config_file`. Of several the last one counts, so that the command line
    wins over a YAML file.

    Args:
        flags (`list[str]`):
            Flags of the launcher.

    Returns:
        `list[str]`: the flags that the launcher knows.

    Raises:
        `ValueError`: If it names neither a configuration of this package or of TRL's nor a file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--accelerate_config", "--accelerate-config")
    try:
        args, others = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ValueError(
            f"`--accelerate_config` is given without a value: name a file, or one of {', '.join(NAMES)}."
        ) from error
    return (
        others if args.accelerate_config is None else ["--config_file", find_config(args.accelerate_config), *others]
    )


def find_config(name: str) -> str:
    """The file of a configuration: of this package, one's own, or of TRL's."""
    if name in NAMES:
        return str(FOLDER / f"{name}.yaml")
    theirs = files("trl.accelerate_configs") / f"{name}.yaml"  # for other shards, which is then said
    for file in (Path(name), theirs):
        if file.is_file():
            return str(file)
    close = difflib.get_close_matches(name.replace("-", "_").removesuffix(".yaml"), NAMES, n=1)
    suggestion = f"; did you mean `{close[0]}`?" if close else "."
    raise ValueError(
        f"`--accelerate_config` {name} is neither a file nor one of {', '.join(NAMES)}, which come with this package{suggestion}"
    )


def read_launch_config(args: argparse.Namespace):
    """
    Reads what the launcher will read: the file that is named, or the one that `accelerate config` wrote.

    Args:
        args (`argparse.Namespace`):
            The launcher's arguments.

    Returns:
        `accelerate.commands.config.config_args.ClusterConfig` or `None`.

    Raises:
        `ValueError`: If the file is no configuration.
    """
    import yaml
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if args.config_file is None and (args.cpu or not os.path.isfile(default_config_file)):
        return None
    file = args.config_file or default_config_file
    try:
        return load_config_from_file(args.config_file)
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{file} is no configuration of `accelerate launch`: {reason}.") from error


def check_is_supported(args: argparse.Namespace, config) -> None:
    """
    Refuses, before a process is launched, what the trainers would refuse in each.

    Args:
        args (`argparse.Namespace`):
            The launcher's arguments.
        config (`ClusterConfig`, *optional*):
            Its configuration.

    Raises:
        `ValueError`: If the weights would be cut over devices in a way that is not supported, or are not cut as is asked, or nobody
            knows where the first of several machines is.
    """
    flags = {"FSDP": args.use_fsdp, "DEEPSPEED": args.use_deepspeed, "MEGATRON_LM": args.use_megatron_lm}
    kind = config.distributed_type if config is not None else None
    sharded = [name for name in SHARDED if flags[name] or kind == name]
    if sharded and sharded[0] not in SUPPORTED:
        raise ValueError(
            f"Sharded training ({sharded[0]}) is not supported: what is saved would not be what diffusers loads. Use "
            "`--accelerate_config fsdp2`, or `multi_gpu`, which copies the model to each GPU."
        )
    if "FSDP" in sharded:
        _check_fsdp(args, config)
    if "DEEPSPEED" in sharded:
        _check_deepspeed(args, config)
    if sharded and Path(args.training_script).stem == "evaluate_models":
        raise ValueError(
            f"{sharded[0]} is asked for, and an evaluation shards nothing: each process has a whole model. Use "
            "`--accelerate_config multi_gpu`."
        )
    machines = args.num_machines or (config.num_machines if config is not None else 1)
    address = args.main_process_ip or (config.main_process_ip if config is not None else None)
    if machines > 1 and address is None:
        raise ValueError(
            f"`--main_process_ip` is missing: with {machines} machines, give all of them the address of the first, and the others "
            "`--machine_rank` 1 and so on."
        )


def _check_fsdp(args: argparse.Namespace, config) -> None:
    own = (config.fsdp_config if config is not None else None) or {}
    if str(own.get("fsdp_version", args.fsdp_version)) != "2":
        raise ValueError(
            "FSDP version 1 is not supported: what is saved would not be what diffusers loads. Use `--accelerate_config fsdp2`, or set "
            "`fsdp_version: 2` (`--fsdp_version 2`)."
        )
    if args.cpu or (config is not None and config.use_cpu):
        raise ValueError(
            "FSDP is asked for on the CPU, where nothing would be sharded. Leave it out: `--accelerate_config multi_cpu` starts two "
            "processes there."
        )


def _check_deepspeed(args: argparse.Namespace, config) -> None:
    from transformers.integrations.deepspeed import is_deepspeed_available

    own = (config.deepspeed_config if config is not None else None) or {}
    file = own.get("deepspeed_config_file", args.deepspeed_config_file)  # which the trainer checks
    stage = own.get("zero_stage", args.zero_stage) or 2
    if file is None and str(stage) not in ("2", "3"):
        raise ValueError(
            f"DeepSpeed's ZeRO-{stage} is not supported: what is saved would not be what diffusers loads. Use `--accelerate_config zero2` "
            "or `zero3`."
        )
    if not is_deepspeed_available():
        raise ValueError("DeepSpeed is not installed. Install it with `pip install 'trl-diffusion[deepspeed]'`.")
