# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Columns of datasets and of streams: fields of objects, replaced columns, undecoded images."""

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset


Row = dict[str, Any]
Source = Dataset | IterableDataset


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
        added = dataset.map(NestedFields(nested))
        if features is None:
            return added
        return added.cast(Features({**features, **{name: type_of(features, path) for name, path in nested.items()}}))
    for name, (column, *fields) in nested.items():
        feature = type_of(dataset.features, (column, *fields))
        values = dataset.with_format("arrow").select_columns([column])[:][column]
        dataset = dataset.add_column(name, pc.struct_field(values, fields), feature=feature)
    return dataset


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
            held = ", ".join(f"`{name}`" for name in found) if isinstance(found, dict) else f"the type {found}"
            raise ValueError(f"The column `{path[0]}` has no field `{'.'.join(path[1:])}`; it has {held}.")
        found = found[field]
    return found


def column_names(dataset: Source) -> list[str]:
    """The columns of a dataset; those of its first row if it is a stream of unknown columns."""
    return dataset.column_names or list(next(iter(dataset), {}))


def without_decoding(dataset: Source) -> Source:
    """Turns off the decoding of images."""
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


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
    array = pa.array(values)  # which is hashed much faster than a list
    feature = Features.from_arrow_schema(pa.schema({name: array.type}))[name]
    order = dataset.column_names
    return dataset.remove_columns(name).add_column(name, array, feature=feature).select_columns(order)


class Replacement:
    """Replaces a column of a batch."""

    def __init__(self, name: str, function: Callable[[list], list]):
        self.name, self.function = name, function

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        return {self.name: self.function(batch[self.name])}
