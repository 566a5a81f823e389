# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Checks the types and values of whole columns from Arrow, in seconds for a million rows."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, Json, LargeList, List, Value

from ..messages import cut, quoted


TEXT = ("string", "large_string", "string_view")
BINARY = ("binary", "large_binary", "binary_view")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBERS = (*INTEGERS, "float16", "float32", "float64")
PREFERENCES = ("chosen", "rejected", "tie")
ATTRIBUTE_COLUMNS = ("positive_attributes", "negative_attributes")
UNKNOWN = (None, Value("null"), List(Value("null")))  # no type is known, or every value is null
LARGEST_NUMBER = float(np.finfo(np.float32).max)  # boxes are computed in float32
MOST_INSTANCES = 1000  # of a row; masks of more take gigabytes
BOXES = ("chosen_box", "rejected_box")
MASKS = ("chosen_mask", "rejected_mask")
ROWS_AT_ONCE = 50_000
MOST_PATHS = 10_000  # of more, as many are looked for, at equal distances: each may be a request to a server


def type_faults(features: Features, name: str, image_columns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """
    What is wrong with the types of the columns of a dataset.

    Args:
        features ([`~datasets.Features`]):
            The types.
        name (`str`):
            Name of the dataset, for messages.
        image_columns (`tuple[str, ...]`):
            The columns of images.

    Yields:
        `tuple[str, str]`: the column, and what is wrong with it and what to do.
    """
    prompt, row_id = features.get("prompt"), features.get("id")
    if not _is_value(prompt, TEXT) and prompt not in UNKNOWN[:2]:
        yield "prompt", _mistyped("prompt", name, "strings", prompt) + _cast("prompt", "string")
    if not _is_value(row_id, (*TEXT, *INTEGERS)) and row_id not in UNKNOWN[:2]:
        yield (
            "id",
            (
                _mistyped("id", name, "strings or integers", row_id)
                + 'Other types change on their way through files. Remove it with `dataset.remove_columns("id")`, and rows are '
                'numbered, or cast it: `dataset.cast_column("id", Value("string"))`.'
            ),
        )
    for column in image_columns:
        feature = features.get(column)
        is_stored = isinstance(feature, dict) and {"bytes", "path"} & feature.keys()
        if not (isinstance(feature, Image) or is_stored or _is_value(feature, (*TEXT, *BINARY)) or feature in UNKNOWN):
            yield (
                column,
                (
                    _mistyped(column, name, "images", feature)
                    + "Store images as `datasets.Image`, encoded bytes or paths."
                ),
            )
    yield from _instance_faults(features.get("instances"), name)
    for column in ATTRIBUTE_COLUMNS:
        feature = features.get(column)
        label = _item(feature)
        if feature is None or _is_value(feature, ("null",)):
            continue
        if label is None:
            yield column, _mistyped(column, name, "lists of ids; the column of each row must be a list", feature)
        elif not (isinstance(label, ClassLabel) or _is_value(label, (*TEXT, *INTEGERS, "null"))):
            yield (
                column,
                (
                    _mistyped(column, name, "lists of ids", feature)
                    + "Numbers without names could be those of any tree: store ids as strings, or as the `ClassLabel` of "
                    "`trl_diffusion.attribute_features(criteria)`."
                ),
            )


def _instance_faults(feature: Any, name: str) -> Iterator[tuple[str, str]]:
    if feature in UNKNOWN:
        return
    fields = _item(feature)
    if not isinstance(fields, dict):
        yield (
            "instances",
            (
                f"The column `instances` of `{name}` must be a list of instances, got {cut(str(feature))}. See "
                "`trl_diffusion.instance_pair_features()` for its type."
                + (
                    " In JSON, write every field in every instance, null where there is none."
                    if holds_json(feature)
                    else ""
                )
            ),
        )
        return
    for field, mask in zip(BOXES, MASKS, strict=True):
        box = fields.get(field)
        if not _is_mask(fields.get(mask)):
            yield (
                f"instances.{mask}",
                (
                    _mistyped(f"instances.{mask}", name, "segmentation masks", fields.get(mask))
                    + "Store either PNG images as `datasets.Image`, encoded bytes or paths, or run-length encodings with `size` and `counts`."
                ),
            )
        if box in UNKNOWN[:2] and fields.get(mask) not in UNKNOWN[:2]:
            continue  # all instances have masks
        if _item(box) is None or not _is_value(_item(box), (*NUMBERS, "null")):
            yield f"instances.{field}", _mistyped(f"instances.{field}", name, "lists of four numbers", box)
    preference = fields.get("preference")
    if isinstance(preference, ClassLabel) and tuple(preference.names) != PREFERENCES:
        yield (
            "instances.preference",
            (
                f"The labels of `instances.preference` of `{name}` must be `chosen`, `rejected`, `tie` in this order, got "
                f"{quoted(preference.names)}. Store the names as strings, or cast to "
                f"`ClassLabel(names={list(PREFERENCES)})`."
            ),
        )
    elif not isinstance(preference, ClassLabel) and not _is_value(preference, TEXT):
        yield (
            "instances.preference",
            (
                _mistyped("instances.preference", name, "names", preference)
                + "Numbers without names could mean anything: store `chosen`, `rejected` or `tie` as strings, or cast to "
                f"`ClassLabel(names={list(PREFERENCES)})` if they are the indices of these."
            ),
        )


def _is_mask(feature: Any) -> bool:
    """Whether a type is that of segmentation masks, or none."""
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & feature.keys()) != ({"size", "counts"} <= feature.keys())
    return isinstance(feature, Image) or _is_value(feature, (*TEXT, *BINARY)) or feature in UNKNOWN[:2]


def holds_json(feature: Any) -> bool:
    """Whether a type, or one in it, is that of JSON objects."""
    if isinstance(feature, List | LargeList):
        return holds_json(feature.feature)
    if isinstance(feature, dict):
        return any(map(holds_json, feature.values()))
    return isinstance(feature, Json)


def _item(feature: Any) -> Any:
    """The type of the items of a list, else `None`."""
    return feature.feature if isinstance(feature, List | LargeList) else None


def _is_value(feature: Any, types: tuple[str, ...]) -> bool:
    return type(feature) is Value and feature.dtype in types


def _mistyped(column: str, name: str, wanted: str, feature: Any) -> str:
    return f"The column `{column}` of `{name}` must contain {wanted}, got {cut(str(feature))}. "


def _cast(column: str, dtype: str) -> str:
    return f'If they are meant, cast it: `dataset.cast_column("{column}", Value("{dtype}"))`.'


# ----- values -----


def bad_rows(dataset: Dataset, column: str, is_bad: Callable[[pa.ChunkedArray], np.ndarray]) -> np.ndarray:
    """
    Finds rows by the Arrow data of one column. No row becomes a Python object.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset, which may be a selection of rows, in any order.
        column (`str`):
            The column.
        is_bad (`Callable`):
            From a part of the column, in chunks, to a bool for each row.

    Returns:
        `np.ndarray`: the numbers of the rows, in order.
    """
    values = dataset.data.column(column)
    parts = (values.slice(start, ROWS_AT_ONCE) for start in range(0, len(values), ROWS_AT_ONCE))
    bad = np.concatenate([np.asarray(is_bad(without_views(without_masks(part))), dtype=bool) for part in parts])
    return selected(dataset, bad).nonzero()[0]


def without_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column whose texts are stored in one piece: Arrow computes little with views."""
    kind = viewless(column.type)
    return column if kind == column.type else column.cast(kind)


def viewless(kind: pa.DataType) -> pa.DataType:
    """A type with large texts in place of views."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(viewless(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(viewless(kind.value_type)))
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(kind, kind)


def selected(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """The values of the rows of a dataset, out of those of all rows of the table that it selects from."""
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


def nulls(column: pa.ChunkedArray) -> np.ndarray:
    """Which values are null."""
    return column.is_null().to_numpy(zero_copy_only=False)


def without_image(column: pa.ChunkedArray) -> np.ndarray:
    """Which values hold no image: they are null, or have neither bytes nor a path, or an empty one."""
    parts = [column]
    if pa.types.is_struct(column.type):
        parts = [pc.struct_field(column, part) for part in ("bytes", "path") if column.type.get_field_index(part) >= 0]
    empty = np.ones(len(column), dtype=bool)
    for part in parts:
        empty &= ~_not_empty(part)
    return empty


def _not_empty(values: pa.ChunkedArray) -> np.ndarray:
    """Which values are texts or bytes, and have some."""
    if not (_is_text(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        return np.zeros(len(values), dtype=bool)
    lengths = pc.binary_length(values)
    return pc.fill_null(pc.greater(lengths, pa.scalar(0, lengths.type)), False).to_numpy(zero_copy_only=False)


def missing_files(dataset: Dataset, column: str) -> np.ndarray:
    """
    Finds images whose file does not exist. Of more than 10,000, 10,000 at equal distances are looked for.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        column (`str`):
            A column of undecoded images, or of paths.

    Returns:
        `np.ndarray`: the numbers of the rows, in order.
    """
    paths, rows = dataset.data.column(column), np.arange(len(dataset))
    if pa.types.is_struct(paths.type):
        has_path = bad_rows(dataset, column, _is_path)
        rows = rows[has_path]
    elif not _is_text(paths.type):
        return rows[:0]
    if len(rows) > MOST_PATHS:
        rows = rows[np.linspace(0, len(rows) - 1, MOST_PATHS).round().astype(int)]
    places = rows if dataset._indices is None else dataset._indices.column(0).to_numpy()[rows]
    found = []
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        value = paths[place].as_py()
        path = value["path"] if isinstance(value, dict) else value
        if path and "://" not in path and not os.path.exists(path):  # else an address, or a place in an archive
            found.append(row)
    return np.array(found, dtype=int)


def _is_path(column: pa.ChunkedArray) -> np.ndarray:
    """Which values of an undecoded column of images have a path and no bytes."""
    has = {}
    for part in ("bytes", "path"):
        values = pc.struct_field(column, part) if column.type.get_field_index(part) >= 0 else pa.nulls(len(column))
        has[part] = _not_empty(values)
    return has["path"] & ~has["bytes"]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def repeated(dataset: Dataset, column: str) -> tuple[int, np.ndarray]:
    """
    Finds values that occur more than once.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        column (`str`):
            A column of strings or integers.

    Returns:
        `tuple[int, np.ndarray]`: the number of rows that repeat an earlier one, and all rows with the first such value.
    """
    encoded = without_views(dataset.data.column(column)).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    codes = selected(dataset, encoded.indices.to_numpy(zero_copy_only=False))
    values, counts = np.unique(codes, return_counts=True)
    often = values[counts > 1]
    if not len(often):
        return 0, often
    first = codes[np.isin(codes, often).nonzero()[0][0]]
    return int((counts - 1).sum()), (codes == first).nonzero()[0]


def bad_instances(column: pa.Array) -> np.ndarray:
    """
    Which rows have an instance that is null, without a preference, whose box is no box whatever the size of its image, or that has
    neither a box nor a mask.

    Args:
        column (`pa.Array`):
            A part of the column `instances`.

    Returns:
        `np.ndarray`: a bool for each row.
    """
    items, parents = column.flatten(), pc.list_parent_indices(column).to_numpy()
    bad = nulls(items)
    for field, mask in zip(BOXES, MASKS, strict=True):
        boxes, has_mask = _field(items, field), _has_mask(_field(items, mask))
        if pa.types.is_null(boxes.type):
            bad |= ~has_mask
            continue
        of_four = pc.fill_null(pc.equal(pc.list_value_length(boxes), 4), False)
        numbers = boxes.filter(of_four).flatten()
        numbers = numbers.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).reshape(-1, 4)
        x_min, y_min, x_max, y_max = numbers.T
        fine = (-1 <= x_min) & (x_min < x_max) & (-1 <= y_min) & (y_min < y_max)  # not so for NaN
        fine &= (x_max <= LARGEST_NUMBER) & (y_max <= LARGEST_NUMBER)
        of_four = of_four.to_numpy(zero_copy_only=False)
        bad |= ~of_four & ~(nulls(boxes) & has_mask)
        bad[of_four.nonzero()[0]] |= ~fine
    preference = pc.struct_field(items, "preference")
    names = PREFERENCES if _is_text(preference.type) else range(len(PREFERENCES))
    bad |= ~pc.is_in(preference, pa.array(names, preference.type)).to_numpy(zero_copy_only=False)
    rows = np.zeros(len(column), dtype=bool)
    rows[parents[bad]] = True
    return rows | (pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False) > MOST_INSTANCES)


def _field(items: pa.StructArray, name: str) -> pa.Array:
    """A field of structs, of nulls where they have no such field."""
    return pc.struct_field(items, name) if items.type.get_field_index(name) >= 0 else pa.nulls(len(items))


def without_masks(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """
    Puts into lists of instances, in the place of masks, whether they are there. What the masks hold is neither read nor copied.

    Args:
        column (`pa.ChunkedArray`):
            A column.

    Returns:
        `pa.ChunkedArray`: the same one if it holds no masks.
    """
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if (
        not is_list
        or not pa.types.is_struct(column.type.value_type)
        or not set(column.type.value_type.names) & {*MASKS}
    ):
        return column
    return pa.chunked_array([_without_masks(lists) for lists in column.chunks or [pa.array([], column.type)]])


def _without_masks(lists: pa.Array) -> pa.LargeListArray:
    starts = lists.offsets.to_numpy().astype(np.int64)
    items = lists.values.slice(starts[0], starts[-1] - starts[0])  # `flatten` copies where lists are null
    fields = dict(zip(items.type.names, items.flatten(), strict=True))
    fields |= {name: pa.array(_has_mask(fields[name])) for name in MASKS if name in fields}
    made = pa.StructArray.from_arrays(list(fields.values()), list(fields), mask=items.is_null())
    return pa.LargeListArray.from_arrays(pa.array(starts - starts[0]), made, mask=lists.is_null())


def _has_mask(masks: pa.Array) -> np.ndarray:
    """Which masks are there: are not null, and have some part that is not. Those of `without_masks` say it themselves."""
    if pa.types.is_boolean(masks.type):
        return masks.to_numpy(zero_copy_only=False)
    if not pa.types.is_struct(masks.type):
        return ~nulls(masks)
    return np.logical_or.reduce([~nulls(part) for part in masks.flatten()])


def attribute_codes(column: pa.ChunkedArray) -> tuple[list, np.ndarray, np.ndarray]:
    """
    The attributes of a column as numbers.

    Args:
        column (`pa.ChunkedArray`):
            Lists of ids, or of labels.

    Returns:
        `tuple`: the distinct values, and for each value of each list its row and its place among the distinct values.
    """
    rows, items, start = [], [], 0
    for chunk in without_views(column).chunks:
        if not pa.types.is_null(chunk.type):
            items.append(chunk.flatten())
            rows.append(pc.list_parent_indices(chunk).to_numpy() + start)
        start += len(chunk)
    if not items:
        return [], np.zeros(0, dtype=int), np.zeros(0, dtype=int)
    encoded = pa.concat_arrays(items).dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), np.concatenate(rows), encoded.indices.to_numpy()
