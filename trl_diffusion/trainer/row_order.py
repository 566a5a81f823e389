# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Which rows a training will visit, read off its own data loader before there is a model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerState


def visited_rows(trainer: Trainer, places: Dataset, every_epoch: bool) -> list[np.ndarray | None]:
    """
    The rows that each epoch of a training visits. The batches are those of the data loader that the training will read from: the
    trainer's own methods make it, with its sampler, padding, batches and processes.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, which may have no model and no accelerator yet. It is not changed.
        places ([`~datasets.Dataset`]):
            What stands for the dataset to train on: as many rows, in its order, with the columns that a sampler reads.
        every_epoch (`bool`):
            Whether each epoch is asked for. If not, those after the epoch with which all rows were visited are left out.

    Returns:
        `list[np.ndarray | None]`: for each epoch the numbers of its rows, in order and each once; `None` for all rows. Where the order
        is not known beforehand (`auto_find_batch_size`, or a sampler without a seed), `None` for each.
    """
    reader = copy.copy(trainer)
    reader.args = args = copy.copy(trainer.args)
    args.accelerator_config = copy.deepcopy(args.accelerator_config)  # changed by an accelerator that is made
    reader.state, reader._train_batch_size = TrainerState(), args.train_batch_size
    reader.model, reader.train_dataset, reader.prepared = None, places, [places]
    reader.create_accelerator_and_postprocess()
    loader = reader.get_train_dataloader()
    epochs, steps_of_epoch, *_, steps = reader.set_initial_training_values(args, loader)
    if not len(loader):
        return [None]
    if args.auto_find_batch_size or not args.accelerator_config.use_seedable_sampler:
        return [None] * epochs
    found, is_visited = [], np.zeros(len(places), dtype=bool)
    for epoch in range(epochs):
        reader.state.epoch = epoch
        loader.set_epoch(epoch)
        left = steps - epoch * steps_of_epoch
        batches = None if left >= steps_of_epoch else left * args.gradient_accumulation_steps
        own = np.fromiter(chain.from_iterable(islice(loader.batch_sampler, batches)), np.int64)
        rows = np.concatenate(gather_object([own]))
        rows = np.unique(np.maximum(rows, ~rows))  # padding repeats a row
        is_visited[rows] = True
        found.append(None if len(rows) == len(places) else rows)
        if is_visited.all() and not every_epoch:
            break
    return found


def union(epochs: list[np.ndarray | None], number: int) -> np.ndarray | None:
    """The rows of several epochs of a dataset with so many, in order and each once; `None` for all rows."""
    if any(rows is None for rows in epochs):
        return None
    rows = np.unique(np.concatenate(epochs))
    return None if len(rows) == number else rows


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's generator while the context lasts. An order that is made so does not follow from what was seeded before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        yield
