# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a training run is, written beside each checkpoint, so that a resumed run can be compared with the stopped one."""

import dataclasses
import enum
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, Image, IterableDataset
from peft import LoraConfig
from transformers import TrainingArguments

from ..data.column_checks import MASKS, without_masks
from ..data.hashing import update_hash
from ..data.row_contents import load_image, load_masks
from ..files import write_file
from .fingerprints import same_base, same_quantized_base, tensors_hash


logger = logging.getLogger(__name__)

RUN_RECORD_NAME = "run_record.json"
NUM_HASHED_IMAGES = 64
HASH_VERSION = "3:"  # of the hash of rows

# Settings that do not bear on the weights of a run. All others are compared, those that a later version adds included.
NO_MATTER = {
    # Where things are written, and how they are called
    *("output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *(
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
    *("resume_from_checkpoint", "precompute_dir", "do_train", "do_eval", "do_predict"),
    # Logging and samples
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "debug", "skip_memory_metrics"),
    *("include_num_input_tokens_seen", "sample_prompts", "sample_steps", "num_inference_steps", "guidance_scale"),
    *("sample_model", "mask_examples"),
    # Evaluation
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "prediction_loss_only"),
    *("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    # Checkpoints
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("restore_callback_states_from_checkpoint",),
    # How the same numbers are computed: devices, memory, speed
    *("use_cpu", "local_rank", "torch_compile", "torch_compile_backend", "torch_compile_mode", "channels_last"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_empty_cache_steps", "use_cache"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_liger_kernel", "liger_kernel_config"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("average_tokens_across_devices", "precompute", "offload_encoders"),
    # Refused, or without use, where a denoiser is trained
    *("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "remove_unused_columns", "label_names"),
    *("length_column_name", "neftune_noise_alpha"),
    # Compared in another form: as rows per optimizer step, and by content
    *("per_device_train_batch_size", "gradient_accumulation_steps", "accelerator_config"),
    *("model_init_kwargs", "criteria", "initial_lora"),
}
# The same for a LoRA
LORA_NO_MATTER = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "runtime_config"),
}
# Settings of a LoRA under which its weights mean the same, but are trained otherwise
LORA_CHANGES = {"lora_dropout", "init_lora_weights"}
# With these the learning rate of a step does not depend on how many follow
ENDLESS_SCHEDULES = {"constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"}

MEANING = {
    "objective": "the trainer",
    "process": "the noise schedule, or what the model predicts,",
    "criteria": "the tree of attributes that `criteria` names",
    "expert": "`expert`",
}


# ----- describing -----


def describe_run(
    args: TrainingArguments,
    objective: str,
    base: list[float],
    process: dict[str, Any],
    lora: LoraConfig | None = None,
    dataset: Dataset | IterableDataset | None = None,
    columns: Iterable[str] = (),
    reference: list[float] | None = None,
    quantization: dict[str, str] | None = None,
    expert: dict[str, torch.Tensor] | None = None,
    initial_lora: dict[str, torch.Tensor] | None = None,
    criteria: dict[str, list[str]] | None = None,
    resolved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Describes a run, without a word about the machine that it runs on.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Its settings. All that are not in `NO_MATTER` are recorded.
        objective (`str`):
            Name of the trainer's class.
        base (`list[float]`):
            [`trainer.fingerprints.base_fingerprint`] of the denoiser before the training.
        process (`dict[str, Any]`):
            Description of the model's [`process.Process`].
        lora ([`~peft.LoraConfig`], *optional*):
            The LoRA that is trained, with its target modules; all weights if left out.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            The training rows.
        columns (`Iterable[str]`, *optional*, defaults to `()`):
            The columns that are trained on.
        reference (`list[float]`, *optional*):
            `base_fingerprint` of the reference's denoiser; left out where it is the policy before training.
        quantization (`dict[str, str]`, *optional*):
            How those components are quantised that are.
        expert (`dict[str, torch.Tensor]`, *optional*):
            Weights of the expert's LoRA.
        initial_lora (`dict[str, torch.Tensor]`, *optional*):
            Weights of the LoRA that the training started at.
        criteria (`dict[str, list[str]]`, *optional*):
            The attributes' ids with their forms.
        resolved (`dict[str, Any]`, *optional*):
            Settings that `args` leaves to a default of the model, as they are trained with, such as `resolution` and
            `timestep_range`.

    Returns:
        `dict[str, Any]`: what JSON can hold.
    """
    return {
        "objective": objective,
        "base": base,
        "process": _hash(_rounded(process)),
        "lora": None if lora is None else describe_lora(lora),
        "reference": "the policy before training" if reference is None else reference,
        "quantization": quantization or {},
        "expert": None if expert is None else tensors_hash(expert),
        "initial_lora": None if initial_lora is None else tensors_hash(initial_lora),
        "criteria": None if criteria is None else _hash(list(criteria.items())),
        "dataset": dataset_fingerprint(dataset, columns) if isinstance(dataset, Dataset) else "stream",
        "num_rows": len(dataset) if isinstance(dataset, Dataset) else "stream",
        **_rows(args, lora),
        "settings": settings_of(args) | _plain(resolved or {}),
        "versions": library_versions(),
    }


def describe_lora(config: LoraConfig) -> dict[str, Any]:
    """
    Describes a LoRA's settings.

    Args:
        config ([`~peft.LoraConfig`]):
            The settings, with target modules.

    Returns:
        `dict[str, Any]`: what JSON can hold.
    """
    described = {name: value for name, value in config.to_dict().items() if name not in LORA_NO_MATTER}
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        if isinstance(described[name], list | tuple):
            described[name] = set(described[name])  # their order has no meaning
        elif isinstance(described[name], int):
            described[name] = {described[name]}
    for name in ("rank_pattern", "alpha_pattern"):
        described[name] = described[name] or {}
    return _plain(described)


def dataset_fingerprint(dataset: Dataset, columns: Iterable[str]) -> str:
    """
    A hash of the rows of a dataset in their order: of all that is neither an image nor a mask, and of the images and masks of about 64
    rows.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        columns (`Iterable[str]`):
            The columns that are trained on; of these, those that the dataset has.

    Returns:
        `str`: the same for the same rows, wherever their files lie.
    """
    digest = hashlib.blake2b(digest_size=16)
    columns = sorted(set(columns) & set(dataset.column_names))
    images = [name for name in columns if isinstance(dataset.features[name], Image)]
    others = [name for name in columns if name not in images]
    digest.update(repr((len(dataset), images, others)).encode())
    for name in others:
        column = without_masks(dataset.data.column(name))
        if pa.types.is_string(column.type):
            column = column.cast(pa.large_string())  # of which a row can be taken in any order, however many there are
        if dataset._indices is not None:
            column = column.take(dataset._indices.column(0))
        update_hash(digest, column)
    read = images + [name for name in others if name == "instances"]
    if read:
        some = dataset.select_columns(read).select(range(0, len(dataset), max(1, len(dataset) // NUM_HASHED_IMAGES)))
        for row in some.with_format("arrow").iter(1):
            for name in images:
                digest.update(load_image(row[name][0].as_py() or {})["bytes"] or b"")
            for content in mask_contents(row["instances"][0].as_py()) if "instances" in read else ():
                digest.update(content)
    return HASH_VERSION + digest.hexdigest()


def mask_contents(instances: Any) -> Iterator[bytes]:
    """The files of the masks of a row, and its run-length encodings."""
    instances = load_masks(instances)
    for instance in instances if isinstance(instances, list) else ():
        for mask in (instance[name] for name in MASKS if isinstance(instance, dict) and instance.get(name)):
            yield repr(mask).encode() if "counts" in mask else mask["bytes"] or b""


def library_versions() -> dict[str, str]:
    """
    Versions of the libraries on which the numbers of a training depend.

    Returns:
        `dict[str, str]`: without what tells the build, such as `+cpu`.
    """
    names = ("trl-diffusion", "torch", "diffusers", "peft", "transformers", "accelerate", "datasets")
    return {name: _version(name) for name in names}


@cache  # each look-up parses the package's whole description
def _version(name: str) -> str:
    return version(name).split("+")[0]


def _rows(args: TrainingArguments, lora: LoraConfig | None) -> dict[str, int | None]:
    split = getattr(getattr(args, "accelerator_config", None), "split_batches", False)
    per_forward = args.train_batch_size // (args.world_size if split else 1)
    # Noise is keyed by row, so that only rows per step matter; but a bucket gives whole batches, and dropout is drawn for them
    has_dropout = lora is not None and lora.lora_dropout > 0
    matters = getattr(args, "aspect_ratio_buckets", False) or has_dropout
    return {
        "rows_per_step": per_forward * args.world_size * args.gradient_accumulation_steps,
        "rows_per_forward": per_forward if matters else None,
        "processes": args.world_size if has_dropout else None,  # each draws its own
    }


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """The settings that bear on the weights of a run, as JSON holds them."""
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    settings = {name: value for name, value in settings.items() if name not in NO_MATTER}
    if settings.get("data_seed") is None:
        settings["data_seed"] = args.seed
    settings["use_seedable_sampler"] = getattr(args.accelerator_config, "use_seedable_sampler", None)
    return _plain(settings)


def _plain(value: Any) -> Any:
    """As JSON holds it: sets sorted, tuples as lists, enumerations by value."""
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=repr)
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(type(value).__name__)


def _rounded(value: Any) -> Any:
    """With five digits, which do not depend on how a schedule was computed."""
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return f"{value:.5g}" if isinstance(value, float) else value


def _hash(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


# ----- writing and reading -----


def write_run_record(folder: str | Path, record: dict[str, Any]) -> None:
    """
    Writes a record as `run_record.json`.

    Args:
        folder (`str` or `Path`):
            The checkpoint's folder.
        record (`dict[str, Any]`):
            See [`trainer.run_record.describe_run`].
    """
    write_file(Path(folder) / RUN_RECORD_NAME, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def read_run_record(folder: str | Path) -> dict[str, Any] | None:
    """
    Reads the record of a checkpoint.

    Args:
        folder (`str` or `Path`):
            The checkpoint's folder.

    Returns:
        `dict[str, Any]` or `None`: `None` where there is none, as in checkpoints of older versions.

    Raises:
        `ValueError`: If it cannot be read.
    """
    path = Path(folder) / RUN_RECORD_NAME
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"The record of the run, {path}, cannot be read: {error}. Resume another checkpoint, or delete the file to resume "
            "this one without a comparison."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"The record of the run, {path}, is none. Delete it to resume without a comparison.")
    return record


# ----- comparing -----


def compare_runs(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """
    Compares two runs.

    Args:
        before (`dict[str, Any]`):
            Record of the run that was stopped.
        now (`dict[str, Any]`):
            The same of the run that resumes it.

    Returns:
        `tuple[list[str], list[str]]`: *errors*, because of which the checkpoint's weights would mean something else, and
        *changes*, which make it another run. A line each; both are empty for the same run.
    """
    errors, changes = [], []
    for name, what in MEANING.items():
        was, is_ = before.get(name), now.get(name)
        if was != is_:
            readable = name == "objective"
            errors.append(f"{what} was {was} and is {is_}" if readable else f"{what} is another one")
    quantization = _changed_quantization(before.get("quantization", {}), now.get("quantization", {}))
    changes += quantization
    _compare_bases(before.get("base", []), now.get("base", []), bool(quantization), errors, changes)
    lora_errors, lora_changes = compare_loras(before.get("lora"), now.get("lora"))
    errors += lora_errors
    changes += lora_changes
    changes += _changed_settings(*_without_the_end(before.get("settings", {}), now.get("settings", {})))
    if not _same_reference(before.get("reference"), now.get("reference")):
        changes.append("the reference (`ref_model`) is another one")
    if before.get("initial_lora") != now.get("initial_lora"):
        changes.append("the LoRA that the training started at (`initial_lora`) is another one")
    for name, what in (
        ("rows_per_step", "rows per optimizer step (batch size x accumulation x processes)"),
        ("rows_per_forward", "rows per batch (`per_device_train_batch_size`)"),
        ("processes", "processes (of which each draws its own dropout)"),
        ("num_rows", "rows of `train_dataset`"),
    ):
        was, is_ = before.get(name), now.get(name)
        if was != is_ and (name in ("rows_per_step", "num_rows") or None not in (was, is_)):
            changes.append(f"{what} were {was} and are {is_}")
    if before.get("num_rows") == now.get("num_rows") and not _same_rows(before.get("dataset"), now.get("dataset")):
        changes.append("`train_dataset` has other rows, or the same in another order")
    was, is_ = before.get("versions", {}), now.get("versions", {})
    changes += [f"{name} was {was[name]} and is {is_[name]}" for name in was if name in is_ and was[name] != is_[name]]
    return errors, changes


def compare_loras(before: dict[str, Any] | None, now: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """
    Compares the settings of two LoRAs.

    Args:
        before (`dict[str, Any]` or `None`):
            [`trainer.run_record.describe_lora`] of the stopped run; `None` if it trained all weights.
        now (`dict[str, Any]` or `None`):
            The same of the run that resumes it.

    Returns:
        `tuple[list[str], list[str]]`: errors and changes, as in [`trainer.run_record.compare_runs`].
    """
    if before is None or now is None:
        if before is None and now is None:
            return [], []
        kinds = ["all weights" if lora is None else "a LoRA" for lora in (before, now)]
        return [f"the run trained {kinds[0]} and now trains {kinds[1]} (`peft_config`)"], []
    # A field that the older peft did not have was at its default
    before = {**describe_lora(LoraConfig()), **before}
    errors = _changed_settings(*({k: v for k, v in x.items() if k not in LORA_CHANGES} for x in (before, now)))
    changes = _changed_settings(*({k: v for k, v in x.items() if k in LORA_CHANGES} for x in (before, now)))
    return errors, changes


def check_resumed_run(checkpoint: str | Path, now: dict[str, Any]) -> None:
    """
    Compares a run with the checkpoint that it resumes, and logs what changed.

    Args:
        checkpoint (`str` or `Path`):
            The checkpoint's folder.
        now (`dict[str, Any]`):
            The record of the run.

    Raises:
        `ValueError`: If the checkpoint's weights would mean something else.
    """
    before = read_run_record(checkpoint)
    if before is None:
        logger.warning(
            f"The checkpoint {checkpoint} holds no {RUN_RECORD_NAME}: it was made by an older version, and whether this is "
            "the run that was stopped cannot be checked."
        )
        return
    errors, changes = compare_runs(before, now)
    if errors:
        raise ValueError(
            f"The checkpoint {checkpoint} is of another run, and its weights would mean something else in this one: "
            f"{'; '.join(errors)}. Resume it with the settings that it was trained with, or start a new run in another "
            "`output_dir`."
        )
    if changes:
        logger.warning(
            f"The run that resumes {checkpoint} is not the run that was stopped, and ends on other weights: "
            f"{'; '.join(changes)}."
        )


def _changed_quantization(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """A line for each component that is held in another precision."""
    return [
        f"`{name}` was held in {before.get(name, 'full precision')} and is held in {now.get(name, 'full precision')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _compare_bases(
    before: list[float], now: list[float], is_requantized: bool, errors: list[str], changes: list[str]
) -> None:
    if is_requantized and same_quantized_base(before, now):
        return
    if not same_base(before, now):
        errors.append("`model` has other weights")
    elif not same_base(before, now, tolerance=1e-4):
        changes.append("`model` has slightly other weights: another precision, or a fine-tuned version")


def _same_reference(before: str | list[float] | None, now: str | list[float] | None) -> bool:
    if isinstance(before, list) and isinstance(now, list):
        return same_base(before, now)
    return before == now


def _same_rows(before: str | None, now: str | None) -> bool:
    """Whether two hashes are of the same rows. Those of another version of the hash say nothing."""
    return before == now or str(before).startswith(HASH_VERSION) != str(now).startswith(HASH_VERSION)


def _without_the_end(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without the training's length, where no step's learning rate depends on it."""
    both = (before, now)
    left_out = set()
    if any((settings.get("max_steps") or -1) > 0 for settings in both):
        left_out.add("num_train_epochs")  # of no effect beside it
    if all(
        settings.get("lr_scheduler_type") in ENDLESS_SCHEDULES and not 0 < (settings.get("warmup_steps") or 0) < 1
        for settings in both
    ):
        left_out |= {"max_steps", "num_train_epochs"}
    return tuple({name: value for name, value in x.items() if name not in left_out} for x in both)


def _changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that differs. One that a version of the libraries does not have counts if it is set."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        if name in before and name in now:
            if _plain(before[name]) != _plain(now[name]):
                lines.append(f"`{name}` was {before[name]!r} and is {now[name]!r}")
        elif name in now and now[name]:
            lines.append(f"`{name}` was no setting of the older version and is {now[name]!r}")
        elif name in before and before[name]:
            lines.append(f"`{name}` was {before[name]!r} and is no setting of this version")
    return lines
