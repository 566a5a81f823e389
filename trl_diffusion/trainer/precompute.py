# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Encoding images and prompts once, before the training."""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from ..backbones.base import Backbone
from ..data.buckets import TRAINING_SIZE, training_sizes
from ..data.caching import Encoding, TensorCache, with_absent
from ..data.collators import ImageCollator
from ..data.column_checks import repeated
from ..data.encoded_files import CONTENT, keys_of
from ..data.formats import each_dataset
from ..data.hashing import hash_of
from ..data.instances import may_have_masks, packed_bytes
from ..data.row_contents import RowContents
from ..nodes import sharing
from .diffusion_config import DiffusionConfig
from .encoding import BatchEncoder
from .fingerprints import tokenizer_fingerprint
from .prompt_list import PromptsOf, kept_prompts, list_prompts, mean_tokens, text_rows
from .row_order import union


FORMAT_VERSION = 4  # of the files; another one is another file
NUM_SIZED_IMAGES = 256  # by which the space of images of many shapes is told
NUM_SIZED_PROMPTS = 2000  # the same of prompts of many lengths


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
    Encodes datasets into Arrow files, or finds them there. What is known beforehand is planned first: before the work begins, it is
    said how much there is of each kind, and that it has room together.

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

    Attributes:
        epochs (`list[np.ndarray | None]`):
            The rows that each epoch visits, see [`trainer.row_order.visited_rows`].
        train_sizes (`pa.Array`, *optional*):
            The training size of each row to train on.
        plans (`list[data.caching.Encoding]`):
            What is planned and not done, or was done last.
    """

    encoder: BatchEncoder
    collator: ImageCollator
    batch_size: int
    folder: str | None = None
    dtype: torch.dtype = torch.float32
    epochs: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    train_sizes: pa.Array | None = None
    plans: list[Encoding] = dataclasses.field(default_factory=list)

    @classmethod
    def for_training(cls, encoder: BatchEncoder, collator: ImageCollator, args: DiffusionConfig) -> "Precomputation":
        """As a configuration says."""
        dtype = getattr(torch, args.precompute_dtype)
        return cls(encoder, collator, args.per_device_eval_batch_size, args.precompute_dir, dtype)

    def datasets(
        self,
        train_dataset: Dataset | IterableDataset | None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
        visited: Callable[[Dataset], list[np.ndarray | None]],
        prompts_of: PromptsOf | None,
        prompt_settings: Any = None,
    ) -> tuple[Dataset | None, Dataset | dict[str, Dataset] | None]:
        """
        Encodes the images and prompts of a training, which the encoder then looks up, and takes the encoders off the device: of the
        rows to train on those that the training visits, and all rows to evaluate on.

        Args:
            train_dataset ([`~datasets.Dataset`], *optional*):
                The rows to train on.
            eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*):
                The rows to evaluate on.
            visited (`Callable`):
                From the training sizes of the rows to train on, as a dataset, to the rows that each epoch visits, see
                [`trainer.row_order.visited_rows`].
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
        self.plans = []
        train = None if train_dataset is None else self.visited_images(train_dataset, "train_dataset", visited)
        evaluation = each_dataset(eval_dataset, "eval_dataset", self.images)
        prompts = self.prompts(prompts_of, prompt_settings) if prompts_of is not None and self.plans else None
        if train is not None:
            train_dataset = self.with_others(train, train.run())
        eval_dataset = each_dataset(evaluation, "eval_dataset", lambda plan, _: plan.run())
        if prompts is not None:
            self.encoder.prompt_cache = TensorCache(prompts.run(), "prompt")
        backbone = self.encoder.backbone
        backbone.offload(backbone.encoder_names if prompts_of is not None else ("vae",))
        return train_dataset, eval_dataset

    def visited_images(
        self, dataset: Dataset | IterableDataset, name: str, visited: Callable[[Dataset], list[np.ndarray | None]]
    ) -> Encoding:
        """Plans [`~Precomputation.images`] for the rows that a training visits."""
        check_rows(dataset, name)
        self.train_sizes = self.sizes(dataset)
        self.epochs = visited(Dataset(pa.table({TRAINING_SIZE: self.train_sizes})))
        return self.images(dataset, name, union(self.epochs, len(dataset)))

    def sizes(self, dataset: Dataset) -> pa.Array:
        """The training size of each row of a dataset, `[height, width]` in pixels."""
        collator = self.collator
        if collator.buckets is None:
            sizes = np.full((len(dataset), 2), collator.resolution)
        else:
            sizes = training_sizes(dataset, collator.size, repr(collator.buckets), collator.image_columns)
        sizes = pa.array(sizes.reshape(-1), pa.int32())
        return pa.FixedSizeListArray.from_arrays(sizes, 2).cast(pa.list_(pa.int32()))

    def with_others(self, plan: Encoding, encoded: Dataset) -> Dataset:
        """What was encoded of a dataset, with its other rows, if there are any: to use one of these is an error."""
        if plan.rows is None:
            return encoded
        return with_absent(encoded, plan.rows, {"id": plan.all_keys, TRAINING_SIZE: self.train_sizes})

    def images(self, dataset: Dataset | IterableDataset, name: str, rows: np.ndarray | None = None) -> Encoding:
        """
        Plans to encode the images of a dataset to the moments of the VAE's posterior.

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows.
            name (`str`):
                What the user calls the dataset, for messages.
            rows (`np.ndarray`, *optional*):
                The numbers of the rows that are needed. By default all.

        Returns:
            [`data.caching.Encoding`]: from it these rows as the collator prepares them, with moments in place of pixels.

        Raises:
            `ValueError`: If the dataset is a stream, if two rows have one id, or if the disk has too little space.
        """
        check_rows(dataset, name)
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

        def more_bytes(first: dict[str, Any], missing: np.ndarray) -> float:
            if collator.buckets is None and not may_have_masks(dataset, collator.image_columns):
                return 0.0
            some = missing[:: max(1, len(missing) // NUM_SIZED_IMAGES)]
            areas, masks = np.array([space_of(dataset[row]) for row in some.tolist()]).T
            latents = sum(first[name].nbytes for name in first if "_latents_" in name)
            return (areas.mean() / areas[0] - 1) * latents + masks.mean() - masks[0]

        def space_of(row: dict[str, Any]) -> tuple[int, int]:
            size = collator.size(row)
            return math.prod(size), packed_bytes(row, collator.image_columns, size)

        contents = RowContents(dataset, collator.image_columns)
        in_half = [] if self.dtype == torch.float32 else [str(self.dtype)]
        features = {"id": Value("string"), "prompt": Value("string"), TRAINING_SIZE: List(Value("int32"))}
        return self._plan(
            dataset,
            encode,
            features | collator.text_features,
            f"images of {name}",
            (preparation, self.encoder.fingerprint("vae"), *in_half),
            rows,
            more_bytes,
            contents.of,
            collator.prepare,
            contents.load,
        )

    def prompts(self, prompts_of: PromptsOf, settings: Any = None) -> Encoding:
        """
        Plans to encode the prompts of the rows whose images are, each once, and to store padded sequences at their own length.

        Args:
            prompts_of (`Callable`):
                From a row to its prompts; `None` is the unconditional branch.
            settings (*optional*):
                What the prompts follow from besides the rows and the tokenizers, where they take long to make: they are then kept
                in a file.

        Returns:
            [`data.caching.Encoding`]: from it text conditions by prompt.
        """
        backbone, collator = self.encoder.backbone, self.collator

        def encode(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            conditions = self.encoder.encode_prompts([row["prompt"] for row in rows])
            examples = [{name: value[place] for name, value in conditions.items()} for place in range(len(rows))]
            for name in backbone.padded_conditions:
                for example in examples:
                    example[name] = example[name][: int(example["prompt_lengths"])]
            return [row | example for row, example in zip(rows, examples, strict=True)]

        if collator.text_features:
            given = ["id", "prompt", *collator.text_features], lambda row: prompts_of(collator.texts(row))
        else:
            given = ["prompt"], prompts_of
        texts = [text_rows(plan.dataset, plan.rows, given[0], collator.texts) for plan in self.plans]
        if settings is None:
            prompts = list_prompts(texts, *given)
        else:
            rows = [hash_of(pa.chunked_array([plan.found])) for plan in self.plans]
            key = Hasher.hash((rows, settings, tokenizer_fingerprints(backbone), backbone.max_sequence_length))
            prompts = kept_prompts(self._folder / f"list-of-prompts-{key}.arrow", texts, *given)

        def more_bytes(first: dict[str, Any], missing: np.ndarray) -> float:
            each = sum(first[name].nbytes / max(1, len(first[name])) for name in backbone.padded_conditions)
            some = prompts.take(pa.array(missing[:: max(1, len(missing) // NUM_SIZED_PROMPTS)])).to_pylist()
            return each * (mean_tokens(backbone, some) - mean_tokens(backbone, some[:1])) if each else 0.0

        rows, numbers = Dataset(pa.table({"prompt": prompts.cast(pa.string())})), np.arange(len(prompts))
        features = Features({"prompt": Value("string")})
        contents, fingerprint = RowContents(rows, ()), text_fingerprint(self.encoder)
        return self._plan(rows, encode, features, "prompts", fingerprint, numbers, more_bytes, contents.of)

    def by_id(
        self,
        dataset: Dataset,
        encode: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
        name: str,
        depends_on: Any,
        rows: np.ndarray | None = None,
    ) -> Encoding:
        """
        Plans to compute tensors for the rows of a precomputed dataset.

        Args:
            dataset ([`~datasets.Dataset`]):
                A result of [`~Precomputation.images`].
            encode (`Callable`):
                From a batch of the collator to tensors by name, whose first dimension is that of the batch.
            name (`str`):
                What is computed, for messages.
            depends_on (`Any`):
                What the result depends on besides the rows.
            rows (`np.ndarray`, *optional*):
                The numbers of the rows that are needed. By default all.

        Returns:
            [`data.caching.Encoding`]: from it the tensors by id.
        """

        def encode_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            tensors = encode(self.collator(rows))
            return [
                {"id": row["id"]} | {name: value[place] for name, value in tensors.items()}
                for place, row in enumerate(rows)
            ]

        def more_bytes(first: dict[str, Any], missing: np.ndarray) -> float:
            areas = training_sizes(dataset, None, "")[missing].prod(axis=1)
            tensors = sum(value.nbytes for value in first.values() if isinstance(value, torch.Tensor))
            return (areas.mean() / areas[0] - 1) * tensors

        # What the rows were made of, and, as the fingerprint of what was encoded, how
        contents, dependencies = keys_of(dataset, CONTENT).cast(pa.string()), (dataset._fingerprint, depends_on)
        features = {"id": Value("string")}
        return self._plan(
            dataset,
            encode_rows,
            features,
            name,
            dependencies,
            rows,
            more_bytes,
            lambda some: contents.take(pa.array(some)),
        )

    def by_epoch(
        self,
        dataset: Dataset,
        encode: Callable[[dict[str, Any], int], dict[str, torch.Tensor]],
        depends_on: Any,
    ) -> list[TensorCache]:
        """
        Computes tensors for the rows of the precomputed dataset to train on, anew for each epoch and those that it visits.

        Args:
            dataset ([`~datasets.Dataset`]):
                The dataset that [`~Precomputation.datasets`] made of it.
            encode (`Callable`):
                From a batch of the collator and the epoch to tensors by name, whose first dimension is that of the batch.
            depends_on (`Any`):
                What the result depends on besides the rows.

        Returns:
            `list[TensorCache]`: for each epoch, the tensors by id.
        """
        self.plans, names = [], [f"noised rows of epoch {epoch + 1}" for epoch in range(len(self.epochs))]
        for epoch, (name, rows) in enumerate(zip(names, self.epochs, strict=True)):
            self.by_id(dataset, partial(encode, epoch=epoch), name, (depends_on, epoch), rows)
        return [TensorCache(plan.run(), "id") for plan in self.plans]

    @property
    def _folder(self) -> Path:
        return Path(self.folder or Path(datasets.config.HF_DATASETS_CACHE) / "trl_diffusion")

    @cached_property
    def _share(self) -> tuple[int, int]:
        """The place of this process among those that write into the same folder, and their number: machines may have one each."""
        process = PartialState().process_index
        seen = sharing(self._folder)[process]
        return seen.index(process), len(seen)

    def _plan(
        self,
        dataset: Dataset,
        encode: Callable,
        features: dict,
        name: str,
        depends_on: Any,
        rows: np.ndarray | None,
        more_bytes: Callable[[dict[str, Any], np.ndarray], float],
        contents: Callable[[np.ndarray], pa.Array],
        prepare: Callable = dict,
        load: Callable | None = None,
    ) -> Encoding:
        state, precision = PartialState(), {torch.bfloat16: "bf16", torch.float16: "fp16"}
        place, number = self._share
        fingerprint = Hasher.hash((FORMAT_VERSION, precision.get(self.encoder.half_dtype, "no"), depends_on))
        plan = Encoding(
            dataset,
            encode,
            Features(features),
            name,
            fingerprint,
            self._folder,
            self.batch_size if is_of_one_size(dataset) else 1,
            place,
            number,
            state.wait_for_everyone,
            print if place == 0 else lambda text: None,
            prepare,
            rows,
            more_bytes,
            sum(plan.size for plan in self.plans),
            contents,
            load,
        )
        self.plans.append(plan)
        return plan


def is_of_one_size(dataset: Dataset) -> bool:
    """Whether a batch may hold any rows. Rows that are precomputed already may have several sizes, of which a batch holds one."""
    if TRAINING_SIZE not in dataset.column_names:
        return True
    sides = training_sizes(dataset, None, "")
    return bool((sides == sides[:1]).all())


def check_rows(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises a `ValueError` where a dataset is a stream or two of its rows have one id."""
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


def noising_settings(args: DiffusionConfig, encoder: BatchEncoder) -> tuple:
    """What noised rows depend on besides the rows, the epoch and the denoisers."""
    backbone = encoder.backbone
    return (
        *(backbone.process.describe(), backbone.settings, args.seed, args.prompt_dropout, args.size_conditions),
        *(args.noise_source, args.inversion_steps, args.inversion_eta, text_fingerprint(encoder)),
    )
