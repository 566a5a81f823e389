# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Encoding images and prompts once, before the training."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import TrainingArguments

from ..backbones.base import Backbone
from ..data.buckets import TRAINING_SIZE
from ..data.caching import TensorCache, precompute_dataset
from ..data.collators import ImageCollator
from ..data.column_checks import repeated
from ..data.formats import each_dataset
from ..data.hashing import hash_of
from .diffusion_config import DiffusionConfig
from .encoding import BatchEncoder
from .fingerprints import tokenizer_fingerprint
from .prompt_list import PromptsOf, kept_prompts, list_prompts


logger = get_logger(__name__)

FORMAT_VERSION = 3  # of the files; another one is another file


def text_fingerprint(encoder: BatchEncoder) -> str:
    """
    A hash of how prompts are encoded: of the tokenizers and the text encoders.

    Args:
        encoder ([`trainer.encoding.BatchEncoder`]):
            Encodes prompts.

    Returns:
        `str`
    """
    backbone = encoder.backbone
    encoders = [encoder.fingerprint(name) for name in backbone.text_encoder_names]
    settings = *(tokenizer_fingerprints(backbone), backbone.max_sequence_length, encoders), *backbone.text_settings
    return Hasher.hash(settings)


def tokenizer_fingerprints(backbone: Backbone) -> list[str]:
    """The [`trainer.fingerprints.tokenizer_fingerprint`] of each tokenizer of a pipeline."""
    return [tokenizer_fingerprint(getattr(backbone.pipeline, name)) for name in backbone.tokenizer_names]


@dataclasses.dataclass
class Precomputation:
    """
    Encodes datasets into Arrow files, or finds them there.

    Args:
        encoder ([`trainer.encoding.BatchEncoder`]):
            Encodes images and prompts.
        collator ([`data.collators.ImageCollator`]):
            Prepares rows.
        batch_size (`int`):
            Number of rows that are encoded at once.
        folder (`str`, *optional*):
            Folder of the files. Defaults to one in the cache of `datasets`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            What the moments of images are stored in.
    """

    encoder: BatchEncoder
    collator: ImageCollator
    batch_size: int
    folder: str | None = None
    dtype: torch.dtype = torch.float32
    image_datasets: list[Dataset] = dataclasses.field(default_factory=list)  # results of `images`

    @classmethod
    def for_training(cls, encoder: BatchEncoder, collator: ImageCollator, args: DiffusionConfig) -> "Precomputation":
        """As a configuration says."""
        dtype = getattr(torch, args.precompute_dtype)
        return cls(encoder, collator, args.per_device_eval_batch_size, args.precompute_dir, dtype)

    def datasets(
        self,
        train_dataset: Dataset | IterableDataset | None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
        prompts_of: PromptsOf | None,
        prompt_settings: Any = None,
    ) -> tuple[Dataset | None, Dataset | dict[str, Dataset] | None]:
        """
        Encodes the images and prompts of a training, which the encoder then looks up, and takes the encoders off the device.

        Args:
            train_dataset ([`~datasets.Dataset`], *optional*):
                The rows to train on.
            eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*):
                The rows to evaluate on.
            prompts_of (`Callable`, *optional*):
                From a row to its prompts, see [`~Precomputation.prompts`]. If `None`, prompts are not known beforehand, and the
                text encoders stay.
            prompt_settings (*optional*):
                See [`~Precomputation.prompts`].

        Returns:
            `tuple`: both datasets with encoded images.

        Raises:
            `ValueError`: See [`~Precomputation.images`].
        """
        train_dataset = each_dataset(train_dataset, "train_dataset", self.images)
        eval_dataset = each_dataset(eval_dataset, "eval_dataset", self.images)
        if prompts_of is not None and self.image_datasets:
            self.encoder.prompt_cache = self.prompts(prompts_of, prompt_settings)
        backbone = self.encoder.backbone
        backbone.offload(backbone.encoder_names if prompts_of is not None else ("vae",))
        return train_dataset, eval_dataset

    def images(self, dataset: Dataset | IterableDataset, name: str) -> Dataset:
        """
        Encodes the images of a dataset to the moments of the VAE's posterior.

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows.
            name (`str`):
                What the user calls the dataset, for messages.

        Returns:
            [`~datasets.Dataset`]: the rows as the collator prepares them, with moments in place of pixels.

        Raises:
            `ValueError`: If the dataset is a stream, if two rows have one id, or if the disk has too little space.
        """
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`{name}` is a stream, which cannot be precomputed. Load it without `streaming=True`, or train without "
                "`precompute`."
            )
        if dataset.format["type"] == "custom":  # a transform of the user gives the ids
            number = len(dataset) - len(set(map(str, dataset["id"])))
        else:
            number, _ = repeated(dataset, "id")
        if number:
            raise ValueError(
                f"`{name}` has {len(dataset):,} rows with only {len(dataset) - number:,} different ids, and what is precomputed "
                "is found by its id. Give each row its own, or remove the column `id`: rows are then numbered."
            )
        collator = self.collator
        is_random = collator.random_flip or not collator.center_crop
        preparation = collator if is_random else dataclasses.replace(collator, seed=0)

        def encode(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
            for column in collator.image_columns:
                pixel_values = [example.pop(f"{column}_pixel_values") for example in examples]
                for example, pixels in zip(examples, pixel_values, strict=True):
                    example[TRAINING_SIZE] = list(pixels.shape[1:])  # one for all columns
                for size in {pixels.shape for pixels in pixel_values}:
                    places = [place for place, pixels in enumerate(pixel_values) if pixels.shape == size]
                    batch = torch.stack([pixel_values[place] for place in places]).to(self.encoder.device)
                    moments = (moment.to(self.dtype) for moment in self.encoder.encode_images(batch))
                    for place, mean, std in zip(places, *moments, strict=True):
                        examples[place] |= {f"{column}_latents_mean": mean, f"{column}_latents_std": std}
            return examples

        in_half = [] if self.dtype == torch.float32 else [str(self.dtype)]
        features = {"id": Value("string"), "prompt": Value("string"), TRAINING_SIZE: List(Value("int32"))}
        encoded = self._precompute(
            dataset,
            encode,
            features | collator.text_features,
            f"images of {name}",
            (dataset._fingerprint, preparation, self.encoder.fingerprint("vae"), *in_half),
            collator.prepare,
        )
        self.image_datasets.append(encoded)
        return encoded

    def prompts(self, prompts_of: PromptsOf, settings: Any = None) -> TensorCache:
        """
        Encodes the prompts of the datasets whose images were encoded, each once, and stores padded sequences at their own length.

        Args:
            prompts_of (`Callable`):
                From a row to its prompts; `None` is the unconditional branch.
            settings (*optional*):
                What the prompts follow from besides the rows and the tokenizers, where they take long to make: they are then kept
                in a file.

        Returns:
            [`data.caching.TensorCache`]: text conditions by prompt.
        """
        backbone = self.encoder.backbone

        def encode(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            conditions = self.encoder.encode_prompts([row["prompt"] for row in rows])
            examples = [{name: value[place] for name, value in conditions.items()} for place in range(len(rows))]
            for name in backbone.padded_conditions:
                for example in examples:
                    example[name] = example[name][: int(example["prompt_lengths"])]
            return [row | example for row, example in zip(rows, examples, strict=True)]

        given = self.image_datasets, ["prompt", *self.collator.text_features], prompts_of
        if settings is None:
            prompts = list_prompts(*given)
        else:
            rows = [dataset._fingerprint for dataset in self.image_datasets]
            key = Hasher.hash((rows, settings, tokenizer_fingerprints(backbone), backbone.max_sequence_length))
            prompts = kept_prompts(self._folder / f"list-of-prompts-{key}.arrow", *given)
        features = Features({"prompt": Value("string")})
        rows = Dataset(pa.table({"prompt": prompts.cast(pa.string())}))
        fingerprint = Hasher.hash((hash_of(prompts), text_fingerprint(self.encoder)))
        return TensorCache(self._precompute(rows, encode, features, "prompts", fingerprint), "prompt")

    def by_id(
        self,
        dataset: Dataset,
        encode: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
        name: str,
        depends_on: Any,
    ) -> TensorCache:
        """
        Computes tensors for the rows of a precomputed dataset.

        Args:
            dataset ([`~datasets.Dataset`]):
                A result of [`~Precomputation.images`].
            encode (`Callable`):
                From a batch of the collator to tensors by name, whose first dimension is that of the batch.
            name (`str`):
                What is computed, for messages.
            depends_on (`Any`):
                What the result depends on besides the rows.

        Returns:
            [`data.caching.TensorCache`]: the tensors by id.
        """

        def encode_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            tensors = encode(self.collator(rows))
            return [
                {"id": row["id"]} | {name: value[place] for name, value in tensors.items()}
                for place, row in enumerate(rows)
            ]

        features, dependencies = {"id": Value("string")}, (dataset._fingerprint, depends_on)
        return TensorCache(self._precompute(dataset, encode_rows, features, name, dependencies), "id")

    def by_epoch(
        self,
        dataset: Dataset,
        epochs: int,
        encode: Callable[[dict[str, Any], int], dict[str, torch.Tensor]],
        depends_on: Any,
    ) -> list[TensorCache]:
        """
        Computes tensors for the rows of a precomputed dataset, anew for each epoch.

        Args:
            dataset ([`~datasets.Dataset`]):
                A result of [`~Precomputation.images`].
            epochs (`int`):
                Number of epochs.
            encode (`Callable`):
                From a batch of the collator and the epoch to tensors by name, whose first dimension is that of the batch.
            depends_on (`Any`):
                What the result depends on besides the rows.

        Returns:
            `list[TensorCache]`: for each epoch, the tensors by id.
        """
        names = [f"noised rows of epoch {epoch + 1}" for epoch in range(epochs)]
        return [
            self.by_id(dataset, partial(encode, epoch=epoch), name, (depends_on, epoch))
            for epoch, name in enumerate(names)
        ]

    @property
    def _folder(self) -> Path:
        return Path(self.folder or Path(datasets.config.HF_DATASETS_CACHE) / "trl_diffusion")

    def _precompute(
        self, dataset: Dataset, encode: Callable, features: dict, name: str, depends_on: Any, prepare: Callable = dict
    ) -> Dataset:
        state, precision = PartialState(), {torch.bfloat16: "bf16", torch.float16: "fp16"}
        fingerprint = Hasher.hash((FORMAT_VERSION, precision.get(self.encoder.half_dtype, "no"), depends_on))
        return precompute_dataset(
            dataset,
            encode,
            Features(features),
            name,
            fingerprint,
            self._folder,
            self.batch_size if is_of_one_size(dataset) else 1,
            state.process_index,
            state.num_processes,
            state.wait_for_everyone,
            state.print,
            prepare,
        )


def is_of_one_size(dataset: Dataset) -> bool:
    """Whether a batch may hold any rows. Rows that are precomputed already may have several sizes, of which a batch holds one."""
    if TRAINING_SIZE not in dataset.column_names:
        return True
    sides = pc.list_flatten(dataset.data.column(TRAINING_SIZE)).to_numpy().reshape(-1, 2)
    return bool((sides == sides[0]).all())


def num_epochs(rows: int, args: TrainingArguments) -> int:
    """The number of epochs that a training on so many rows begins."""
    batches = rows / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps = math.ceil(batches / args.gradient_accumulation_steps)
    return math.ceil(args.max_steps / max(1, steps)) if args.max_steps > 0 else math.ceil(args.num_train_epochs)


def noising_settings(args: DiffusionConfig, encoder: BatchEncoder) -> tuple:
    """What noised rows depend on besides the rows, the epoch and the denoisers."""
    backbone = encoder.backbone
    return (
        *(backbone.process.describe(), backbone.settings, args.seed, args.prompt_dropout, args.size_conditions),
        *(args.noise_source, args.inversion_steps, args.inversion_eta, text_fingerprint(encoder)),
    )


def warn_of_unused_rows(dataset: Dataset | IterableDataset | None, args: TrainingArguments) -> None:
    """Warns of a training that visits only some of the rows that are precomputed for it."""
    used = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(dataset, Dataset) and 0 < used < len(dataset):
        logger.warning(
            f"The {args.max_steps} steps of this training use {used:,} of the {len(dataset):,} rows of `train_dataset`, and "
            "all of them are precomputed. Pass only the rows that are needed: "
            f"`dataset.shuffle(seed=0).select(range({used}))`."
        )
