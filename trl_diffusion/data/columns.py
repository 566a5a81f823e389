# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Columns of datasets and of streams: fields of objects, replaced columns, undecoded images."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Dataset, Features, Image, IterableDataset, LargeList, List, Value, Video
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable, Table, concat_tables

from ..messages import cut, quoted, shown


Row = dict[str, Any]
Source = Dataset | IterableDataset
MEDIA = (Image, Audio, Video)  # types that `datasets` decodes as it reads a row


def check_names(mapping: dict[str, str]) -> None:
    """Checks that a mapping of names of columns holds names alone. Raises a `ValueError` if not."""
    if not all(isinstance(name, str) for pair in mapping.items() for name in pair):
        raise ValueError(f"`--columns` must map names to names of columns, got {shown(mapping)}.")


def with_nested_columns(dataset: Source, names: Iterable[str]) -> Source:
    """
    Adds the columns that names with dots mean, such as `json.caption`: the field `caption` of the column `json`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        names (`Iterable[str]`):
            Names of columns. Those that the dataset has are left alone.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If a column has no such field.
    """
    present = column_names(dataset)
    nested = {name: path for name in names if name not in present and (path := struct_path(name, present))}
    if not nested:
        return dataset
    if isinstance(dataset, IterableDataset):
        features = dataset.features
        added = without_decoding(dataset).map(NestedFields(nested))
        if features is None:
            return added
        return added.cast(Features({**features, **{name: type_of(features, path) for name, path in nested.items()}}))
    for name, (column, *fields) in nested.items():
        feature = type_of(dataset.features, (column, *fields))
        values = pc.struct_field(dataset.data.column(column), fields)
        dataset = beside(dataset, {name: values}, Features({name: feature}), (column, fields))
    return dataset


def beside(dataset: Dataset, columns: dict[str, Any] | Table, features: Features, key: Any) -> Dataset:
    """
    Adds columns. Unlike `Dataset.add_column`, it rewrites no other column of a selection of rows, and does not hash the values.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset, which may select rows of its table, in any order.
        columns (`dict` or `datasets.table.Table`):
            Arrow values for all rows of the table by name, see [`data.columns.for_table`]; or a table of the right types.
        features ([`~datasets.Features`]):
            The types of these columns, among others.
        key:
            What the values follow from, besides the dataset: its hash is part of the result's fingerprint.

    Returns:
        [`~datasets.Dataset`]: in the format of the dataset.
    """
    names = list(columns) if isinstance(columns, dict) else columns.column_names
    added = Features({name: features[name] for name in names})
    if isinstance(columns, dict):
        table = pa.table(columns)
        if not table.schema.equals(added.arrow_schema):  # a cast to the same type breaks fields of nulls in lists
            table = table.cast(added.arrow_schema)
        columns = InMemoryTable(table)
    info = dataset.info.copy()
    info.features = Features({**dataset.features, **added})
    made = Dataset(
        concat_tables([dataset.data, columns], axis=1),
        info=info,
        split=dataset.split,
        indices_table=dataset._indices,
        fingerprint=Hasher.hash((dataset._fingerprint, names, key)),
    )
    form = dataset.format
    selected = None if set(form["columns"]) == set(dataset.column_names) else form["columns"]
    made.set_format(form["type"], selected, form["output_all_columns"], **form["format_kwargs"])
    return made


def for_table(dataset: Dataset, values: pa.Array) -> pa.Array:
    """Values of the rows of a dataset, put where its table has these rows; null elsewhere. Rows of one place share a value."""
    if dataset._indices is None:
        return values
    places = np.full(len(dataset.data), -1)
    places[dataset._indices.column(0).to_numpy()] = np.arange(len(dataset))
    return values.take(pa.array(places, mask=places < 0))


def numbered(dataset: Dataset) -> Dataset:
    """
    Adds the numbers of the rows as a column `id`.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset, without ids.

    Returns:
        [`~datasets.Dataset`]: with `"0"`, `"1"` and so on.
    """
    if dataset._indices is not None and len(pc.unique(dataset._indices.column(0))) < len(dataset):
        dataset = dataset.flatten_indices()  # a row that is selected twice has two numbers
    numbers = pa.array(np.arange(len(dataset))).cast(pa.string())
    return beside(
        dataset, {"id": for_table(dataset, numbers)}, Features({"id": Value("string")}), "numbers of the rows"
    )


class NestedFields:
    """Adds fields of structs to a row."""

    def __init__(self, nested: dict[str, tuple[str, ...]]):
        self.nested = nested

    def __call__(self, row: Row) -> Row:
        return {name: self.read(row, path) for name, path in self.nested.items()}

    def read(self, value: Any, path: tuple[str, ...]) -> Any:
        for field in path:
            value = value.get(field) if isinstance(value, dict) else None
        return value


def struct_path(name: str, present: list[str]) -> tuple[str, ...] | None:
    """Splits a name with dots at the longest prefix that is a column."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if (column := ".".join(parts[:length])) in present:
            return (column, *parts[length:])
    return None


def type_of(features: Features, path: tuple[str, ...]) -> Any:
    """The type of a field of a column."""
    found = features[path[0]]
    for field in path[1:]:
        if not isinstance(found, dict) or field not in found:
            held = quoted(found) if isinstance(found, dict) else f"the type {cut(str(found))}"
            raise ValueError(
                f"The column {quoted(path[:1])} has no field {quoted(['.'.join(path[1:])])}; it has {held}."
            )
        found = found[field]
    return found


def column_names(dataset: Source) -> list[str]:
    """The columns of a dataset; those of its first row if it is a stream of unknown columns."""
    return dataset.column_names or list(next(iter(dataset), {}))


def without_decoding(dataset: Source, columns: Iterable[str] | None = None) -> Source:
    """
    Turns off the decoding of images, audio and video, also of those in lists and fields.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        columns (`Iterable[str]`, *optional*):
            The columns of which it is turned off. Defaults to all.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: of the same stored rows.
    """
    features = dataset.features or {}
    for column in features if columns is None else columns:
        feature = _undecoded(features.get(column))
        if feature == features.get(column):
            continue
        if isinstance(dataset, IterableDataset) or isinstance(feature, MEDIA):
            dataset = dataset.cast_column(column, feature)
        else:  # `Dataset.cast_column` would write all rows again, although none of them is another
            fingerprint, dataset = Hasher.hash((dataset._fingerprint, "undecoded", column)), copy.copy(dataset)
            dataset._info, dataset._fingerprint = copy.deepcopy(dataset._info), fingerprint
            dataset._info.features[column] = feature
    return dataset


def _undecoded(feature: Any) -> Any:
    """A feature with the same values as they are stored."""
    if isinstance(feature, dict):
        return {name: _undecoded(field) for name, field in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, MEDIA) else feature


def with_column(dataset: Source, name: str, function: Callable[[list], list]) -> Source:
    """
    Replaces a column by a function of its values.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            The column.
        function (`Callable`):
            From a list of values to the list of the new values.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]
    """
    if isinstance(dataset, IterableDataset):
        return without_decoding(dataset).map(Replacement(name, function), batched=True, batch_size=100)
    values = function(dataset.with_format(None).select_columns([name])[:][name])
    try:
        array = pa.array(values)  # which is hashed much faster than a list
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"The values of the column {quoted([name])} are of several types: {cut(str(error))}."
        ) from error
    features, order = Features.from_arrow_schema(pa.schema({name: array.type})), dataset.column_names
    made = beside(dataset.remove_columns(name), {name: for_table(dataset, array)}, features, array)
    return made.select_columns(order)


class Replacement:
    """Replaces a column of a batch."""

    def __init__(self, name: str, function: Callable[[list], list]):
        self.name, self.function = name, function

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        return {self.name: self.function(batch[self.name])}
