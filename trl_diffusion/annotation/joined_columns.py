# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Joins a dataset in memory with its annotations by columns: images stay where they are, and no row becomes a Python object."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from ..batching import in_threads
from ..data.columns import beside, for_table
from ..data.content import state_of
from ..data.formats import ATTRIBUTE_COLUMNS, PREFERENCES
from ..revisions import package_digest
from .joined_rows import BOXES, MASKS, png_of, read_stored


ROWS_AT_ONCE, IMAGES_AT_ONCE = 10_000, 16
ROWS_WITH_MASKS = 200  # at once


class Uids:
    """
    The uids of the images of rows.

    Args:
        columns (`dict[str, str]`):
            From our column names to those of the source.
        names (`tuple[str, ...]`):
            Our names of the images.
    """

    def __init__(self, columns: dict[str, str], names: tuple[str, ...]):
        self.columns, self.names = columns, names

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {
            name: in_threads(lambda row, name=name: read_stored(row, self.columns, name)[0], rows)
            for name in self.names
        }


def image_uids(source: Dataset, columns: dict[str, str], names: tuple[str, ...]) -> pa.Table:
    """
    The uids of images, from the columns that hold them, or else from the images, which are read once.

    Args:
        source ([`~datasets.Dataset`]):
            The rows.
        columns (`dict[str, str]`):
            From our column names to those of the source.
        names (`tuple[str, ...]`):
            Our names of the images.

    Returns:
        `pa.Table`: a column of texts for each name.

    Raises:
        `ValueError`: If the file of an image cannot be read.
    """
    if all(f"{name}_uid" in columns for name in names):
        held = source.select_columns([columns[f"{name}_uid"] for name in names]).with_format("arrow")[:]
        return held.cast(pa.schema([(name, pa.string()) for name in held.column_names])).rename_columns(list(names))
    needed = {name: column for name, column in columns.items() if name == "id" or name.removesuffix("_uid") in names}
    stored = source.select_columns([columns[name] for name in names])
    uids = source.select_columns(list(needed.values())).map(
        Uids(needed, names),
        batched=True,
        batch_size=IMAGES_AT_ONCE,
        remove_columns=list(needed.values()),
        features=Features({name: Value("string") for name in names}),
        desc="Reading images",
        # `datasets` finds an earlier result by this: it knows the paths of images, and not whether other files are there now
        new_fingerprint=Hasher.hash((source._fingerprint, needed, names, file_states(stored), package_digest())),
    )
    return uids.with_format("arrow")[:]


def file_states(source: Dataset) -> list[tuple[str, tuple[int, ...] | None]]:
    """The paths of the images of a dataset that holds no bytes of them, and the states of these files, see [`data.content.state_of`]."""
    paths: dict[str, None] = {}
    for name in source.column_names:
        column = source.data.column(name)
        if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
            is_outside = pc.is_null(pc.struct_field(column, "bytes"))
            paths |= dict.fromkeys(pc.struct_field(column, "path").filter(is_outside).to_pylist())
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            paths |= dict.fromkeys(column.to_pylist())
    return [(path, state_of(path) if os.path.exists(path) else None) for path in paths if path]


def orientation(stored: pa.Table, chosen: pa.ChunkedArray, rejected: pa.ChunkedArray) -> np.ndarray:
    """
    Which of two images is chosen.

    Args:
        stored (`pa.Table`):
            The uids of both images of each row.
        chosen, rejected (`pa.ChunkedArray`):
            Those of the annotations.

    Returns:
        `np.ndarray`: 0 for the first, 1 for the second, -1 if they are other images.
    """
    first, second = stored.columns
    is_straight = pc.and_(pc.equal(first, chosen), pc.equal(second, rejected))
    is_turned = pc.and_(pc.equal(second, chosen), pc.equal(first, rejected))
    found = np.where(pc.fill_null(is_turned, False).to_numpy(), 1, -1)
    return np.where(pc.fill_null(is_straight, False).to_numpy(), 0, found)


class AnnotatedColumns:
    """
    What a joined row has of its annotation.

    Args:
        preference (`Callable`, *optional*):
            Reads a preference; `None` for annotations of single images.
    """

    def __init__(self, preference: Callable[[Any], str] | None):
        self.preference = preference

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.preference is None:
            return pa.table({name: self.lists(table[name])[0] for name in ATTRIBUTE_COLUMNS})
        lists, items = self.lists(table["instances"])
        if pa.types.is_null(items.type):
            return pa.table({"instances": lists})
        fields = {name: pc.struct_field(items, name) for name in ("label", *BOXES)}
        for name in MASKS:
            if items.type.get_field_index(name) >= 0:
                pngs = in_threads(png_of, pc.struct_field(items, name).to_pylist())
                fields[name] = pa.array(pngs, Image().pa_type)
        given = pc.struct_field(items, "preference").dictionary_encode(null_encoding="encode")
        codes = [PREFERENCES.index(self.preference(value)) for value in given.dictionary.to_pylist()]
        fields["preference"] = pa.array(codes, pa.int64()).take(given.indices)
        structs = pa.StructArray.from_arrays(list(fields.values()), list(fields))
        return pa.table({"instances": pa.ListArray.from_arrays(lists.offsets, structs)})

    def lists(self, column: pa.ChunkedArray) -> tuple[pa.ListArray, pa.Array]:
        """A column of lists with empty ones in place of nulls, and the items of all."""
        column = column.combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        items = column.flatten()
        return pa.ListArray.from_arrays(pa.array(np.append(0, lengths.cumsum()), pa.int32()), items), items


def joined_columns(
    source: Dataset,
    columns: dict[str, str],
    ids: list[str],
    turned: np.ndarray,
    annotations: Dataset,
    places: np.ndarray,
    features: Features,
    preference: Callable[[Any], str] | None,
) -> Dataset:
    """
    Puts the columns of rows and of their annotations side by side.

    Args:
        source ([`~datasets.Dataset`]):
            The rows that are joined.
        columns (`dict[str, str]`):
            From our column names to those of the source.
        ids (`list[str]`):
            The ids of the rows.
        turned (`np.ndarray` of shape `(N,)`):
            Whether the second of two images is the chosen one: bool.
        annotations ([`~datasets.Dataset`]):
            The annotations.
        places (`np.ndarray` of shape `(N,)`):
            The annotation of each row.
        features ([`~datasets.Features`]):
            The columns of the result.
        preference (`Callable`, *optional*):
            Reads a preference of an annotation of a pair.

    Returns:
        [`~datasets.Dataset`]: a selection of rows of a table whose images are those of the source.
    """
    if "instances" in features:
        names = ("image_0", "image_1") if "image_0" in columns else ("chosen", "rejected")
        parts = [dict(zip(("chosen", "rejected"), order, strict=True)) for order in (names, names[::-1])]
        rows = [(~turned).nonzero()[0], turned.nonzero()[0]]
    else:
        parts, rows = [{"image": "image"}], [np.arange(len(source))]
    made = []
    for names, numbers in zip(parts, rows, strict=True):
        if len(numbers):
            taken = {"prompt": columns["prompt"]} | {ours: columns[name] for ours, name in names.items()}
            part = source.select_columns(list(taken.values())).select(numbers)
            made.append(part.rename_columns({column: ours for ours, column in taken.items() if column != ours}))
    order = np.argsort(np.concatenate(rows))
    joined = concatenate_datasets(made).select(order)
    for name in features:
        if isinstance(features[name], Image):
            joined = joined.cast_column(name, Image())
    if joined.data.column("prompt").null_count:
        prompts = pc.fill_null(joined.data.column("prompt"), "")
        joined = beside(joined.remove_columns("prompt"), {"prompt": prompts}, features, "prompts")
    of_table = for_table(joined, pa.array(places)).fill_null(0)  # a row that is not selected may have any
    annotated = annotations.select(of_table.to_numpy()).select_columns(
        [name for name in features if name in annotations.features and name not in ("id", "prompt")]
    )
    has_masks = "instances" in features and set(MASKS) <= set(features["instances"].feature)
    annotated = annotated.with_format("arrow").map(
        AnnotatedColumns(preference),
        batched=True,
        batch_size=ROWS_WITH_MASKS if has_masks else ROWS_AT_ONCE,
        features=Features({name: features[name] for name in annotated.column_names}),
        load_from_cache_file=False,  # which may be of another version of this package
        desc="Joining annotations",
    )
    joined = beside(joined, {"id": for_table(joined, pa.array(ids, pa.string()))}, features, "ids")
    return beside(joined, annotated.data, features, annotated._fingerprint).select_columns(list(features))
