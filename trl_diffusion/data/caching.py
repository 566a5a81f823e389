# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Tensors that are computed once and stored in Arrow files."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Dataset, Features, Value
from datasets.table import InMemoryTable, concat_tables
from datasets.utils import tqdm
from safetensors import torch as safetensors

from .arrow_files import FILE, ROWS_AT_ONCE, write_files, writing
from .column_checks import selected
from .content import clear_unfinished
from .encoded_files import CONTENT, EncodedFiles, keys_of, mean_length, readable, select
from .key_index import KeyIndex
from .row_contents import RowContents, kept_folder, rows_at


TENSORS = "_tensors"  # column with the tensors of a row, in the safetensors format, and a checksum
CHECKSUM_BYTES = 8
ABSENT = "_absent"  # in a batch, the ids of its rows that are not encoded
ROWS_PER_FILE = 1000
OPTIONAL = ("chosen_masks", "rejected_masks")  # tensors that some rows have, and of which the others have none


def is_precomputed(row: dict[str, Any]) -> bool:
    """Whether a row comes from [`data.caching.precompute_dataset`]."""
    return TENSORS in row


def write_example(example: dict[str, Any]) -> dict[str, Any]:
    """
    Packs the tensors of an example into one column, with a checksum.

    Args:
        example (`dict`):
            Tensors and other values by name, and as `FILE` the name of the file that it is written to, which is named where its tensors
            are damaged.

    Returns:
        `dict`: the other values, and the tensors as `bytes`.
    """
    tensors = {name: value.cpu().contiguous() for name, value in example.items() if isinstance(value, torch.Tensor)}
    content = safetensors.save(tensors, {"file": example.get(FILE, "")})
    return {name: value for name, value in example.items() if name not in tensors and name != FILE} | {
        TENSORS: content + xxhash.xxh3_64_digest(content)
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
    check_tensors(np.frombuffer(row[TENSORS], np.uint8))
    values = {name: value for name, value in row.items() if name not in (TENSORS, CONTENT)}
    return values | safetensors.load(row[TENSORS][:-CHECKSUM_BYTES])


def check_tensors(content: np.ndarray) -> None:
    """Raises a `ValueError` for tensors that are not those that [`data.caching.write_example`] packed."""
    if xxhash.xxh3_64_digest(content[:-CHECKSUM_BYTES]) != content[-CHECKSUM_BYTES:].tobytes():
        found = re.search(rb'"file":"([^"]+)"', content[:10_000].tobytes())
        name = f"The file {found[1].decode()}" if found else "A file"
        raise ValueError(
            f"{name} of precomputed rows was damaged since the training began: the checksum of a row is another. Repeat the command: "
            "the file is then removed, and what it held is made anew. If it is not named at the start, the disk or the memory is at "
            "fault: delete the file."
        )


def read_batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Unpacks several examples of [`data.caching.write_example`] at once, copying each tensor once.

    Args:
        rows (`list[dict]` of length `B`):
            Rows.

    Returns:
        `dict`: tensors whose first dimension is `B`, see [`data.caching.stack_padded`], and lists of `B` values. Where a row was not
        encoded, see [`data.caching.with_absent`], the ids alone: a data loader reads batches that nothing is done with.
    """
    if absent := [row["id"] for row in rows if row[TENSORS] is None]:
        return {"id": [row["id"] for row in rows], ABSENT: absent}
    values = {name: [row[name] for row in rows] for name in rows[0] if name not in (TENSORS, CONTENT)}
    return values | _stack_rows([np.frombuffer(row[TENSORS], np.uint8) for row in rows])


def check_encoded(batch: dict[str, Any]) -> None:
    """Raises a `ValueError` for a batch of [`data.caching.read_batch`] with a row that was not encoded."""
    if ABSENT in batch:
        raise ValueError(
            f"The row with id {batch[ABSENT][0]!r} was not encoded: the settings that the trainer was made with do not visit it. Make "
            "the trainer with the `max_steps`, batch size and seed that it is trained with (what is encoded already stays), or "
            "train without `precompute`."
        )


def with_absent(encoded: Dataset, rows: np.ndarray, others: dict[str, pa.Array]) -> Dataset:
    """
    A dataset whose rows are not all encoded. To use one of the others is an error, see [`data.caching.check_encoded`].

    Args:
        encoded ([`~datasets.Dataset`]):
            A result of [`data.caching.Encoding`] for some rows of a dataset.
        rows (`np.ndarray`):
            The numbers of these rows, in order.
        others (`dict[str, pa.Array]`):
            Some columns of the whole dataset, which the rows that are not encoded keep.

    Returns:
        [`~datasets.Dataset`]: as many rows as the whole dataset has, in its order.
    """
    number, schema = len(next(iter(others.values()))), encoded.data.schema
    absent = np.setdiff1d(np.arange(number), rows)
    columns = [
        others[field.name].take(pa.array(absent)).cast(field.type)
        if field.name in others
        else pa.nulls(len(absent), field.type)
        for field in schema
    ]
    places = np.empty(number, np.int64)
    places[rows] = selected(encoded, np.arange(len(encoded.data)))
    places[absent] = len(encoded.data) + np.arange(len(absent))
    table = InMemoryTable(pa.table(columns, schema=schema))
    return select(concat_tables([encoded.data, table]), places, encoded._fingerprint)


@dataclasses.dataclass
class Encoding:
    """
    Encodes a dataset, or some of its rows, into Arrow files of at most 1000 rows each. A row is found by what it is made of, not by
    names: what is in a file already is not encoded again, whatever other rows it was encoded with, so an interrupted run continues with
    the file that was not finished, and a run on more rows, or on rows of which some have changed, adds these. A file that is damaged is
    named, and its rows are encoded again. When it is made, it says how much there is to do. The files are distributed among the processes. Rows are read
    ahead and results are written behind, while others are encoded.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        encode (`Callable`):
            Returns an example for each of several prepared rows.
        features ([`~datasets.Features`]):
            Columns of the examples besides their tensors. The first one is the key: a column of the dataset as well, with a text for
            each row that no other one has; one may be null.
        name (`str`):
            Name of the content, for file names and messages.
        fingerprint (`str`):
            Hash of everything that an example depends on besides its row.
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
        prepare (`Callable`, *optional*):
            From a row to what `encode` is given of it, in threads. By default the row.
        rows (`np.ndarray`, *optional*):
            The numbers of the rows that are needed, in order. By default all.
        more_bytes (`Callable`, *optional*):
            From the first example and the numbers of the rows that are missing to how many bytes more than the first they take on
            average, where their tensors differ in size.
        reserved (`int`, *optional*, defaults to `0`):
            How many bytes others will take before.
        contents (`Callable`, *optional*):
            From the numbers of rows to hashes of what they are made of. By default [`data.row_contents.RowContents`], without images.
        load (`Callable`, *optional*):
            From the numbers of rows and these hashes to the rows. By default those of the dataset.

    Attributes:
        size (`int`):
            About how many bytes are missing.
        keys (`pa.LargeStringArray`), all_keys (`pa.LargeStringArray`):
            The keys of the rows that are needed, and of all rows of the dataset.

    Raises:
        `ValueError`: If there is not enough space on the disk, or the folder cannot be written.
    """

    dataset: Dataset
    encode: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    features: Features
    name: str
    fingerprint: str
    folder: Path
    batch_size: int
    process_index: int = 0
    num_processes: int = 1
    wait: Callable[[], None] = lambda: None
    say: Callable[[str], None] = print
    prepare: Callable[[dict[str, Any]], Any] = dict
    rows: np.ndarray | None = None
    more_bytes: Callable[[dict[str, Any], np.ndarray], float] = lambda first, rows: 0.0
    reserved: int = 0
    contents: Callable[[np.ndarray], pa.Array] | None = None
    load: Callable[[range | list[int], pa.Array], list[dict[str, Any]]] | None = None

    def __post_init__(self):
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.features = Features({**self.features, CONTENT: Value("string"), TENSORS: Value("large_binary")})
        self.all_keys = keys = keys_of(self.dataset, next(iter(self.features)))
        number, needed = len(keys), np.arange(len(keys)) if self.rows is None else self.rows
        self.keys, self.needed = keys.take(pa.array(needed)), needed
        # The first process reads what the others then know, and removes what is damaged
        for is_first in (True, False):
            if (self.process_index == 0) == is_first:
                self._look()
            self.wait()
        is_missing = self.files.places(self.found) < 0
        missing = needed[is_missing]
        self.parts = self.files.names_of(
            missing, self.found.filter(pa.array(is_missing)), number if self.rows is None else None, ROWS_PER_FILE
        )
        self.size = self._expected_size(missing, keys) if len(missing) else 0
        free, others = shutil.disk_usage(self.folder).free, ""
        if len(needed) < number:
            others = f" The dataset has {number:,}, and the others are not needed."
        if not len(missing):
            self.say(f"Precomputed before: {self.name}, {len(needed):,} rows in {self.folder}.{others}")
            return
        self.say(
            f"Precomputing {self.name}: {len(missing):,} of {len(needed):,} rows are missing, about {readable(self.size)} in "
            f"{self.folder}, where {readable(free)} are free.{others}"
        )
        if self.size + self.reserved > free:
            beside = f" beside {self.reserved / 1e9:.2f} GB for what comes before" if self.reserved else ""
            raise ValueError(
                f"Precomputing {self.name} needs {self.size / 1e9:.2f} GB{beside}, and the disk of {self.folder} has "
                f"{free / 1e9:.2f} GB left. Set `precompute_dir` to a folder on another disk, train on fewer rows, or train "
                "without `precompute`."
            )

    def _look(self) -> None:
        """Finds out what the rows are made of, and what is in the folder."""
        self.found = (self.contents or RowContents(self.dataset, ()).of)(self.needed)
        if self.process_index == 0:
            for folder in (self.folder, kept_folder()):
                clear_unfinished(folder)
        prefix = f"{re.sub('[^A-Za-z0-9_]+', '-', self.name)}-{self.fingerprint}"
        self.files = EncodedFiles(self.folder, prefix, self.features, self.say)

    def _expected_size(self, missing: np.ndarray, keys: pa.LargeStringArray) -> int:
        first = self.encode([self.prepare(self.dataset[int(missing[0])])])[0]
        first = first | {CONTENT: self.found[0].as_py(), FILE: next(iter(self.parts)).name}
        longer = mean_length(keys.take(pa.array(missing))) - mean_length(keys.slice(int(missing[0]), 1))
        counts = [len(part) for part in self.parts.values()]
        more = longer + self.more_bytes(first, missing)
        return self.files.expected_size(write_example(first), counts, ROWS_AT_ONCE, more)

    def run(self) -> Dataset:
        """
        Encodes what is missing.

        Returns:
            [`~datasets.Dataset`]: the examples of the rows, in their order, memory-mapped, with their tensors as one column.
        """
        parts = dict(islice(self.parts.items(), self.process_index, None, self.num_processes))

        def read(numbers: range | list[int]) -> list[tuple[str, Any]]:
            contents = self.found.take(pa.array(np.searchsorted(self.needed, numbers)))
            rows = self.load(numbers, contents) if self.load else rows_at(self.dataset, numbers)
            return [(content, self.prepare(row)) for content, row in zip(contents.to_pylist(), rows, strict=True)]

        def encode(rows: list[tuple[str, Any]]) -> list[dict[str, Any]]:
            examples = self.encode([row for _, row in rows])
            return [example | {CONTENT: content} for (content, _), example in zip(rows, examples, strict=True)]

        number = sum(map(len, parts.values()))
        with tqdm(total=number, desc=f"Precomputing {self.name}", disable=not parts or None) as progress:
            label, done = self.files.prefix, progress.update
            write_files(parts, self.features, read, encode, self.batch_size, done, label, write_example)
        self.wait()
        self.files.add(self.parts)
        if self.process_index == 0 and self.parts:
            self.files.trust(self.parts)
        places = self.files.places(self.found)
        if (lost := int((places < 0).sum())) > 0:
            raise ValueError(
                f"{lost:,} rows of {self.name} are in no file of {self.folder} although they were just encoded: the files were removed, "
                "the processes do not share the folder, or a transform of the dataset makes other rows in each process. Repeat the "
                "command with a `precompute_dir` that all of them share, and a transform that is not random."
            )
        return self.files.dataset(places, self.fingerprint)


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
    prepare: Callable[[dict[str, Any]], Any] = dict,
) -> Dataset:
    """The encoded rows of a whole dataset, see [`data.caching.Encoding`] for the arguments."""
    into, processes = (name, fingerprint, folder, batch_size), (process_index, num_processes, wait)
    return Encoding(dataset, encode, features, *into, *processes, say, prepare).run()


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
        self.places = KeyIndex(keys_of(dataset, key))
        self.rows = selected(dataset, np.arange(len(dataset.data)))

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
        return self.look_up(keys)

    def look_up(self, keys: list[str | None], pin_memory: bool = False) -> dict[str, torch.Tensor]:
        """As `cache[keys]`, with a result in pinned memory if asked for. Each row is copied once, out of the file."""
        column = self.dataset.data.column(TENSORS)
        rows = [column[self.rows[self.places[key]].item()] for key in keys]
        return _stack_rows([np.frombuffer(row.as_buffer(), np.uint8) for row in rows], pin_memory)


DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}  # in the safetensors format


def _stack_rows(rows: list[np.ndarray], pin_memory: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of rows in the safetensors format, stacked as [`data.caching.stack_padded`] does."""
    for row in rows:
        check_tensors(row)
    # 8 bytes with the length of the header, the header, the data, the checksum
    starts = [8 + int.from_bytes(row[:8].tobytes(), "little") for row in rows]
    headers = [json.loads(row[8:start].tobytes()) for row, start in zip(rows, starts, strict=True)]
    stacked = {}
    for name in OPTIONAL:
        if first := next((header[name] for header in headers if name in header), None):
            none = {"dtype": first["dtype"], "shape": [0, *first["shape"][1:]], "data_offsets": [0, 0]}
            headers = [{name: none} | header for header in headers]
    for name, first in headers[0].items():
        if name == "__metadata__":
            continue
        shapes = [header[name]["shape"] for header in headers]
        ends = [[start + end for end in header[name]["data_offsets"]] for start, header in zip(starts, headers)]
        parts = [row[start:end] for row, (start, end) in zip(rows, ends, strict=True)]
        tensor = torch.zeros(len(rows), *max(shapes), dtype=DTYPES[first["dtype"]], pin_memory=pin_memory)
        memory = tensor.view(torch.uint8).numpy().reshape(len(rows), max(map(len, parts)))
        for place, part in zip(memory, parts, strict=True):
            place[: len(part)] = part  # padding of the first dimension comes last
        stacked[name] = tensor
    return stacked


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
