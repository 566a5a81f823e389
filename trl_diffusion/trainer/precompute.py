# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Encoding images and prompts once, before the training."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from peft import PeftModel
from transformers import PreTrainedConfig

from ..data.caching import TENSORS, TensorTable, precompute_dataset


if TYPE_CHECKING:
    from .diffusion_trainer import DiffusionTrainer

logger = get_logger(__name__)

FORMAT_VERSION = 1  # of the files; another one is another file
NO_MATTER = {"transformers_version", "architectures", "dtype", "torch_dtype"}  # in configurations
NUM_FINGERPRINTS = 16
TRAINING_SIZE = "_training_size"  # the column of a row's height and width in pixels


def module_fingerprint(module: torch.nn.Module) -> str:
    """
    A hash by which to tell a model from others: of its configuration, its tensors' names, types and shapes, and some of
    their elements. Adapters of peft do not count, nor where the model came from.

    Args:
        module (`torch.nn.Module`):
            A model of diffusers or transformers, or of peft on top of one.

    Returns:
        `str`
    """
    config = module.get_base_model().config if isinstance(module, PeftModel) else module.config
    config = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    config = {name: value for name, value in config.items() if not name.startswith("_") and name not in NO_MATTER}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in module.state_dict().items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "lora_" not in name:
            some = weight.detach().flatten()[:: max(1, weight.numel() // NUM_FINGERPRINTS)]
            digest.update(repr((name, str(weight.dtype), tuple(weight.shape), some.tolist())).encode())
    return digest.hexdigest()


def text_fingerprint(trainer: "DiffusionTrainer", prompts: list[str]) -> str:
    """
    A hash of how some prompts are encoded: of their tokens and of the text encoders.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        prompts (`list[str]`):
            The prompts.

    Returns:
        `str`
    """
    pipeline, backbone = trainer.backbone.pipeline, trainer.backbone
    tokens = [
        getattr(pipeline, name)(prompts, padding="max_length", truncation=True).input_ids
        for name in backbone.tokenizer_names
    ]
    encoders = [module_fingerprint(getattr(pipeline, name)) for name in backbone.encoder_names if name != "vae"]
    return Hasher.hash((prompts, tokens, encoders))


def precompute_datasets(trainer: "DiffusionTrainer") -> None:
    """
    Encodes the images and prompts of a trainer's datasets, puts the results in their place, and takes the encoders off the
    accelerator.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, changed in place.

    Raises:
        `ValueError`: If a dataset is a stream or has an id twice, or if the disk has not the room.
    """
    if trainer.train_dataset is not None:
        _warn_of_unused_rows(trainer)
        trainer.train_dataset = precompute_images(trainer, trainer.train_dataset, "train_dataset")
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {
            name: precompute_images(trainer, split, f"eval_dataset {name}")
            for name, split in trainer.eval_dataset.items()
        }
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = precompute_images(trainer, trainer.eval_dataset, "eval_dataset")
    splits = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    rows = [dataset for dataset in (trainer.train_dataset, *splits) if dataset is not None]
    if trainer.has_fixed_prompts and rows:
        trainer.prompt_table = precompute_prompts(trainer, rows)
        trainer.backbone.offload(trainer.backbone.encoder_names)
    else:
        trainer.backbone.offload(("vae",))


def _warn_of_unused_rows(trainer: "DiffusionTrainer") -> None:
    args, dataset = trainer.args, trainer.train_dataset
    used = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(dataset, Dataset) and 0 < used < len(dataset):
        logger.warning(
            f"The {args.max_steps} steps of this training use {used:,} of the {len(dataset):,} rows of `train_dataset`, and "
            f"all of them are precomputed. Pass those rows only: `dataset.shuffle(seed=0).select(range({used}))`."
        )


def precompute_images(trainer: "DiffusionTrainer", dataset: Dataset | IterableDataset, name: str) -> Dataset:
    """
    Encodes the images of a dataset to the moments of the VAE's posterior.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        dataset ([`~datasets.Dataset`]):
            Its dataset.
        name (`str`):
            What the user calls it, for messages.

    Returns:
        [`~datasets.Dataset`]: the rows as the collator prepares them, with moments in place of pixels.

    Raises:
        `ValueError`: If the dataset is a stream, or two rows have one id.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`{name}` is a stream, of which nothing can be precomputed. Load it without `streaming=True`, or train "
            "without `precompute`."
        )
    ids = [str(row_id) for row_id in dataset["id"]]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"`{name}` has {len(ids):,} rows with only {len(set(ids)):,} different ids, and what is precomputed is found by "
            "its id. Give each row its own, or remove the column `id`: rows are then numbered."
        )
    collator = trainer.data_collator
    is_drawn = collator.random_flip or not collator.center_crop
    preparation = collator if is_drawn else dataclasses.replace(collator, seed=0)  # the seed draws crops and flips

    def encode(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor() as threads:
            examples = list(threads.map(collator.prepare, rows))
        for column in collator.image_columns:
            pixel_values = [example.pop(f"{column}_pixel_values") for example in examples]
            for example, pixels in zip(examples, pixel_values, strict=True):
                example[TRAINING_SIZE] = list(pixels.shape[1:])  # one for all columns
            for size in {pixels.shape for pixels in pixel_values}:
                places = [place for place, pixels in enumerate(pixel_values) if pixels.shape == size]
                batch = torch.stack([pixel_values[place] for place in places]).to(trainer.accelerator.device)
                for place, mean, std in zip(places, *trainer.encode_images(batch), strict=True):
                    examples[place] |= {f"{column}_latents_mean": mean, f"{column}_latents_std": std}
        return examples

    return _precompute(
        trainer,
        dataset,
        encode,
        {
            "id": Value("string"),
            "prompt": Value("string"),
            **{column: List(Value("string")) for column in trainer.columns if column.endswith("_attributes")},
            TRAINING_SIZE: List(Value("int32")),
        },
        f"images of {name}",
        (dataset._fingerprint, preparation, module_fingerprint(trainer.backbone.pipeline.vae)),
    )


def precompute_prompts(trainer: "DiffusionTrainer", rows: list[Dataset]) -> TensorTable:
    """
    Encodes every prompt that the trainer will ask for, each once.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        rows (`list[Dataset]`):
            What [`trainer.precompute.precompute_images`] returned for its datasets.

    Returns:
        [`data.caching.TensorTable`]: text conditions by prompt.
    """
    prompts = {}
    for dataset in rows:
        for row in dataset.remove_columns(TENSORS):
            prompts.update(dict.fromkeys(trainer.prompts_of(row)))

    def encode(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        conditions = trainer.encode_prompts([row["prompt"] for row in rows])
        return [row | {name: value[place] for name, value in conditions.items()} for place, row in enumerate(rows)]

    prompts = sorted(prompts)
    dataset = _precompute(
        trainer,
        Dataset.from_dict({"prompt": prompts}),
        encode,
        {"prompt": Value("string")},
        "prompts",
        text_fingerprint(trainer, prompts),
    )
    return TensorTable(dataset, "prompt")


def precompute_by_id(trainer: "DiffusionTrainer", dataset: Dataset, encode, name: str, depends_on: Any) -> TensorTable:
    """
    Computes tensors for the rows of a precomputed dataset.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        dataset ([`~datasets.Dataset`]):
            What [`trainer.precompute.precompute_images`] returned.
        encode (`Callable`):
            From a batch on the trainer's device to tensors whose first dimension is that of the batch, by name.
        name (`str`):
            What is computed, for messages.
        depends_on (`Any`):
            What the result depends on besides the rows.

    Returns:
        [`data.caching.TensorTable`]: the tensors by id.
    """

    def encode_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        tensors = encode(batch)
        return [
            {"id": row["id"]} | {name: value[place] for name, value in tensors.items()}
            for place, row in enumerate(rows)
        ]

    dependencies = (dataset._fingerprint, depends_on)
    return TensorTable(_precompute(trainer, dataset, encode_rows, {"id": Value("string")}, name, dependencies), "id")


def _precompute(trainer: "DiffusionTrainer", dataset, encode, features, name: str, depends_on: Any) -> Dataset:
    args, accelerator = trainer.args, trainer.accelerator
    folder = Path(args.precompute_dir or Path(datasets.config.HF_DATASETS_CACHE) / "trl_diffusion")
    fingerprint = Hasher.hash((FORMAT_VERSION, accelerator.mixed_precision, depends_on))
    dataset = precompute_dataset(
        dataset,
        encode,
        Features(features),
        name,
        fingerprint,
        folder,
        # A batch holds rows of one size
        1 if args.aspect_ratio_buckets and TENSORS in dataset.column_names else args.per_device_eval_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
        accelerator.print,
    )
    dataset._fingerprint = fingerprint
    return dataset
