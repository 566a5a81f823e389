# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The columns of public preference datasets, and how those of a dataset become the trainers' columns."""

import json
import logging
from collections import Counter
from pathlib import PurePath
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from ..messages import quoted, shortened
from .columns import Source, check_names, column_names, with_nested_columns, without_decoding


logger = logging.getLogger(__name__)

Row = dict[str, Any]

PAIR = ("prompt", "chosen", "rejected")
# `label_0` is 1 if `image_0` is chosen, 0 if `image_1` is, and 0.5 for a tie
UNORDERED_PAIR = ("prompt", "image_0", "image_1", "label_0")
SINGLE = ("prompt", "image")
# From our names to those of the dataset. Pick-a-Pic v1 and v2 have the same columns.
PICK_A_PIC_COLUMNS = {
    "id": "ranking_id",
    "prompt": "caption",
    "image_0": "jpg_0",
    "image_1": "jpg_1",
    "label_0": "label_0",
    "image_0_uid": "image_0_uid",
    "image_1_uid": "image_1_uid",
    "has_label": "has_label",
}
PRESETS = {
    "Pick-a-Pic": PICK_A_PIC_COLUMNS,
    "Pick-a-Pic as WebDataset": {
        "id": "id",
        "prompt": "original_prompt.txt",
        "image_0": "jpg_0.jpg",
        "image_1": "jpg_1.jpg",
        "label_0": "label_0.txt",
    },
    "pairs with a label": {name: name for name in ("id", *UNORDERED_PAIR, "image_0_uid", "image_1_uid", "has_label")},
    "HPDv3": {"prompt": "prompt", "chosen": "path1", "rejected": "path2"},
}
FIELDS = {  # files of a WebDataset: without a suffix from SUFFIXES, or the suffix alone
    "prompt": ("prompt", "caption", "text", "txt"),
    "chosen": ("chosen", "winner", "win", "w"),
    "rejected": ("rejected", "loser", "lose", "l"),
    "image": ("image", "png", "jpg", "jpeg", "webp"),
}
SUFFIXES = (".txt", ".png", ".jpg", ".jpeg", ".webp")
OPTIONAL_COLUMNS = {"id", "has_label", "image_0_uid", "image_1_uid", "chosen_uid", "rejected_uid", "image_uid"}
MAPPABLE = (
    "id",
    *PAIR,
    *UNORDERED_PAIR[1:],
    "has_label",
    "instances",
    "image",
    "label",
    "positive_attributes",
    "negative_attributes",
)


# ----- which columns hold what -----


def recognise(present: list[str], names: tuple[str, ...]) -> tuple[str, dict[str, str]] | None:
    """
    Recognises the columns of a dataset that has other names.

    Args:
        present (`list[str]`):
            Columns of the dataset.
        names (`tuple[str, ...]`):
            Our names, `PAIR` or `SINGLE`.

    Returns:
        `tuple`: a sentence that says what it is read as, and the mapping from our names to its columns; or `None`.

    Raises:
        `ValueError`: If the columns fit several layouts.
    """
    if set(names) <= set(present):
        return "Read", {name: name for name in names}
    found = {}
    if names == PAIR:
        for preset, columns in PRESETS.items():
            if all(column in present for name, column in columns.items() if name not in OPTIONAL_COLUMNS):
                found[f"Read as {preset}"] = {name: column for name, column in columns.items() if column in present}
    candidates = {name: [column for column in present if is_named(column, name)] for name in names}
    if all(candidates.values()):
        if doubtful := {name: columns for name, columns in candidates.items() if len(columns) > 1 and not found}:
            name, columns = next(iter(doubtful.items()))
            example = json.dumps({name: columns[0] for name, columns in candidates.items()})
            raise ValueError(
                f"`{name}` may be any of the columns {quoted(columns)}. Name the columns with "
                f"`--columns`, such as `--columns '{example}'`."
            )
        if all(len(columns) == 1 for columns in candidates.values()):
            mapping = {name: columns[0] for name, columns in candidates.items()}
            changed = [f"{quoted([column])} as `{name}`" for name, column in mapping.items() if name != column]
            found[f"Read {', '.join(changed)}"] = mapping
    if len(found) > 1:
        raise ValueError(
            f"The columns {quoted(present)} can be read in several ways: {'; '.join(found)}. Name "
            'those to read with `--columns`, such as `--columns \'{"prompt": "caption", "chosen": "winner", "rejected": '
            '"loser"}\'`.'
        )
    return next(iter(found.items()), None)


def is_named(column: str, name: str) -> bool:
    """Whether a column has our name, or is the file of a WebDataset that can only mean it, such as `w.png` for `chosen`."""
    path = PurePath(column.lower())
    if path.suffix in SUFFIXES:
        return path.stem in FIELDS[name]
    return column == name or (f".{column}" in SUFFIXES and column in FIELDS[name])


def refuse_what_has_no_pairs(present: list[str]) -> None:
    """
    Refuses public datasets that cannot be trained on, by name.

    Args:
        present (`list[str]`):
            Columns of the dataset.

    Raises:
        `ValueError`: If the columns are those of an edition without images, or of ranked lists.
    """
    if {"caption", "label_0", "image_0_uid"} <= set(present) and "jpg_0" not in present:
        raise ValueError(
            "This is an edition of Pick-a-Pic without images: it has addresses (`image_0_url`), not `jpg_0` and `jpg_1`. Use "
            "an edition with images."
        )
    if {"rank", "image_path", "prompt"} <= set(present):
        raise ValueError(
            "These are the ranked lists of HPDv2's `test.json`, not pairs: use `train.json`, or write pairs with the columns "
            "`prompt`, `chosen` and `rejected`."
        )


def refuse_archived_images(dataset: Source, columns: dict[str, str]) -> None:
    """
    Refuses HPDv3 as it is on the Hub, where the paths of its images lead into archives.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        columns (`dict[str, str]`):
            From our names to its columns.

    Raises:
        `ValueError`: If the images are paths that no file has told the folder of.
    """
    feature = (dataset.features or {}).get(columns.get("chosen"))
    if columns.get("chosen") == "path1" and isinstance(feature, Value):
        raise ValueError(
            "The images of HPDv3 are in archives on the Hub, which its rows name by paths. Download the repository, unpack the "
            "images, and name its `train.json` with `--dataset_name`."
        )


def read_label(value: Any) -> float | None:
    """
    Reads `label_0`, which may be a number or its text.

    Args:
        value (`Any`):
            The value.

    Returns:
        `float`: 1, 0 or 0.5; `None` if it is no label.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    try:
        label = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return label if label in (0, 0.5, 1) else None


def is_unlabelled(value: Any) -> bool:
    """Whether `has_label` says that a row has no label. It may be text, from a CSV file."""
    return value is not None and str(value).strip().lower() in ("false", "0")


# ----- the trainers' columns -----


def training_columns(dataset: Source, mapping: dict[str, str] | None = None) -> Source:
    """
    Gives a dataset the trainers' columns: those that the user names, or those of a layout that is recognised. Which one, and
    how many rows without a label or with a tie are left out, is logged. A dataset in memory is not copied.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        mapping (`dict[str, str]`, *optional*):
            From the trainers' columns to those of the dataset. For pairs whose label tells which image is chosen, `image_0`,
            `image_1` and `label_0` (1, 0 or 0.5) are named instead of `chosen` and `rejected`.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the same rows if there is nothing to change.

    Raises:
        `ValueError`: If a column is missing or ambiguous, a name is unknown, or no pair has a label.
    """
    if mapping:
        check_names(mapping)
        dataset = with_nested_columns(dataset, mapping.values())
        present = column_names(dataset)
        check_mapping(mapping, present)
        return renamed(dataset, kept_columns(present, mapping) | mapping, "Read as `--columns` says")
    present = column_names(dataset)
    if set(PAIR) <= set(present) or set(SINGLE) <= set(present):
        return dataset
    refuse_what_has_no_pairs(present)
    found = recognise(present, PAIR) or recognise(present, SINGLE)
    if found is None:
        return dataset
    refuse_archived_images(dataset, found[1])
    return renamed(dataset, kept_columns(present, found[1]) | found[1], found[0])


def kept_columns(present: list[str], mapping: dict[str, str]) -> dict[str, str]:
    """The columns that have the trainers' names already, besides those of a mapping."""
    replaced = ("chosen", "rejected") if "label_0" in mapping else ("image_0", "image_1", "label_0", "has_label")
    names = [name for name in MAPPABLE if name in present and name not in replaced]
    return {name: name for name in names if name not in mapping and name not in mapping.values()}


def check_mapping(mapping: dict[str, str], present: list[str]) -> None:
    """Checks the names of a mapping."""
    if unknown := [name for name in mapping if name not in MAPPABLE]:
        raise ValueError(f"`--columns` names {shortened(unknown)}; it may name {', '.join(MAPPABLE)}.")
    if missing := [column for column in mapping.values() if column not in present]:
        raise ValueError(
            f"`--columns` names {quoted(missing)}, which the dataset lacks; it has {quoted(present)}. A field of a column of "
            "objects is named with a dot, such as `json.caption`."
        )
    if double := [column for column, times in Counter(mapping.values()).items() if times > 1]:
        raise ValueError(f"`--columns` names the column {quoted(double[:1])} twice.")
    if given := {"image_0", "image_1", "label_0"} & set(mapping):
        if absent := {"image_0", "image_1", "label_0"} - set(mapping):
            raise ValueError(
                f"`--columns` names {', '.join(sorted(given))}, so it must name {', '.join(sorted(absent))}."
            )


def renamed(dataset: Source, columns: dict[str, str], read_as: str) -> Source:
    """Selects and renames columns, and turns labels into chosen and rejected images."""
    if "label_0" in columns:
        return Orientation(columns, read_as)(dataset)
    logger.warning(f"{read_as}.")
    changed = {column: name for name, column in columns.items() if name != column}
    return dataset.select_columns(list(columns.values())).rename_columns(changed)


class Orientation:
    """
    Turns pairs with a label into chosen and rejected images.

    Args:
        columns (`dict[str, str]`):
            From our names to those of the dataset.
        read_as (`str`):
            What the dataset is read as, a sentence.
    """

    def __init__(self, columns: dict[str, str], read_as: str):
        self.columns, self.read_as = columns, read_as
        self.others = {name: column for name, column in columns.items() if name in ("id", "prompt", "instances")}

    def __call__(self, dataset: Source) -> Source:
        return self.of_stream(dataset) if isinstance(dataset, IterableDataset) else self.of_dataset(dataset)

    def label(self, label: Any, has_label: Any) -> float | None:
        return None if is_unlabelled(has_label) else read_label(label)

    def of_dataset(self, dataset: Dataset) -> Dataset:
        """Selects rows of both labels, and puts them back into their order. No image is copied."""
        columns = self.columns
        of_rows = dataset.with_format(None)
        known = of_rows[columns["has_label"]][:] if "has_label" in columns else [None] * len(dataset)
        labels = [self.label(*row) for row in zip(of_rows[columns["label_0"]][:], known, strict=True)]
        parts, order = [], []
        for label, chosen, rejected in ((1, "image_0", "image_1"), (0, "image_1", "image_0")):
            rows = [number for number, found in enumerate(labels) if found == label]
            names = {column: name for name, column in self.others.items()}
            names |= {columns[chosen]: "chosen", columns[rejected]: "rejected"}
            if rows:
                part = dataset.select(rows).select_columns([*self.others.values(), columns[chosen], columns[rejected]])
                parts.append(part.rename_columns({old: new for old, new in names.items() if old != new}))
                order += rows
        if not order:
            raise ValueError(
                f"{self.read_as}, none of the {len(labels):,} pairs has a label that says which image is better: "
                f"`{columns['label_0']}` must be 1 or 0."
            )
        counts = Counter(labels)
        logger.warning(
            f"{self.read_as}: {len(order):,} pairs. Left out: {counts[0.5]:,} ties and {counts[None]:,} rows without a "
            "label."
        )
        return concatenate_datasets(parts).select(sorted(range(len(order)), key=order.__getitem__))

    def of_stream(self, dataset: IterableDataset) -> IterableDataset:
        """Turns rows as they are read."""
        logger.warning(f"{self.read_as}: ties and rows without a label are left out.")
        features = dataset.features
        if features is not None:
            columns = {name: features[column] for name, column in self.others.items()}
            features = Features(columns | dict.fromkeys(("chosen", "rejected"), features[self.columns["image_0"]]))
        dataset = without_decoding(dataset)
        stream = dataset.map(self.turn, batched=True, batch_size=16, remove_columns=column_names(dataset))
        return stream if features is None else stream.cast(features)

    def turn(self, batch: dict[str, list]) -> dict[str, list]:
        """Turns a batch of rows."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        turned: dict[str, list] = {name: [] for name in (*self.others, "chosen", "rejected")}
        for row in rows:
            label = self.label(row[self.columns["label_0"]], row.get(self.columns.get("has_label")))
            if label not in (0, 1):
                continue
            images = [row[self.columns["image_0"]], row[self.columns["image_1"]]]
            found = {name: row[column] for name, column in self.others.items()}
            found |= {"chosen": images[1 - int(label)], "rejected": images[int(label)]}
            for name, value in found.items():
                turned[name].append(value)
        return turned
