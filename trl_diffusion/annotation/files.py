# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Annotations as JSON lines, CSV or Parquet, with names instead of the integers of class labels."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from ..files import TEMPORARY, sync
from ..messages import cut, shown


def save_annotations(annotations: Dataset, path: str | Path) -> None:
    """
    Writes annotations to a file that [`annotation.join.load_annotations`] and `--dataset_name` read. Class labels are written as
    their names: `Dataset.to_json` writes integers, whose meaning is then lost. Lists in a CSV file are JSON.

    ```python
    >>> from trl_diffusion import load_annotations, save_annotations

    >>> save_annotations(load_annotations("annotations"), "annotations.jsonl")
    ```

    Args:
        annotations ([`~datasets.Dataset`]):
            Annotations, or another dataset without images.
        path (`str` or `Path`):
            The file, which ends in `.jsonl`, `.csv` or `.parquet`.

    Raises:
        `ValueError`: If it ends in anything else.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"{path} must end in .jsonl, .csv or .parquet.")
    as_text = path.suffix == ".csv"
    named = {name: without_labels(feature) for name, feature in annotations.features.items()}
    if as_text:
        named = {name: Value("string") if isinstance(feature, List) else feature for name, feature in named.items()}
    named_rows = Named(annotations.features, as_text)
    # A cached result may be of another version of this package
    rows = annotations.with_format(None).map(named_rows, features=Features(named), load_from_cache_file=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        if as_text:
            rows.to_csv(temporary)
        elif path.suffix == ".jsonl":
            rows.to_json(temporary, force_ascii=False)
        else:
            rows.to_parquet(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Named:
    """Writes the class labels of a row as names, and its lists as JSON if `as_text`."""

    def __init__(self, features: Features, as_text: bool):
        self.features, self.as_text = features, as_text

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        named = {name: with_names(value, self.features[name]) for name, value in row.items()}
        if not self.as_text:
            return named
        return {
            name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
            for name, value in named.items()
        }


def with_names(value: Any, feature: Any) -> Any:
    """A value of a column, with names for its class labels."""
    if isinstance(feature, ClassLabel):
        return feature.names[value] if isinstance(value, int) and 0 <= value < len(feature.names) else value
    if isinstance(feature, List) and value is not None:
        return [with_names(item, feature.feature) for item in value]
    if isinstance(feature, dict) and value is not None:
        return {name: with_names(value[name], feature[name]) for name in feature}
    return value


def without_labels(feature: Any) -> Any:
    """A type with strings for its class labels."""
    if isinstance(feature, ClassLabel):
        return Value("string")
    if isinstance(feature, List):
        return List(without_labels(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: without_labels(part) for name, part in feature.items()}
    return feature


def name_reader(feature: Any, column: str, names: Iterable[str]) -> Callable[[Any], str]:
    """
    Returns what reads a column of class labels or names.

    Args:
        feature (`Any`):
            Type of the values.
        column (`str`):
            The column, for messages.
        names (`Iterable[str]`):
            The names that may occur.

    Returns:
        `Callable`: from a value to its name.

    Raises:
        `ValueError`: If the values are integers without names. When a value is read, if it is another name.
    """
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "string" in feature.dtype):
        raise ValueError(
            f"`{column}` of the annotations is {cut(str(feature))}, which has no names: what the values mean was lost when they were "
            f"written, such as with `Dataset.to_json`. Write annotations with `save_annotations`, which writes names "
            f"({', '.join(names)}); or, if they were written by this version, give the values their names with "
            "`annotations.cast(PAIR_ANNOTATION_FEATURES)` of `trl_diffusion.annotation.records`."
        )

    def read(value: Any) -> str:
        name = with_names(value, feature)
        if name not in names:
            raise ValueError(f"`{column}` of the annotations is {shown(name)}, which is none of {', '.join(names)}.")
        return name

    return read


def read_bool(value: Any) -> bool:
    """A truth value, or its text in a CSV file."""
    return value.strip().lower() in ("true", "1") if isinstance(value, str) else bool(value)
