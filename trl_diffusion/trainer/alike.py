# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Machines that train together are each started by hand and have files of their own: what is not alike is refused, in all processes,
before it trains something else or waits for ever.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from ..data.formats import each_dataset
from ..nodes import different, has_nodes, is_shared
from .fingerprints import tensors_hash, tokenizer_fingerprint
from .run_record import dataset_fingerprint, library_versions, settings_of


# Settings that do not bear on the weights, but on what the processes do together
TOGETHER = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "use_cpu"),
    *("logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay"),
    *("eval_on_start", "save_strategy", "save_steps", "save_only_model", "save_on_each_node", "precompute"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "push_to_hub", "hub_strategy"),
)
# What the entries of a run's record mean
MODELS = {
    "objective": "the trainer",
    "base": "the weights of `model`",
    "process": "the noise schedule of `model`",
    "reference": "the weights of the reference",
    "quantization": "the precision of `model`",
    "lora": "the settings of the LoRA",
    "expert": "the weights of `expert`",
    "initial_lora": "the weights of `initial_lora`",
    "criteria": "the tree of `criteria`",
}


def check_alike(described: dict[str, Any]) -> None:
    """
    Compares what all processes do.

    Args:
        described (`dict[str, Any]`):
            What this process does. A name in backquotes is that of a setting, whose values are said.

    Raises:
        `ValueError`: In all processes, if it is not the same in all of them.
    """
    found = different(described)
    if not found:
        return
    process = min(process for process, *_ in found.values())
    parts = [
        f"{name} is {first!r} and {other!r}" if name.startswith("`") else f"{name} differ"
        for name, (at, first, other) in found.items()
        if at == process
    ]
    raise ValueError(
        f"Process {process} does not train what process 0 trains: {'; '.join(parts)}. Start the same command with the "
        "same files and versions on every machine."
    )


def check_data_alike(
    args: TrainingArguments,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    columns: Iterable[str],
) -> None:
    """
    Checks that machines which train together have the same settings, versions and rows.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The settings.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            The rows to train on.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            The rows to evaluate on.
        columns (`Iterable[str]`):
            The columns that are trained on.

    Raises:
        `ValueError`: In all processes, if they do not.
    """
    if not has_nodes():
        return
    described = {f"`{name}`": value for name, value in settings_of(args).items()}
    described |= {f"`{name}`": getattr(args, name) for name in TOGETHER}
    described |= {f"the version of {name}": version for name, version in library_versions().items()}

    def add(dataset: Dataset | IterableDataset, name: str) -> None:
        is_stream = isinstance(dataset, IterableDataset)
        described[f"the rows of `{name}`"] = "stream" if is_stream else dataset_fingerprint(dataset, columns)

    each_dataset(train_dataset, "train_dataset", add)
    each_dataset(eval_dataset, "eval_dataset", add)
    check_alike(described)


def check_models_alike(trainer: Trainer) -> None:
    """
    Checks that machines which train together have the same models, and that what is saved can be read again.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, before its first step.

    Raises:
        `ValueError`: In all processes, if they do not, or where checkpoints would be written by several or not be found.
    """
    if not has_nodes():
        return
    backbone, encoder = trainer.backbone, trainer.encoder
    described = {what: trainer.run_record[name] for name, what in MODELS.items()}
    described |= {f"the weights of `{name}`": encoder.fingerprint(name) for name in backbone.encoder_names}
    for name in backbone.tokenizer_names:
        described[f"the rules of `{name}`"] = tokenizer_fingerprint(getattr(backbone.pipeline, name))
    check_alike(described)
    check_output_folder(trainer.args)


def check_output_folder(args: TrainingArguments) -> None:
    """Raises a `ValueError` where several machines would write the same checkpoint, or one would look for that of another."""
    folder = Path(args.output_dir).resolve()
    is_common = is_shared(folder)
    if is_common and args.save_on_each_node:
        raise ValueError(
            f"`save_on_each_node=True`, and all machines see the same {folder}, where each would write the same files. Leave it out."
        )
    if not is_common and args.load_best_model_at_end and not args.save_on_each_node:
        raise ValueError(
            f"`load_best_model_at_end=True`, and the machines do not see the same {folder}: only the first one would have the best "
            "checkpoint. Set `save_on_each_node=True` (`--save_on_each_node`), or put `output_dir` on a disk that all have."
        )


def check_weights_alike(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """
    Checks that machines which train together resume the same checkpoint.

    Args:
        folder (`Path`):
            The checkpoint, as this process calls it.
        weights (`dict[str, torch.Tensor]`):
            What this process has read there.

    Raises:
        `ValueError`: In all processes, if they do not.
    """
    if has_nodes():
        check_alike({"`resume_from_checkpoint`": folder.name, "the weights of the checkpoint": tensors_hash(weights)})
