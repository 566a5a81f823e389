# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Where a training comes from, for its card: the data, the recipe, the command, the machine. Nothing here is a path of it."""

import enum
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import torch
from datasets import Dataset, DatasetInfo, IterableDataset
from peft import LoraConfig
from transformers import TrainerState
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from ..cards.facts import DataFacts
from ..machine import SECRET, public_name
from .diffusion_config import DiffusionConfig
from .model_config import ModelConfig
from .origin import dataset_id, declared_license, origin_of


# ----- the data -----


def data_facts(
    dataset: Dataset | IterableDataset | None, dataset_name: str | None, revision: str | None = None
) -> DataFacts:
    """
    What is known of a dataset: what `datasets` keeps of where it was loaded from, also after its rows were selected or changed.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            The dataset.
        dataset_name (`str`, *optional*):
            What the user calls it. Where this is a Hub id it is the name.
        revision (`str`, *optional*):
            What the user asked for; of use where the commit is not known.

    Returns:
        [`cards.facts.DataFacts`]: without a name for rows of this machine, or of several sources.
    """
    origin, given = origin_of(dataset), dataset_id(dataset_name)
    if origin is not None and given is not None and origin.name.lower() != given.lower():
        origin = None
    name = given or (origin.name if origin else None)
    commit = origin.commit if origin else (revision if given else None)
    facts = DataFacts(name=name, revision=commit)
    if name is not None:
        facts.license = declared_license(name, commit)
    if dataset is None:
        return facts
    infos = [dataset.info]
    if origin is not None and origin.folder is not None and (Path(origin.folder) / "dataset_info.json").exists():
        infos.append(DatasetInfo.from_directory(origin.folder))
    facts.license = facts.license or next((info.license.strip() for info in infos if info.license), None) or None
    configs = [info.config_name for info in infos if info.config_name not in (None, "default")]
    facts.config = configs[0] if configs and name is not None else None
    facts.split = str(dataset.split) if dataset.split is not None else (origin and origin.split)
    facts.num_rows = len(dataset) if isinstance(dataset, Dataset) else None
    return facts


# ----- the recipe -----

# What concerns the machine, the account or the trackers, and not what is trained
NOT_IN_RECIPE = {
    *(
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
    *("resume_from_checkpoint", "precompute_dir", "do_train", "do_eval", "do_predict", "save_on_each_node"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "debug", "skip_memory_metrics"),
    *("use_cpu", "local_rank", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    "include_num_input_tokens_seen",
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),  # older names of `activation_checkpointing`
}
NAMES = ("output_dir", "initial_lora", "criteria", "sample_model")  # may be a path
SECRET_OR_PLACE = ("token", "use_auth_token", "cache_dir", "local_files_only", "proxies", "force_download")
FLAGS_OF_MODEL = {"revision": "model_revision", "variant": "variant", "config": "single_file_config", "vae": "vae"}


def recipe_of(
    args: DiffusionConfig,
    base: str | None,
    base_revision: str | None,
    is_lora: bool,
    lora_config: LoraConfig | None,
    data: DataFacts,
    expert: str | None,
) -> dict[str, Any]:
    """
    The training as the keys of the YAML file that its command takes with `--config`.

    Args:
        args ([`DiffusionConfig`]):
            The configuration. What differs from its defaults is said, and the precision, which a machine decides.
        base (`str`, *optional*):
            Hub id of the base, or its folder or file.
        base_revision (`str`, *optional*):
            Commit of the base.
        is_lora (`bool`):
            Whether a LoRA is trained.
        lora_config ([`~peft.LoraConfig`], *optional*):
            The LoRA.
        data ([`cards.facts.DataFacts`]):
            The data.
        expert (`str`, *optional*):
            Of CPO, the expert's Hub id, folder or file.

    Returns:
        `dict[str, Any]`: what YAML can hold. Of a path of this machine it has the last part.
    """
    model_flags, model_init_kwargs = model_settings(args.model_init_kwargs or {})
    recipe = {
        "model_name_or_path": public_name(base),
        **model_flags,
        "expert": public_name(expert),
        "dataset_name": data.name,
        "dataset_config": data.config,
        "dataset_revision": data.revision if data.name else None,
        "dataset_train_split": data.split if data.split != "train" and is_flag_value(data.split) else None,
        "num_processes": args.world_size if args.world_size > 1 else None,
    }
    if base_revision is not None:
        recipe["model_revision"] = base_revision
    recipe = {name: value for name, value in recipe.items() if value is not None}
    recipe |= lora_settings(is_lora, lora_config, args.initial_lora is not None)
    if model_init_kwargs:
        recipe["model_init_kwargs"] = model_init_kwargs
    return recipe | training_settings(args)


def training_settings(args: DiffusionConfig) -> dict[str, Any]:
    """The trainer's own settings, and of all others those that differ from their defaults."""
    usual = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(args)
    }
    # What `None` becomes. No second configuration is made, which would reset the state of the processes
    usual |= {"activation_checkpointing": True, "accelerator_config": {}}
    usual["num_inference_steps"] = 25 if args.sample_model is None else None
    owners = [name for kind in type(args).__mro__ for name in kind.__dict__.get("__annotations__", ())]
    own, settings = type(args).__dict__["__annotations__"], {}
    for name in sorted(usual.keys() - NOT_IN_RECIPE - {"model_init_kwargs"}, key=owners.index):
        value = plain(getattr(args, name))
        if name == "accelerator_config":
            value = accelerator_settings(args.accelerator_config)
        if name in ("bf16", "fp16"):  # or of `accelerate launch`
            value = args.half_dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        is_own = name in own and name != "mask_examples" and value is not None
        if is_own or name == "bf16" or value != plain(usual[name]):
            settings[name] = public_name(value) if name in NAMES else value
    return settings


def accelerator_settings(config: AcceleratorConfig) -> dict[str, Any]:
    """Those of accelerate's settings that differ from its defaults; two are set by the trainer."""
    usual = AcceleratorConfig().to_dict()
    set_here = ("non_blocking", "dispatch_batches")
    return {name: x for name, x in config.to_dict().items() if x != usual[name] and name not in set_here}


def model_settings(model_init_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that say how the base is loaded, and the arguments that have no flag."""
    known = public_settings(model_init_kwargs)
    flags = {flag: known.pop(name) for name, flag in FLAGS_OF_MODEL.items() if isinstance(known.get(name), str)}
    choices = [{"load_in_8bit": True}, {"load_in_4bit": True}]
    choices += [{"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}]
    choices += [choice | {"use_bnb_nested_quant": True} for choice in choices[1:]]
    for choice in choices:
        if known.get("quantization_config") == ModelConfig(**choice).quantization_config:
            flags |= choice
            del known["quantization_config"]
            break
    return flags, known


def lora_settings(is_lora: bool, config: LoraConfig | None, has_initial_lora: bool) -> dict[str, Any]:
    """The flags of the LoRA. One that starts at another LoRA has that one's settings, unless it has dropout."""
    if not is_lora or config is None or (has_initial_lora and not config.lora_dropout):
        return {} if has_initial_lora else {"use_peft": is_lora}
    modules = config.target_modules
    values = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": modules if modules is None or isinstance(modules, str) else sorted(modules),
        "use_rslora": config.use_rslora,
    }
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    return {"use_peft": True} | {name: value for name, value in values.items() if value != defaults[name]}


def is_flag_value(split: str | None) -> bool:
    """Whether a split is one, and no part such as `train[:10%]`."""
    return split is not None and re.fullmatch(r"\w+(\.\w+)*", split) is not None


def plain(value: Any) -> Any:
    """As YAML holds it: enumerations by value, types of weights by name."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, Path) else value


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings without tokens, folders, objects that no file holds, and what only the machine's cache needs."""
    known = {name: value for name, value in plain(settings).items() if name.lower() not in SECRET_OR_PLACE}
    held = (dict, list, bool, int, float, str, type(None))
    return {name: public_value(value) for name, value in known.items() if isinstance(value, held)}


def public_value(value: Any) -> Any:
    if isinstance(value, dict):
        return public_settings(value)
    if isinstance(value, list):
        return [public_value(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


# ----- the command -----

LEFT_OUT_FLAGS = ("hub_token", "token")
TEXT_FLAGS = ("sample_prompts", "attribute_separator")


def command_line(script: str) -> str | None:
    """
    The command that is running, as others can repeat it.

    Args:
        script (`str`):
            The command of the trainer, such as `"instance-dpo"`.

    Returns:
        `str` or `None`: without tokens, with the last part of each path, and with the number of processes. `None` unless this
        process runs that command.
    """
    flags = flags_of(script, sys.argv)
    if flags is None:
        return None
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    words = ["trl-diffusion", script]
    if num_processes > 1 and not any(flag.partition("=")[0] == "--num_processes" for flag in flags):
        words += ["--num_processes", str(num_processes)]
    return shlex.join([*words, *public_flags(flags)])


def flags_of(script: str, argv: list[str]) -> list[str] | None:
    """The flags of a process that runs a command, by the script's file or by the command's name."""
    if not argv or not argv[0]:
        return None
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    program = Path(argv[0]).resolve()
    file = scripts / f"{script.replace('-', '_')}.py"
    if program.suffix == ".py" and program.is_file() and program.read_bytes() == file.read_bytes():
        return argv[1:]  # a copy too, as `uv run` makes of a link
    if program.stem == "trl-diffusion" or program == scripts.parent / "__main__.py":
        return argv[2:] if argv[1:2] == [script] else None
    return None


def public_flags(flags: list[str]) -> list[str]:
    """Flags without tokens and folders."""
    kept, name = [], ""
    for flag in flags:
        if flag.startswith("--"):
            option, has_value, value = flag.partition("=")
            name = option.lstrip("-").replace("-", "_")
            word = f"{option}={public_word(value, name)}" if has_value else flag
        else:
            word = public_word(flag, name)
        if name not in LEFT_OUT_FLAGS:
            kept.append(word)
    return kept


def public_word(value: str, flag: str) -> str:
    """A flag's value: a text as it is, the names in JSON and any other as [`machine.public_name`] has them."""
    if flag in TEXT_FLAGS:
        return SECRET.sub("***", value)
    if value.startswith("{"):
        try:
            return json.dumps(public_value(json.loads(value)))
        except json.JSONDecodeError:
            return "{}"
    return public_name(value)


# ----- trackers, machine, time -----

LOCAL_HOSTS = ("localhost", "0.0.0.0", "::1")
_known_addresses: dict[str, str] = {}  # of the run that is going on, or ended last in this process


def tracker_urls(report_to: Iterable[str]) -> dict[str, str]:
    """
    The public addresses of the run.

    Args:
        report_to (`list[str]`):
            The trackers.

    Returns:
        `dict[str, str]`: by the tracker's name. A tracker without an address, such as an offline run, is not in it. What was
        found while the run was going on stays known after it.
    """
    found = {}
    if "wandb" in report_to:
        import wandb

        found["wandb"] = wandb.run and wandb.run.url
    if "trackio" in report_to:
        found["trackio"] = get_trackio_space_url()
    if "comet_ml" in report_to:
        found["comet"] = get_comet_experiment_url()
    public = {name: public_address(url, keeps_query=name == "trackio") for name, url in found.items() if url}
    _known_addresses.update({name: url for name, url in public.items() if url})
    return {name: _known_addresses[name] for name in found if name in _known_addresses}


def forget_trackers() -> None:
    """Forgets the addresses of an earlier run in this process."""
    _known_addresses.clear()


def public_address(url: str, keeps_query: bool = False) -> str | None:
    """An address that others can open, without credentials; `None` for one of this machine or its network."""
    parts = urlsplit(str(url))
    host = parts.hostname or ""
    is_number = re.fullmatch(r"[\d.]+|.*:.*", host) is not None
    if parts.scheme not in ("http", "https") or host in LOCAL_HOSTS or is_number or "." not in host:
        return None
    if host.endswith((".local", ".localhost", ".internal", ".lan")):
        return None
    port = f":{parts.port}" if parts.port else ""
    query = f"?{quote(parts.query, safe='=&%')}" if keeps_query and parts.query else ""
    return f"{parts.scheme}://{host}{port}{quote(parts.path, safe='/%@:')}{query}"


def hardware(args: DiffusionConfig) -> str:
    """What a training runs on, such as `"2 x NVIDIA H100 80GB HBM3"` or `"CPU"`."""
    kind = args.device.type
    name = torch.cuda.get_device_name(args.device) if kind == "cuda" else kind.upper()
    return f"{args.world_size} x {name}" if args.world_size > 1 and kind != "cpu" else name


SECONDS = "RunCallback"  # under which a state keeps the time, among those of callbacks


def training_seconds(state: TrainerState) -> float | None:
    """How long a training took so far: the steps and what comes between them, of all runs that it was resumed in."""
    kept = state.stateful_callbacks.get(SECONDS)
    return kept["attributes"]["seconds"] if kept else None
