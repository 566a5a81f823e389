# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Aspect ratio buckets (arXiv:2307.01952, section 2.3): images of many shapes, in batches of one shape each."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from datasets.fingerprint import Hasher


logger = get_logger(__name__)

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


def training_sizes(dataset: Dataset, size: Callable[[dict], tuple[int, int]], fingerprint: str) -> list[list[int]]:
    """
    The training size of each row.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        size (`Callable`):
            Returns height and width of a row in pixels.
        fingerprint (`str`):
            Identifies everything that the sizes depend on besides the rows.

    Returns:
        `list[list[int]]`: height and width in pixels.
    """
    if TRAINING_SIZE not in dataset.column_names:
        dataset = dataset.map(
            lambda row: {TRAINING_SIZE: size(row)},
            remove_columns=dataset.column_names,
            new_fingerprint=Hasher.hash((dataset._fingerprint, fingerprint)),
            desc="Reading the sizes of images",
        )
    return dataset[TRAINING_SIZE][:]


class BucketSampler(torch.utils.data.Sampler):
    """
    Shuffles rows such that each batch of `batch_size` consecutive rows is from one bucket. In each epoch, the rows of a bucket
    that do not fill a batch are left out; they are different rows each time.

    Args:
        buckets (`list`):
            The bucket of each row.
        batch_size (`int`):
            Number of rows in a batch.
        seed (`int`):
            Seed for shuffling.
        epoch (`Callable`):
            Returns the current epoch. Each epoch has another order.
    """

    def __init__(self, buckets: list, batch_size: int, seed: int, epoch: Callable[[], int]):
        self.rows = defaultdict(list)
        for row, bucket in enumerate(buckets):
            self.rows[tuple(bucket)].append(row)
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
        num_rows = sum(map(len, self.rows.values()))
        if left_out := num_rows - len(self):
            logger.warning(
                f"{left_out} of {num_rows} rows are left out of each epoch, different ones each time: there are not enough rows of "
                f"their size for another batch of {self.batch_size}."
            )

    def __len__(self) -> int:
        return sum(len(rows) // self.batch_size * self.batch_size for rows in self.rows.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        batches = []
        for rows in self.rows.values():
            shuffled = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
            batches += zip(*[iter(shuffled)] * self.batch_size)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[place]
