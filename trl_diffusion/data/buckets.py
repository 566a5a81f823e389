# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Aspect ratio buckets (arXiv:2307.01952, section 2.3): images of many shapes, in batches of one shape each."""

import math
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import Hasher

from .column_checks import selected
from .pipelining import CORES
from .row_contents import image_states


logger = get_logger(__name__)

HEADER_BYTES = 1 << 16  # of an image, which hold its size
ROWS_FOR_PROCESSES = 10_000  # with fewer, processes cost more than they save
TRAINING_SIZE = "_training_size"  # column of precomputed rows: height and width in pixels


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """
    The sizes of training images: with about as many pixels as a square of the resolution but not more, between twice as high
    as wide and twice as wide as high.

    Args:
        resolution (`int`):
            Width and height of the square in pixels.
        multiple (`int`):
            Every side is a multiple of this number.

    Returns:
        `list[tuple[int, int]]`: (height, width) in pixels, from tall to wide.

    Raises:
        `ValueError`: If the resolution is less than `multiple`.
    """
    if resolution < multiple:
        raise ValueError(
            f"`resolution` is {resolution}, and with `aspect_ratio_buckets` no side can be less than {multiple} pixels."
        )
    sizes = set()
    for long in range(resolution // multiple * multiple, 2 * resolution, multiple):
        short = min(long, resolution**2 // long // multiple * multiple)
        if long <= 2 * short:
            sizes |= {(long, short), (short, long)}
    return sorted(sizes, reverse=True)


def nearest_bucket(sizes: list[tuple[int, int]], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """
    The bucket that is nearest in shape to some images, by the logarithm of height / width.

    Args:
        sizes (`list[tuple[int, int]]`):
            (height, width) in pixels of the images of a row. The mean of their shapes is compared.
        buckets (`list[tuple[int, int]]`):
            The buckets.

    Returns:
        `tuple[int, int]`: the nearest bucket.
    """
    shape = sum(math.log(height / width) for height, width in sizes) / len(sizes)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))


def training_sizes(
    dataset: Dataset,
    size: Callable[[dict], tuple[int, int]],
    fingerprint: str,
    image_columns: tuple[str, ...] | None = None,
) -> np.ndarray:
    """
    The training size of each row. Sizes are read in several processes where there are many rows, and remembered until an image changes.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        size (`Callable`):
            Returns height and width of a row in pixels.
        fingerprint (`str`):
            Identifies everything that the sizes depend on besides the rows.
        image_columns (`tuple[str, ...]`, *optional*):
            The columns of images that the sizes depend on. By default those of the type [`~datasets.Image`].

    Returns:
        `np.ndarray` of shape `(N, 2)`: height and width in pixels.
    """
    if TRAINING_SIZE not in dataset.column_names:
        is_custom = dataset.format["type"] == "custom"  # a transform of the user makes the images
        if image_columns is None:
            image_columns = tuple(name for name, feature in dataset.features.items() if isinstance(feature, Image))
        key = "" if is_custom else Hasher.hash((image_states(dataset, image_columns), fingerprint))
        dataset = (dataset if is_custom else dataset.with_format("arrow")).map(
            partial(sizes_of_rows, size=size) if is_custom else partial(sizes_by_headers, size=size),
            batched=True,
            batch_size=100,
            remove_columns=dataset.column_names,
            features=Features({TRAINING_SIZE: List(Value("int64"))}),
            num_proc=CORES if len(dataset) >= ROWS_FOR_PROCESSES and CORES > 1 else None,
            keep_in_memory=is_custom,  # what a transform makes may change at any time
            new_fingerprint=uuid.uuid4().hex if is_custom else key,
            desc="Reading the sizes of images",
        )
    sizes = pc.list_flatten(dataset.data.column(TRAINING_SIZE)).to_numpy().reshape(-1, 2)
    return selected(dataset, sizes)


def sizes_of_rows(batch: dict[str, list], size: Callable[[dict], tuple[int, int]]) -> dict[str, list]:
    """The training sizes of a batch of rows."""
    return {TRAINING_SIZE: [size(dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True)]}


def sizes_by_headers(table: pa.Table, size: Callable[[dict], tuple[int, int]]) -> dict[str, list]:
    """The training sizes of the rows of a table, of which only the first bytes of images are read where they are JPEGs."""
    table = table.select([name for name in table.column_names if not pa.types.is_list(table[name].type)])
    headers = table
    for place, name in enumerate(table.column_names):
        column = table[name].combine_chunks()
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            parts = {field.name: pc.struct_field(column, field.name) for field in column.type}
            if not pa.types.is_null(parts["bytes"].type):
                parts["bytes"] = pc.binary_slice(parts["bytes"], 0, HEADER_BYTES)
            headers = headers.set_column(place, name, pa.StructArray.from_arrays(list(parts.values()), list(parts)))
    sizes = []
    for number, row in enumerate(headers.to_pylist()):
        try:
            if not all(map(_is_jpeg, row.values())):
                raise ValueError
            sizes.append(size(row))
        except ValueError:  # not a header that says all: the error, if any, is that of the whole image
            sizes.append(size(table.slice(number, 1).to_pylist()[0]))
    return {TRAINING_SIZE: sizes}


def _is_jpeg(value: Any) -> bool:
    """Whether a value is no image, or the beginning of a JPEG, whose size and orientation come before its pixels."""
    return not isinstance(value, dict) or (value["bytes"] or b"").startswith(b"\xff\xd8")


class BucketSampler(torch.utils.data.Sampler):
    """
    Shuffles rows such that each batch of `batch_size` consecutive rows is from one bucket. In each epoch, the rows of a bucket
    that do not fill a batch are left out; they are different rows each time.

    Args:
        buckets (`np.ndarray` or `list` of shape `(N, 2)`):
            The bucket of each row: height and width in pixels.
        batch_size (`int`):
            Number of rows in a batch.
        seed (`int`):
            Seed for shuffling.
        epoch (`Callable`):
            Returns the current epoch. Each epoch has another order.
    """

    def __init__(self, buckets: np.ndarray | list, batch_size: int, seed: int, epoch: Callable[[], int]):
        height, width = np.asarray(buckets, dtype=np.int64).T
        _, firsts, codes = np.unique(height << 32 | width, return_index=True, return_inverse=True)
        rows = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
        self.rows = [
            rows[code] for code in np.argsort(firsts)
        ]  # of each bucket, in the order in which they first occur
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def check(self) -> None:
        """Warns about rows that are left out, or raises a `ValueError` if no bucket fills a batch."""
        if len(self) == 0:
            raise ValueError(
                f"No size has the {self.batch_size} rows of a batch. Lower `per_device_train_batch_size`, or train without "
                "`aspect_ratio_buckets`."
            )
        num_rows = sum(map(len, self.rows))
        if left_out := num_rows - len(self):
            logger.warning(
                f"{left_out} of {num_rows} rows are left out of each epoch, different ones each time: there are not enough rows of "
                f"their size for another batch of {self.batch_size}."
            )

    def __len__(self) -> int:
        return sum(len(rows) // self.batch_size * self.batch_size for rows in self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        batches = []
        for rows in self.rows:
            shuffled = rows[torch.randperm(len(rows), generator=generator).numpy()]
            batches.append(shuffled[: len(rows) // self.batch_size * self.batch_size].reshape(-1, self.batch_size))
        batches = np.concatenate(batches)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[place].tolist()
