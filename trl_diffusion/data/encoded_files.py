# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Arrow files of what is computed once for each row: which rows they hold, their names, and the space that more will take."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable, MemoryMappedTable, concat_tables

from .content import ABSENT, SEAL_BYTES, FileIndex, damage_of, state_of
from .hashing import hash_of
from .row_contents import kept_folder


CONTENT = "_content"  # column with the hash of what a row was made of


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
    The files of one content in a folder. Each holds some examples with hashes of what they were made of, and ends in a checksum. A
    damaged file is named and removed.

    Args:
        folder (`Path`):
            The folder.
        prefix (`str`):
            What the names of the files begin with. A file of another one is a damaged file.
        features ([`~datasets.Features`]):
            The columns.
        say (`Callable`, *optional*):
            Prints a message.
    """

    def __init__(self, folder: Path, prefix: str, features: Features, say: Callable[[str], None] = print):
        self.folder, self.prefix, self.schema = folder, prefix, features.arrow_schema
        self.tables = [InMemoryTable(self.schema.empty_table())]
        index = kept_folder() / f"damages-{Hasher.hash((str(folder.absolute()), prefix))}.arrow"
        self.index = FileIndex(index, partial(damage_of, label=prefix))
        paths = sorted(
            path for path in folder.iterdir() if path.name.startswith(f"{prefix}-") and path.suffix == ".arrow"
        )
        for path, damage in zip(paths, self.index.of(paths), strict=True):
            if damage == ABSENT:  # removed since
                continue
            if not damage:
                self._open(path)
                continue
            say(f"{path} is damaged: {damage}. What it held is made anew.")
            with suppress(OSError):
                path.unlink()

    def _open(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            self.tables.append(MemoryMappedTable.from_file(str(path)))

    def add(self, paths: Iterable[Path]) -> None:
        """Files that were written just now."""
        for path in paths:
            self._open(path)

    def trust(self, paths: Iterable[Path]) -> None:
        """The next time, files that were written just now are not read to see whether they are whole, unless they change."""
        self.index.keep({path: (state_of(path), "") for path in paths})

    def places(self, contents: pa.Array) -> np.ndarray:
        """The place of each row among all examples, by what it is made of; -1 where it is in no file."""
        stored = concat_tables(self.tables).column(CONTENT).combine_chunks()
        return pc.fill_null(pc.index_in(contents, value_set=stored), -1).to_numpy()

    def dataset(self, places: np.ndarray, fingerprint: str) -> Dataset:
        """The examples at some places."""
        table = concat_tables(self.tables)
        if np.array_equal(places, np.arange(len(table))):
            return Dataset(table, fingerprint=fingerprint)
        return select(table, places, fingerprint)

    def names_of(
        self, missing: np.ndarray, contents: pa.Array, number: int | None, size: int
    ) -> dict[Path, range | list[int]]:
        """
        The files that rows are written to. The name of a file tells what is in it, so that runs at the same time do no harm.

        Args:
            missing (`np.ndarray`):
                The numbers of the rows, in order.
            contents (`pa.Array`):
                What they are made of.
            number (`int` or `None`):
                The number of rows of the dataset, if all are needed: files then hold `size` of them one after the other, as far as they
                are missing.
            size (`int`):
                The largest number of rows in a file.

        Returns:
            `dict[Path, range | list[int]]`: the numbers of the rows of each file.
        """
        parts, is_other = {}, np.ones(len(missing), bool)
        if number is not None:
            blocks, firsts, counts = np.unique(missing // size, return_index=True, return_counts=True)
            is_whole = counts == np.minimum(size, number - blocks * size)
            for block, first, count in zip(
                blocks[is_whole].tolist(), firsts[is_whole].tolist(), counts[is_whole].tolist()
            ):
                is_other[first : first + count] = False
                numbers = range(block * size, block * size + count)
                parts[self._path_of(contents.slice(first, count), f"{block:05d}-")] = numbers
        others = np.nonzero(is_other)[0]
        for start in range(0, len(others), size):
            some = others[start : start + size]
            parts[self._path_of(contents.take(pa.array(some)))] = missing[some].tolist()
        return parts

    def _path_of(self, contents: pa.Array, number: str = "") -> Path:
        return self.folder / f"{self.prefix}-{number}{hash_of(pa.chunked_array([contents]))}.arrow"

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
            len(counts) * (SEAL_BYTES + empty.getvalue().size)
            + batches * (one - each)
            + sum(counts) * max(0.0, each + more)
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
