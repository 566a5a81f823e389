# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Every row counts once and with the same weight, however batches, gradient accumulation and processes divide the data.

All processes must read the same number of batches with the same number of rows. If there are not enough rows, rows are repeated
as padding. Padding is marked and does not count: the loss of an optimizer step is the sum over its rows, in all micro-batches and
processes, divided by their number.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from datasets import IterableDataset


PADDING = "_is_padding"  # column that marks padding rows
IS_PADDING = "is_padding"  # bool (B,) in a batch


class PaddedSampler(torch.utils.data.Sampler):
    """
    The order of another sampler, followed by padding up to a multiple. A negative place is padding: `~row` repeats the row
    `row`. All padding repeats the last row of the order, so that all rows of a batch have the same size if images have several.

    Args:
        sampler (`torch.utils.data.Sampler`):
            The order of the rows. A `RandomSampler` is seeded like Accelerate does in a single process, so that all processes
            have the same order.
        multiple (`int`):
            The number of places is a multiple of this number.
        epoch (`Callable`):
            Returns the current epoch. Each epoch has another order. (A function, because the epoch of a sampler cannot be set
            in a run that resumes within an epoch, which wraps it.)
        data_seed (`int`, *optional*):
            Seed for shuffling. Defaults to the seed of PyTorch's generator.
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
    A dataset that is indexed by the places of [`data.padding.PaddedSampler`]. Its length does not include padding.

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
    A stream that is padded to a multiple by repeating its last row. Each worker of a data loader pads its own rows.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            The stream. Every process reads all of it.
        multiple (`int`):
            The number of rows is a multiple of this number.
    """

    def __init__(self, dataset: torch.utils.data.IterableDataset, multiple: int):
        self.dataset = dataset
        self.multiple = multiple

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch for shuffling, as `datasets.IterableDataset.set_epoch`."""
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
    Adds to the batch of another collator which rows are padding, `is_padding` `(B,)`, bool.

    Args:
        collator (`Callable`):
            The other collator. It gets the rows without the column that marks padding.
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
    Pads a dataset for several processes. Without this, Accelerate would fill the last batches with rows that count twice.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        sampler_fn (`Callable`):
            Returns the sampler for a dataset; `None` for a stream.
        multiple (`int`):
            Number of rows that all processes together read at once.
        epoch (`Callable`), data_seed (`int`, *optional*):
            See [`data.padding.PaddedSampler`].

    Returns:
        `tuple`: the dataset and the function for the data loader.
    """
    if isinstance(dataset, IterableDataset):
        return PaddedStream(dataset, multiple), sampler_fn
    sampler = sampler_fn(dataset) or torch.utils.data.SequentialSampler(dataset)
    padded = PaddedSampler(sampler, multiple, epoch, data_seed)
    return PaddedRows(dataset), lambda _: padded


def as_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """
    Marks all rows of a batch as padding.

    Args:
        batch (`dict`):
            A batch of `B` rows with their `id`.

    Returns:
        `dict`: the same batch, as padding.
    """
    device = next(value.device for value in batch.values() if isinstance(value, torch.Tensor))
    return {**batch, IS_PADDING: torch.ones(len(batch["id"]), dtype=torch.bool, device=device)}


def count_rows(batches: list[dict[str, Any]], accelerator: Accelerator | None = None) -> torch.Tensor | int:
    """
    Number of rows in several batches without padding.

    Args:
        batches (`list[dict]`):
            Batches with the `id` of their rows and, if there may be padding, `is_padding`.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Adds the rows of the other processes.

    Returns:
        `int`, or a scalar `torch.Tensor` if a batch has `is_padding`, to avoid waiting for the device.
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
    The contribution of a micro-batch to the loss of its optimizer step, `sum(losses) / num_rows` without padding. Summed over
    micro-batches and averaged over processes, like gradients, the contributions give the mean over the rows.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            The losses of the micro-batch.
        is_padding (`torch.Tensor` of shape `(B,)`, *optional*):
            Which rows are padding. By default none.
        num_rows (`torch.Tensor` or `int`, *optional*):
            Number of rows of the optimizer step in all micro-batches and processes, without padding. By default that of this
            micro-batch, so the result is its mean.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes that the gradients are averaged over, if `num_rows` is given.

    Returns:
        `torch.Tensor`, a scalar: exactly 0, with a gradient of 0, if all rows are padding.
    """
    if is_padding is not None:
        losses = losses.masked_fill(is_padding, 0)
    if num_rows is None:
        num_processes = 1
        num_rows = len(losses) if is_padding is None else (~is_padding).sum().clamp(min=1)
    return losses.sum() * num_processes / num_rows


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, PADDING: True}
