# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The columns of annotations, and tables of their rows."""

from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Features, List, Value

from ..data.formats import PREFERENCES
from ..messages import shown


UNWRITABLE = (pa.ArrowException, TypeError, ValueError, OverflowError)  # what Arrow raises at values that do not fit
ANNOTATIONS = ("instances", "positive_attributes", "negative_attributes")  # only rows that are ok have any
SCHEMA_VERSION = 1  # increases with every change of the features below or of their meaning
STATUSES = ("ok", "rejected", "error")

_BOX = List(Value("float32"), length=4)
_MASK = {"size": List(Value("int32"), length=2), "counts": Value("string")}  # see `segmentation.encode_rle`
PAIR_ANNOTATION_FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "status": ClassLabel(names=list(STATUSES)),
        "reason": Value("string"),
        "chosen_uid": Value("string"),
        "rejected_uid": Value("string"),
        "tie": Value("bool"),
        "planner_answer": Value("string"),
        "instances": List(
            {
                "label": Value("string"),
                "chosen_box": _BOX,
                "rejected_box": _BOX,
                "chosen_score": Value("float32"),
                "rejected_score": Value("float32"),
                "preference": ClassLabel(names=list(PREFERENCES)),
                "answer": Value("string"),
                "swapped_answer": Value("string"),
            }
        ),
        "dropped": List({"label": Value("string"), "reason": Value("string")}),
    }
)
PAIR_MASK_FEATURES = Features(
    {
        **PAIR_ANNOTATION_FEATURES,
        "instances": List(
            PAIR_ANNOTATION_FEATURES["instances"].feature | {"chosen_mask": _MASK, "rejected_mask": _MASK}
        ),
        "without_mask": List({"label": Value("string"), "image": Value("string"), "reason": Value("string")}),
    }
)
IMAGE_ANNOTATION_FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "status": ClassLabel(names=list(STATUSES)),
        "reason": Value("string"),
        "image_uid": Value("string"),
        "positive_attributes": List(Value("string")),
        "negative_attributes": List(Value("string")),
        "answers": List({"dimension": Value("string"), "answer": Value("string")}),
    }
)


def encode_row(row: dict[str, Any]) -> dict[str, Any]:
    """
    Encodes a row for Parquet: class labels become indices.

    Args:
        row (`dict`):
            A row from `to_row`.

    Returns:
        `dict`
    """
    encoded = row | {"status": STATUSES.index(row["status"])}
    if "instances" in row:
        encoded["instances"] = [
            instance | {"preference": PREFERENCES.index(instance["preference"])} for instance in row["instances"]
        ]
    return encoded


def to_table(rows: list[dict[str, Any]], schema: pa.Schema) -> tuple[list[dict[str, Any]], pa.Table]:
    """
    Puts rows into a table. A row that does not fit becomes an error.

    Args:
        rows (`list[dict]`):
            Rows from `to_row`.
        schema (`pyarrow.Schema`):
            Columns of the table.

    Returns:
        `tuple[list[dict], pyarrow.Table]`: the rows as they are in the table, and the table.
    """
    try:
        return rows, pa.Table.from_pylist([encode_row(row) for row in rows], schema=schema)
    except UNWRITABLE:
        rows = [writable_row(row, schema) for row in rows]
        # One table for each row, because all of them together may be too large for one
        return rows, pa.concat_tables(pa.Table.from_pylist([encode_row(row)], schema=schema) for row in rows)


def writable_row(row: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The row if it fits the columns, else an error with as much of it as fits."""
    encoded, problems, kept = encode_row(row), [], dict(row)
    for column in schema:
        try:
            pa.array([encoded[column.name]], column.type)
        except UNWRITABLE as error:
            problems.append(f"{column.name}: {' '.join(str(error).split())[:200]}")
            kept[column.name] = readable(row[column.name]) if pa.types.is_string(column.type) else None
    if problems:
        reason = readable(f"the row cannot be written: {'; '.join(problems)}")
        kept |= {"status": "error", "reason": reason}
        kept |= {name: [] for name in ANNOTATIONS if name in kept}
    return kept


def readable(value: Any) -> str:
    """A value as text that can be written, with question marks instead of single surrogates."""
    value = value if isinstance(value, str) else shown(value)
    return value.encode("utf-8", "replace").decode()
