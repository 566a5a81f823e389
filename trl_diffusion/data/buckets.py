# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Aspect ratio buckets (arXiv:2307.01952, section 2.3): images of many shapes in batches of one shape each."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """
    The sizes that images are trained at: of about as many pixels as a square of the resolution and not more, between twice
    as high as wide and twice as wide as high.

    Args:
        resolution (`int`):
            Width and height in pixels of the square.
        multiple (`int`):
            What every side is a multiple of.

    Returns:
        `list[tuple[int, int]]`: (height, width) in pixels, from high to wide.

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
    The bucket whose shape is nearest to some images, in the logarithm of height over width.

    Args:
        sizes (`list[tuple[int, int]]`):
            (height, width) in pixels of the images that share a bucket; the mean of their shapes counts.
        buckets (`list[tuple[int, int]]`):
            The buckets.

    Returns:
        `tuple[int, int]`: one of the buckets.
    """
    shape = sum(math.log(height / width) for height, width in sizes) / len(sizes)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))


class BucketSampler(torch.utils.data.Sampler):
    """
    Shuffles rows so that every run of `batch_size` of them is of one bucket. In each epoch a bucket leaves out the rows that
    do not fill a batch; they are others in the next.

    Args:
        buckets (`list`):
            The bucket of each row.
        batch_size (`int`):
            Rows in a batch.
        seed (`int`):
            Seed of the shuffling.
        epoch (`Callable`):
            Tells the epoch that begins, which shuffles anew.
    """

    def __init__(self, buckets: list, batch_size: int, seed: int, epoch: Callable[[], int]):
        self.rows = defaultdict(list)
        for row, bucket in enumerate(buckets):
            self.rows[tuple(bucket)].append(row)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

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
