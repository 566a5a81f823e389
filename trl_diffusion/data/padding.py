# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Every row counts once and alike, however batches, gradient accumulation and processes cut them.

Processes must read equally many batches of equally many rows. Where the rows do not suffice, rows are repeated as padding.
Padding is marked, and counts nothing: the loss of an optimizer step is the sum over its rows, of all micro-batches and
processes, divided by their number.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from datasets import IterableDataset


PADDING = "_is_padding"  # the column that marks a row that fills a batch and counts nothing
IS_PADDING = "is_padding"  # bool (B,) in a batch


class PaddedSampler(torch.utils.data.Sampler):
    """
    The order of another sampler, and behind it as much padding as makes the number of places a multiple. A place below zero
    is padding: `~row` repeats the row `row`. All padding repeats the last row of the order, so that a batch of padding is of
    one size where batches are.

    Args:
        sampler (`torch.utils.data.Sampler`):
            The order of the rows. A `RandomSampler` is seeded, so that all processes shuffle alike, as Accelerate seeds it in
            one process.
        multiple (`int`):
            What the number of places is a multiple of.
        epoch (`Callable`):
            Tells the epoch that begins, which shuffles anew. It is asked for, not set: a run that resumes within an epoch
            wraps its sampler so that nobody can set it.
        data_seed (`int`, *optional*):
            Seed of the shuffling. Defaults to the seed of PyTorch's generator.
    """

    def __init__(
        self,
        sampler: torch.utils.data.Sampler,
        multiple: int,
        epoch: Callable[[], int],
        data_seed: int | None = None,
    ):
        if isinstance(sampler, torch.utils.data.RandomSampler):
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=data_seed)
        self.sampler = sampler
        self.multiple = multiple
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler) + -len(self.sampler) % self.multiple

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.sampler, SeedableRandomSampler):
            self.sampler.set_epoch(self.epoch())
        row = None
        for row in self.sampler:
            yield row
        for _ in range(len(self) - len(self.sampler)):
            yield ~row


class PaddedRows(torch.utils.data.Dataset):
    """
    A dataset read by the places of [`data.padding.PaddedSampler`]. Its length is the number of real rows.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
    """

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__([max(place, ~place) for place in places])
        return [row if place >= 0 else _mark(row) for place, row in zip(places, rows, strict=True)]


class PaddedStream(torch.utils.data.IterableDataset):
    """
    A stream that ends with as much padding, its last row repeated, as makes the number of rows a multiple. Each worker of a
    data loader pads what it reads.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            The stream. Every process reads the whole of it.
        multiple (`int`):
            What the number of rows is a multiple of.
    """

    def __init__(self, dataset: torch.utils.data.IterableDataset, multiple: int):
        self.dataset = dataset
        self.multiple = multiple

    def set_epoch(self, epoch: int) -> None:
        """Shuffles anew, as `datasets.IterableDataset.set_epoch`."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, row = 0, None
        for row in self.dataset:
            yield row
            count += 1
        for _ in range(-count % self.multiple):
            yield _mark(row)


class PaddingCollator:
    """
    Lets another collator make a batch, and adds to it which of its rows are padding, `is_padding` `(B,)`, bool.

    Args:
        collator (`Callable`):
            From rows to a batch. It does not see the marks.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        unmarked = [{column: value for column, value in row.items() if column != PADDING} for row in rows]
        return {**self.collator(unmarked), IS_PADDING: torch.tensor([PADDING in row for row in rows])}


def pad_for_processes(
    dataset: torch.utils.data.Dataset,
    sampler_fn: Callable | None,
    multiple: int,
    epoch: Callable[[], int],
    data_seed: int | None,
) -> tuple[torch.utils.data.Dataset, Callable | None]:
    """
    Pads what several processes read, where Accelerate would fill the last batches with rows that count twice.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        sampler_fn (`Callable`):
            From the dataset to the sampler of its order; `None` for the order of a stream.
        multiple (`int`):
            Number of rows that all processes read at once.
        epoch (`Callable`), data_seed (`int`, *optional*):
            See [`data.padding.PaddedSampler`].

    Returns:
        `tuple`: the dataset and the function, for the data loader.
    """
    if isinstance(dataset, IterableDataset):
        return PaddedStream(dataset, multiple), sampler_fn
    sampler = sampler_fn(dataset) or torch.utils.data.SequentialSampler(dataset)
    padded = PaddedSampler(sampler, multiple, epoch, data_seed)
    return PaddedRows(dataset), lambda _: padded


def as_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """
    A batch again, as padding.

    Args:
        batch (`dict`):
            A batch of `B` rows with their `id`.

    Returns:
        `dict`: the batch, all of whose rows count nothing.
    """
    device = next(value.device for value in batch.values() if isinstance(value, torch.Tensor))
    return {**batch, IS_PADDING: torch.ones(len(batch["id"]), dtype=torch.bool, device=device)}


def count_rows(batches: list[dict[str, Any]], accelerator: Accelerator | None = None) -> torch.Tensor | int:
    """
    Counts the rows of batches that are not padding.

    Args:
        batches (`list[dict]`):
            Batches, each with the `id` of its rows and, where some may be padding, `is_padding`.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Adds the rows of the other processes.

    Returns:
        `int`, or a `torch.Tensor` without dimensions where a batch has `is_padding`, so that no device is waited for.
    """
    rows = sum((~batch[IS_PADDING]).sum() if IS_PADDING in batch else len(batch["id"]) for batch in batches)
    if accelerator is None or accelerator.num_processes == 1 or not batches:
        return rows
    return accelerator.reduce(torch.as_tensor(rows, device=accelerator.device))


def mean_over_rows(
    losses: torch.Tensor,
    is_padding: torch.Tensor | None = None,
    num_rows: torch.Tensor | int | None = None,
    num_processes: int = 1,
) -> torch.Tensor:
    """
    The share that a micro-batch has in the loss of its optimizer step, `sum(losses) / num_rows` without the padding. Summed
    over micro-batches and averaged over processes, as gradients are, the shares give the mean over the rows.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            The losses of the micro-batch.
        is_padding (`torch.Tensor` of shape `(B,)`, *optional*):
            Which rows are padding; none if left out.
        num_rows (`torch.Tensor` or `int`, *optional*):
            Rows of the optimizer step in all micro-batches and processes, without the padding. If left out, the rows of this
            micro-batch, whose mean this then is.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes that gradients are averaged over, where `num_rows` is given.

    Returns:
        `torch.Tensor` without dimensions: exactly 0, with a gradient of 0, where all rows are padding.
    """
    if is_padding is not None:
        losses = losses.masked_fill(is_padding, 0)
    if num_rows is None:
        num_processes = 1
        num_rows = len(losses) if is_padding is None else (~is_padding).sum().clamp(min=1)
    return losses.sum() * num_processes / num_rows


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, PADDING: True}
