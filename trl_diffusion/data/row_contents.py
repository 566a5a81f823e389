# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What each row of a dataset is made of: a hash of its values and of the content of its images, wherever they lie."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from datasets.fingerprint import Hasher
from datasets.table import ConcatenationTable, InMemoryTable, MemoryMappedTable, Table

from .column_checks import MASKS, viewless
from .content import ABSENT, TICK_NS, FileIndex, read_sealed, state_of, write_sealed
from .hashing import described, hash_of, value_hashes
from .images import image_content


ROWS_AT_ONCE = 1000
STORED = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})


def kept_folder() -> Path:
    """Where is kept what this machine found out about the contents of files."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_diffusion" / "content"


class RowContents:
    """
    Hashes of the rows of a dataset. Rows with equal values and images have one hash, in any dataset and wherever they are stored; another
    value in any column, or another content of an image file, is another hash.

    Files that did not change since are not read again, see [`data.content.FileIndex`]: neither images nor memory-mapped rows.
    What is behind an address is told by the address alone. Where a transform of the user makes the rows, they are made.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        image_columns (`tuple[str, ...]`):
            The columns of images.
    """

    def __init__(self, dataset: Dataset, image_columns: tuple[str, ...]):
        self.dataset, self.image_columns = dataset, image_columns

    def of(self, rows: np.ndarray) -> pa.StringArray:
        """
        The hashes of some rows.

        Args:
            rows (`np.ndarray`):
                The numbers of the rows.

        Returns:
            `pa.StringArray`
        """
        if self.dataset.format["type"] == "custom":
            return pa.array([self._of_made_row(self.dataset[int(row)]) for row in rows], pa.string())
        names = sorted(self.dataset.column_names)
        types = [
            (name, name in self.image_columns or described(hashed_type(self.dataset.data.schema.field(name).type)))
            for name in names
        ]
        seed, places = xxhash.xxh3_64_intdigest(repr(types).encode()), rows
        if self.dataset._indices is not None:
            places = self.dataset._indices.column(0).to_numpy()[rows].astype(np.int64)
        places, rows = np.unique(places, return_inverse=True)  # in the order of the files
        digests = [self._of_column(name, places)[rows] for name in names]
        joined, width = memoryview(np.stack(digests, axis=1).tobytes()), 8 * len(names)
        starts = range(0, len(joined), width)
        return pa.array(
            [xxhash.xxh3_128_hexdigest(joined[start : start + width], seed) for start in starts], pa.string()
        )

    def load(self, numbers: range | list[int], contents: pa.Array) -> list[dict[str, Any]]:
        """
        Some rows, with the bytes of their images.

        Args:
            numbers (`list[int]`):
                The numbers of the rows.
            contents (`pa.Array`):
                Their hashes.

        Returns:
            `list[dict]`

        Raises:
            `ValueError`: If a row has another hash by now. Those that a transform of the user makes are not compared.
        """
        rows = rows_at(self.dataset, numbers)
        if self.dataset.format["type"] == "custom":
            return rows
        table = self.dataset.with_format("arrow")[numbers]
        for name in self.image_columns:
            loaded = [load_image(row[name]) for row in rows]
            for row, image in zip(rows, loaded, strict=True):
                row[name] = image
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(loaded, STORED))
        if any(image_fields(field.type) for field in table.schema):
            table = with_loaded_masks(table, rows)
        now = RowContents(Dataset(table), self.image_columns).of(np.arange(len(rows)))
        for row, was, is_ in zip(rows, contents.to_pylist(), now.to_pylist(), strict=True):
            if was != is_:
                raise ValueError(
                    f"The row with id {row['id']!r} changed while it was precomputed: an image file was replaced. Repeat the command: "
                    "what is finished stays, and the row is read as it is then."
                )
        return rows

    def _of_made_row(self, row: dict[str, Any]) -> str:
        images = {}
        for name in self.image_columns:
            try:
                images[name] = image_content(row[name])
            except (OSError, ValueError):  # which is said where the image is used
                images[name] = row[name]
        if "instances" in row:
            images["instances"] = load_masks(row["instances"])
        return Hasher.hash(sorted((row | images).items(), key=lambda item: item[0]))

    def _of_column(self, name: str, places: np.ndarray) -> np.ndarray:
        """A hash `(N,)` of each value at some places of the table."""
        found, start = np.empty(len(places), np.uint64), 0
        for table in tables_with(self.dataset.data, name):
            of_table = np.nonzero((start <= places) & (places < start + len(table)))[0]
            if len(of_table):
                found[of_table] = self._of_table(table, name, places[of_table] - start)
            start += len(table)
        return found

    def _of_table(self, table: Table, name: str, places: np.ndarray) -> np.ndarray:
        """The same of one table, from what is kept of it as far as it is known."""
        is_image, kept = name in self.image_columns, Kept(table, name) if is_mapped(table, name) else None
        values = InMemoryTable(table.table.select([name]))
        digests = np.zeros(len(places), np.uint64)
        is_known = np.zeros(len(places), bool)
        if kept is not None:
            digests, is_known = kept.digests[places], kept.is_known[places]
        paths: dict[int, str] = {}
        in_files: list[int] = []  # places of values that have masks in files
        missing = np.nonzero(~is_known)[0]
        for first in range(0, len(missing), ROWS_AT_ONCE):
            some = missing[first : first + ROWS_AT_ONCE]
            piece = pick(values, places[some]).column(name).combine_chunks()
            if is_image:
                digests[some], of_piece = image_digests(piece)
                paths |= {int(some[place]): path for place, path in of_piece.items()}
            else:
                piece, with_paths = with_mask_digests(piece)
                digests[some] = value_hashes(piece)
                in_files += some[with_paths].tolist()
        if kept is not None and len(missing) > len(paths) + len(in_files):
            kept.add(places, digests, np.setdiff1d(missing, [*paths, *in_files]))
        if paths:
            digests[list(paths)] = path_digests(list(paths.values()))
        return digests


def rows_at(dataset: Dataset, numbers: range | list[int]) -> list[dict[str, Any]]:
    """Some rows of a dataset, by their numbers."""
    columns = dataset[numbers]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# ----- the parts of a table -----


def tables_with(table: Table, name: str) -> Iterator[Table]:
    """The tables that a column of a table consists of."""
    if not isinstance(table, ConcatenationTable):
        yield table
        return
    for side_by_side in table.blocks:
        yield next(block for block in side_by_side if name in block.column_names)


def pick(table: InMemoryTable, places: np.ndarray) -> pa.Table:
    """Some rows of a table. Only these are copied."""
    if places[-1] - places[0] == len(places) - 1 and (np.diff(places) == 1).all():
        return table.fast_slice(int(places[0]), len(places))
    return table.fast_gather(places)


def is_mapped(table: Table, name: str) -> bool:
    """Whether the values of a column lie in the file that now has the name of the table's file. A system that does not tell says no."""
    if not isinstance(table, MemoryMappedTable):
        return False
    addresses = [buffer.address for chunk in table.column(name).chunks for buffer in chunk.buffers() if buffer]
    try:
        inode, maps = str(os.stat(table.path).st_ino), Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    spans = [line.split(maxsplit=5) for line in maps]
    spans = [[int(end, 16) for end in span[0].split("-")] for span in spans if span[4] == inode]
    return bool(addresses) and all(any(start <= address < end for start, end in spans) for address in addresses)


class Kept:
    """
    The digests of the values of a column of a file, as far as they were computed since the file changed.

    Args:
        table (`datasets.table.MemoryMappedTable`):
            The file's table.
        name (`str`):
            The column.
    """

    def __init__(self, table: MemoryMappedTable, name: str):
        key = Hasher.hash((os.path.abspath(table.path), table.replays, name, str(table.schema.field(name).type)))
        self.file, self.path, self.begin = table.path, kept_folder() / f"rows-{key}.arrow", time.time_ns()
        self.state = state_of(table.path)
        found = read_sealed(self.path)
        self.digests, self.is_known = np.zeros(len(table), np.uint64), np.zeros(len(table), bool)
        if (
            found is not None
            and found.schema.metadata[b"state"] == repr(self.state).encode()
            and len(found) == len(table)
        ):
            self.digests, self.is_known = (found[name].to_numpy() for name in ("digest", "is_known"))

    def add(self, places: np.ndarray, digests: np.ndarray, new: np.ndarray) -> None:
        """Keeps those of the digests at some places that are new, unless the file changed just now or meanwhile."""
        if max(self.state[1:3]) >= self.begin - TICK_NS or state_of(self.file) != self.state:
            return
        self.digests, self.is_known = self.digests.copy(), self.is_known.copy()
        self.digests[places[new]], self.is_known[places[new]] = digests[new], True
        columns = {"digest": self.digests, "is_known": self.is_known}
        write_kept(self.path, pa.table(columns).replace_schema_metadata({"state": repr(self.state)}))


def write_kept(path: Path, table: pa.Table) -> None:
    """Writes what spares work the next time, if there is room."""
    try:
        write_sealed(path, table)
    except OSError:
        return


# ----- values -----


def load_image(value: Any) -> dict[str, Any]:
    """A stored image with the bytes of its file; without where it is behind an address, in an archive or cannot be read."""
    stored = value if isinstance(value, dict) else {"bytes" if isinstance(value, bytes) else "path": value}
    content, path = stored.get("bytes"), stored.get("path")
    if not content and path and local_file(path) and "::" not in path:
        with suppress(OSError, ValueError):  # which is said where the image is used
            content = image_content(path)
    return {"bytes": content or None, "path": path}


def image_digests(values: pa.Array) -> tuple[np.ndarray, dict[int, str]]:
    """Hashes `(N,)` of images that are stored as bytes, and the paths of the others by their places."""
    content, paths = image_parts(values)
    ends = np.frombuffer(content.buffers()[1], np.int64)[content.offset : content.offset + len(content) + 1].tolist()
    memory = memoryview(content.buffers()[2] or b"")
    digests = [xxhash.xxh3_128_digest(memory[start:end]) for start, end in zip(ends, ends[1:])]
    return as_numbers(digests), paths


def image_parts(values: pa.Array) -> tuple[pa.LargeBinaryArray, dict[int, str]]:
    """The bytes of images, empty where there are none, and the paths of these by their places."""
    parts = {"bytes": pa.nulls(len(values)), "path": pa.nulls(len(values))}
    if pa.types.is_struct(values.type):
        parts |= {field.name: part for field, part in zip(values.type, values.flatten(), strict=True)}
    else:
        is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        parts["path" if is_text else "bytes"] = values
    content, paths = pc.fill_null(parts["bytes"].cast(pa.large_binary()), b""), parts["path"].cast(pa.large_string())
    has_path = pc.and_(pc.is_valid(paths), pc.equal(pc.binary_length(content), 0))
    places = pc.indices_nonzero(has_path).to_pylist()
    return content, dict(zip(places, paths.filter(has_path).to_pylist(), strict=True))


# ----- masks of instances -----


def image_fields(kind: pa.DataType) -> list[str]:
    """The fields of a list of instances that hold masks as images, which lie in bytes or in files."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return []
    fields = kind.value_type
    return [name for name in MASKS if fields.get_field_index(name) >= 0 and is_stored_image(fields.field(name).type)]


def hashed_type(kind: pa.DataType) -> pa.DataType:
    """The type that [`data.row_contents.with_mask_digests`] makes of a type."""
    return with_mask_digests(pa.array([], kind))[0].type if image_fields(kind) else kind


def is_stored_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    return viewless(kind) in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def with_mask_digests(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """
    Puts hashes of their content in the place of masks.

    Args:
        values (`pa.Array` of length `N`):
            A part of a column.

    Returns:
        `tuple`: the values, the same ones if there are no masks; and the places of those with a mask in a file.
    """
    names = image_fields(values.type)
    if not names:
        return values, np.zeros(0, np.int64)
    items, with_paths = values.flatten(), set()
    fields = dict(zip(items.type.names, items.flatten(), strict=True))
    parents = pc.list_parent_indices(values).to_numpy()
    for name in names:
        masks = fields[name].cast(viewless(fields[name].type))
        digests, paths = image_digests(masks) if len(masks) else (np.zeros(0, np.uint64), {})
        if paths:
            digests[list(paths)] = path_digests(list(paths.values()))
            with_paths.update(parents[list(paths)].tolist())
        fields[name] = pa.array(digests, mask=masks.is_null().to_numpy(zero_copy_only=False))
    made = pa.StructArray.from_arrays(list(fields.values()), list(fields), mask=items.is_null())
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    ends = pa.array(np.append(0, np.cumsum(lengths)), pa.int64())
    return pa.LargeListArray.from_arrays(ends, made, mask=values.is_null()), np.array(sorted(with_paths), np.int64)


def load_masks(instances: Any) -> Any:
    """Instances with the bytes of masks that are stored as images; the very same object if there are none."""

    def is_stored(name: str, value: Any) -> bool:
        return name in MASKS and (isinstance(value, str | bytes) or isinstance(value, dict) and "counts" not in value)

    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        return instances
    if not any(is_stored(*field) for instance in instances for field in instance.items()):
        return instances
    return [
        {name: load_image(value) if is_stored(name, value) else value for name, value in instance.items()}
        for instance in instances
    ]


def with_loaded_masks(table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """Loads the masks of rows and of the table that they come from, as [`data.row_contents.load_image`] does."""
    for place, field in enumerate(table.schema):
        names = image_fields(field.type)
        if not names:
            continue
        for row in rows:
            row[field.name] = load_masks(row[field.name])
        kinds = [part.with_type(STORED) if part.name in names else part for part in field.type.value_type]
        column = pa.array([row[field.name] for row in rows], pa.large_list(pa.struct(kinds)))
        table = table.set_column(place, field.name, column)
    return table


def image_states(dataset: Dataset, image_columns: tuple[str, ...]) -> str:
    """
    Tells whether the images of a dataset, in their order, may have changed: by the states of files, of which none is read, and by the
    content of what is in memory.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset, without a transform of the user.
        image_columns (`tuple[str, ...]`):
            The columns of images.

    Returns:
        `str`: another one for other images, and each time where a file changed just now.
    """
    states = [] if dataset._indices is None else [hash_of(dataset._indices.column(0))]
    files: list[str] = []
    for name in image_columns:
        for table in tables_with(dataset.data, name):
            mapped = is_mapped(table, name)
            if mapped:
                files.append(table.path)
                states.append((table.replays, name))
            for piece in table.column(name).chunks:
                if mapped:
                    files += image_parts(piece)[1].values()
                else:
                    digests, paths = image_digests(piece)
                    files += paths.values()
                    states.append(digests.tobytes())
    places = [os.path.abspath(local_file(path)) for path in files if local_file(path)]
    states += [files, [state_of(path) if os.path.exists(path) else None for path in places]]
    changed = max((max(state[1:3]) for state in states[-1] if state is not None), default=0)
    return Hasher.hash((states, uuid.uuid4().hex if changed > time.time_ns() - TICK_NS else None))


def local_file(path: str) -> str:
    """The file in which an image lies that a path names, empty for an address."""
    file = path.rpartition("::")[2].removeprefix("file://")
    return "" if "://" in file else file


def path_digests(paths: list[str]) -> np.ndarray:
    """Hashes `(N,)` of image files: those of their bytes. Of a place in an archive, that of the archive and the place."""
    files = [os.path.abspath(file) if (file := local_file(path)) else "" for path in paths]
    local = sorted(set(files) - {""})
    hashes = {"": ""}
    if local:
        key = xxhash.xxh3_64_hexdigest(os.fsencode(os.path.commonpath([os.path.dirname(file) for file in local])))
        hashes |= zip(local, FileIndex(kept_folder() / f"files-{key}.arrow").of(local), strict=True)
    digests = []
    for path, file in zip(paths, files, strict=True):
        found = hashes[file]
        if found in ("", ABSENT) or "::" in path:
            digests.append(xxhash.xxh3_128_digest(repr((path, found)).encode()))
        else:
            digests.append(bytes.fromhex(found))
    return as_numbers(digests)


def as_numbers(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), ">u8")[::2].astype(np.uint64)
