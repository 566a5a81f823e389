# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Arrow files of what is computed once for each row: which rows they hold, their names, and the space that more will take."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from datasets.table import InMemoryTable, MemoryMappedTable, concat_tables

from .hashing import hash_of


def keys_of(dataset: Dataset, column: str) -> pa.LargeStringArray:
    """The values of a column of a dataset as texts, in its order."""
    if dataset.format["type"] == "custom":  # a transform of the user gives them
        return pa.array([None if value is None else str(value) for value in dataset[column]], pa.large_string())
    values = dataset.data.column(column)
    if dataset._indices is not None:
        values = values.take(dataset._indices.column(0))
    return values.cast(pa.large_string()).combine_chunks()


class EncodedFiles:
    """
    The files of one content in a folder. Each holds some examples with their keys.

    Args:
        folder (`Path`):
            The folder.
        prefix (`str`):
            What the names of the files begin with.
        features ([`~datasets.Features`]):
            The columns, of which the first is the key.
    """

    def __init__(self, folder: Path, prefix: str, features: Features):
        self.folder, self.prefix = folder, prefix
        self.schema, self.key = features.arrow_schema, next(iter(features))
        names = (name for name in os.listdir(folder) if name.startswith(f"{prefix}-") and name.endswith(".arrow"))
        self.tables = [InMemoryTable(self.schema.empty_table())]
        self.add(folder / name for name in sorted(names))

    def add(self, paths: Iterable[Path]) -> None:
        """Files that were written since."""
        self.tables += [MemoryMappedTable.from_file(str(path)) for path in paths]

    def places(self, keys: pa.LargeStringArray) -> np.ndarray:
        """The place of each key among all examples, -1 where it is in no file."""
        stored = concat_tables(self.tables).column(self.key).cast(pa.large_string()).combine_chunks()
        return pc.fill_null(pc.index_in(keys, value_set=stored), -1).to_numpy()

    def dataset(self, places: np.ndarray, fingerprint: str) -> Dataset:
        """The examples at some places."""
        table = concat_tables(self.tables)
        if np.array_equal(places, np.arange(len(table))):
            return Dataset(table, fingerprint=fingerprint)
        return select(table, places, fingerprint)

    def names_of(
        self, missing: np.ndarray, keys: pa.LargeStringArray, number: int | None, size: int
    ) -> dict[Path, range | list[int]]:
        """
        The files that rows are written to. The name of a file tells what is in it, so that runs at the same time do no harm.

        Args:
            missing (`np.ndarray`):
                The numbers of the rows, in order.
            keys (`pa.LargeStringArray`):
                The keys of all rows of the dataset.
            number (`int` or `None`):
                The number of rows of the dataset, if the prefix tells which they are: a file of `size` of them one after the other then
                has a number for a name.
            size (`int`):
                The largest number of rows in a file.

        Returns:
            `dict[Path, range | list[int]]`: the numbers of the rows of each file.
        """
        parts, others = {}, missing
        if number is not None:
            blocks, counts = np.unique(missing // size, return_counts=True)
            whole = blocks[counts == np.minimum(size, number - blocks * size)]
            for block in whole.tolist():
                numbers = range(block * size, min((block + 1) * size, number))
                parts[self.folder / f"{self.prefix}-{block:05d}.arrow"] = numbers
            others = missing[~np.isin(missing // size, whole)]
        for start in range(0, len(others), size):
            numbers = others[start : start + size]
            name = hash_of(pa.chunked_array([keys.take(pa.array(numbers))]))
            parts[self.folder / f"{self.prefix}-{name}.arrow"] = numbers.tolist()
        return parts

    def expected_size(self, row: dict[str, Any], counts: list[int], rows_at_once: int, more: float) -> int:
        """
        Bytes of files that are not written yet.

        Args:
            row (`dict`):
                A row.
            counts (`list[int]`):
                The number of rows of each file.
            rows_at_once (`int`):
                The number of rows of a record batch.
            more (`float`):
                How many bytes more than this row the rows take on average.

        Returns:
            `int`
        """
        empty = pa.BufferOutputStream()
        pa.ipc.new_stream(empty, self.schema).close()
        one, nine = (
            pa.ipc.get_record_batch_size(pa.RecordBatch.from_pylist([row] * number, schema=self.schema))
            for number in (1, 9)
        )
        each = (nine - one) / 8
        batches = sum(count // rows_at_once + 1 for count in counts)  # the last one may be empty
        return round(
            len(counts) * empty.getvalue().size + batches * (one - each) + sum(counts) * max(0.0, each + more)
        )


def select(table: Any, places: np.ndarray, fingerprint: str) -> Dataset:
    """Some rows of a table, in any order, without a copy of them."""
    return Dataset(
        table, indices_table=InMemoryTable(pa.table({"indices": places.astype(np.uint64)})), fingerprint=fingerprint
    )


def mean_length(texts: pa.LargeStringArray) -> float:
    """Mean number of bytes."""
    return pc.mean(pc.fill_null(pc.binary_length(texts), 0)).as_py()


def readable(size: float) -> str:
    """A number of bytes, with three digits where it has a unit: `12.3 GB`."""
    for unit, number in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * number:
            return f"{size / number:,.{max(0, 2 - int(np.log10(size / number * 1.0005)))}f} {unit}"
    return f"{size:.0f} bytes"
