# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Tensors that are computed once and stored in Arrow files."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from safetensors import torch as safetensors


TENSORS = "_tensors"  # column with the tensors of a row, in the safetensors format
ROWS_PER_FILE = 1000


def is_precomputed(row: dict[str, Any]) -> bool:
    """Whether a row comes from [`data.caching.precompute_dataset`]."""
    return TENSORS in row


def write_example(example: dict[str, Any]) -> dict[str, Any]:
    """
    Packs the tensors of an example into one column.

    Args:
        example (`dict`):
            Tensors and other values by name.

    Returns:
        `dict`: the other values, and the tensors as `bytes`.
    """
    tensors = {name: value.cpu().contiguous() for name, value in example.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in example.items() if name not in tensors} | {
        TENSORS: safetensors.save(tensors)
    }


def read_example(row: dict[str, Any]) -> dict[str, Any]:
    """
    Unpacks an example of [`data.caching.write_example`].

    Args:
        row (`dict`):
            A row.

    Returns:
        `dict`: the example.
    """
    return {name: value for name, value in row.items() if name != TENSORS} | safetensors.load(row[TENSORS])


def precompute_dataset(
    dataset: Dataset,
    encode: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    features: Features,
    name: str,
    fingerprint: str,
    folder: Path,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> Dataset:
    """
    Encodes a dataset into Arrow files of 1000 rows each. Existing files are loaded, so an interrupted run continues with the
    file that was not finished. The files are distributed among the processes.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        encode (`Callable`):
            Returns an example for each of several rows.
        features ([`~datasets.Features`]):
            Columns of the examples besides their tensors.
        name (`str`):
            Name of the content, for file names and messages.
        fingerprint (`str`):
            Hash of everything that the examples depend on.
        folder (`Path`):
            Folder of the files.
        batch_size (`int`):
            Number of rows that are encoded at once.
        process_index (`int`, *optional*, defaults to `0`):
            Index of this process.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes.
        wait (`Callable`, *optional*):
            Waits for all processes.
        say (`Callable`, *optional*):
            Prints a message.

    Returns:
        [`~datasets.Dataset`]: the examples, memory-mapped, with their tensors as one column.

    Raises:
        `ValueError`: If there is not enough space on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({**features, TENSORS: Value("large_binary")})
    starts = range(0, len(dataset), ROWS_PER_FILE)
    files = {
        start: folder / f"{re.sub('[^A-Za-z0-9_]+', '-', name)}-{fingerprint}-{start // ROWS_PER_FILE:05d}.arrow"
        for start in starts
    }
    missing = [start for start in starts if not files[start].exists()]
    wait()
    if missing:
        rows = sum(min(ROWS_PER_FILE, len(dataset) - start) for start in missing)
        size = rows * len(write_example(encode([dataset[missing[0]]])[0])[TENSORS])
        free = shutil.disk_usage(folder).free
        say(f"Precomputing {name}: {rows:,} of {len(dataset):,} rows are missing, {size / 1e9:.2f} GB, in {folder}.")
        if size > free:
            raise ValueError(
                f"Precomputing {name} needs {size / 1e9:.2f} GB, and the disk of {folder} has {free / 1e9:.2f} GB left. "
                "Set `precompute_dir` to a folder on another disk, train on fewer rows, or train without `precompute`."
            )
    else:
        say(f"Precomputed before: {name}, {len(dataset):,} rows in {folder}.")

    def encode_batch(batch: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [write_example(example) for example in encode(rows)]
        return {column: [example[column] for example in examples] for column in features}

    for index, start in enumerate(starts):
        if index % num_processes == process_index:
            part = dataset.select(range(start, min(start + ROWS_PER_FILE, len(dataset))))
            part.map(
                encode_batch,
                batched=True,
                batch_size=batch_size,
                remove_columns=part.column_names,
                features=features,
                cache_file_name=str(files[start]),
                load_from_cache_file=True,
                new_fingerprint=f"{fingerprint}-{start}",
                writer_batch_size=100,
                desc=f"Precomputing {name}, file {index + 1} of {len(starts)}",
            )
    wait()
    return concatenate_datasets([Dataset.from_file(str(files[start])) for start in starts])


class TensorCache:
    """
    Precomputed tensors by key.

    Args:
        dataset ([`~datasets.Dataset`]):
            A result of [`data.caching.precompute_dataset`].
        key (`str`):
            The column of the keys, which must be unique.
    """

    def __init__(self, dataset: Dataset, key: str):
        self.dataset = dataset
        self.places = {value: place for place, value in enumerate(dataset[key])}

    def __getitem__(self, keys: list[str | None]) -> dict[str, torch.Tensor]:
        """
        Looks up keys.

        Args:
            keys (`list[str]` of length `B`):
                The keys.

        Returns:
            `dict[str, torch.Tensor]`: the tensors by name, on the CPU, with a first dimension of `B`. If their lengths differ,
            they are padded with zeros.

        Raises:
            `KeyError`: If a key was not precomputed.
        """
        rows = self.dataset[[self.places[key] for key in keys]][TENSORS]
        examples = [safetensors.load(row) for row in rows]
        return {name: stack_padded([example[name] for example in examples]) for name in examples[0]}


def stack_padded(values: list[torch.Tensor]) -> torch.Tensor:
    """
    Stacks tensors, padded with zeros along their first dimension.

    Args:
        values (`list[torch.Tensor]` of length `B`):
            Tensors of shape `(N, ...)`, where `N` may differ, or scalars.

    Returns:
        `torch.Tensor` of shape `(B, max N, ...)`.
    """
    if values[0].ndim == 0 or all(len(value) == len(values[0]) for value in values):
        return torch.stack(values)
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
