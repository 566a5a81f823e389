# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The columns that trainers accept, and readable errors for what does not fit them."""

import io
import math
from collections.abc import Callable
from typing import Any

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value
from datasets.utils.file_utils import xopen

from ..criteria import Criteria


PREFERENCES = ("chosen", "rejected", "tie")
ATTRIBUTE_COLUMNS = ("positive_attributes", "negative_attributes")


def instance_pair_features() -> Features:
    """
    The columns of [`InstanceDPOTrainer`]: an image pair, and the instances that both images share.

    Boxes are `[x_min, y_min, x_max, y_max]` in pixels of the stored image, before any EXIF orientation is applied.
    `preference` says in which image the instance is drawn better.

    Returns:
        [`~datasets.Features`]
    """
    box = List(Value("float32"), length=4)
    instance = {
        "label": Value("string"),
        "chosen_box": box,
        "rejected_box": box,
        "preference": ClassLabel(names=list(PREFERENCES)),
    }
    return Features(
        {
            "id": Value("string"),
            "prompt": Value("string"),
            "chosen": Image(),
            "rejected": Image(),
            "instances": List(instance),
        }
    )


def attribute_features(criteria: Criteria | None = None) -> Features:
    """
    The columns of [`AttributeSFTTrainer`] and [`ComplexPOTrainer`]: an image, and which attributes of the criteria it has
    in their positive and which in their negative form. Both columns hold ids of attributes.

    Args:
        criteria ([`Criteria`], *optional*):
            The tree. If given, the columns are [`~datasets.ClassLabel`] of its ids; else they are strings.

    Returns:
        [`~datasets.Features`]
    """
    attribute = ClassLabel(names=[leaf.id for leaf in criteria.attributes]) if criteria else Value("string")
    return Features(
        {
            "id": Value("string"),
            "prompt": Value("string"),
            "image": Image(),
            "positive_attributes": List(attribute),
            "negative_attributes": List(attribute),
        }
    )


Datasets = Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None


def each_dataset(
    datasets: Datasets, name: str, function: Callable[[Dataset | IterableDataset, str], Dataset | IterableDataset]
) -> Datasets:
    """
    Applies a function to a dataset, to each of several by name, or to none.

    Args:
        datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`], `dict` or `None`):
            The datasets.
        name (`str`):
            What the user calls them, for messages.
        function (`Callable`):
            From a dataset and its name to a dataset.

    Returns:
        What was given, with the results in the place of the datasets.
    """
    if isinstance(datasets, dict):
        return {split: function(dataset, f"{name}[{split!r}]") for split, dataset in datasets.items()}
    return None if datasets is None else function(datasets, name)


def prepare_dataset(
    dataset: Dataset | IterableDataset, name: str, columns: tuple[str, ...], image_columns: tuple[str, ...]
) -> Dataset | IterableDataset:
    """
    Checks a dataset's columns, leaves its images undecoded (so that an unreadable one can be named, and its EXIF
    orientation seen), and numbers the rows of a dataset in memory that has no `id`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            What the user calls it, for messages: `"train_dataset"` or `"eval_dataset"`.
        columns (`tuple[str, ...]`):
            The columns it must have.
        image_columns (`tuple[str, ...]`):
            Those of them that hold images.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If a column is missing (for a stream, `id` too), if the dataset is empty, or if `instances` has
            another type or other labels.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"`{name}` must be a `datasets.Dataset` or `datasets.IterableDataset`, got `{type(dataset).__name__}`. If it "
            'is a `DatasetDict`, pass one of its splits, such as `dataset["train"]`.'
        )
    if isinstance(dataset, IterableDataset) or dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # rows as Python objects; a transform of the user's stays
    present = dataset.column_names
    if present is None:  # a stream whose columns are not declared
        present = list(next(iter(dataset), {}))
    if not present or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"`{name}` has no rows.")
    if missing := [column for column in columns if column not in present]:
        raise ValueError(
            f"`{name}` lacks the column{'s' if len(missing) > 1 else ''} {_quoted(missing)}; it has {_quoted(present)}. "
            f"Needed are {_quoted(columns)}: rename columns with `dataset.rename_columns`, or build them as described in "
            "docs/source/dataset_formats.md."
        )
    features = dataset.features or {}
    _check_instances_feature(features.get("instances"), name)
    for column in image_columns:
        if isinstance(features.get(column), Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    if "id" in present:
        return dataset
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`{name}` is a stream without the column `id`. Noise, crops and flips follow from a row's id, and the rows of "
            "a stream cannot be numbered, since its shards are read side by side: add an `id` column with `dataset.map`."
        )
    return dataset.add_column("id", [str(index) for index in range(len(dataset))])


def _check_instances_feature(feature: Any, name: str) -> None:
    if feature in (None, Value("null"), List(Value("null"))):  # unknown, or no row has any
        return
    if not isinstance(feature, List) or not isinstance(feature.feature, dict):
        raise ValueError(
            f"The column `instances` of `{name}` must be a list of instances, got {feature}. See "
            "`trl_diffusion.instance_pair_features()` for its type."
        )
    preference = feature.feature.get("preference")
    if isinstance(preference, ClassLabel) and tuple(preference.names) != PREFERENCES:
        raise ValueError(
            f"The labels of `instances.preference` of `{name}` must be {_quoted(PREFERENCES)} in this order, got "
            f"{_quoted(preference.names)}. Store the names as strings, or cast to `ClassLabel(names={list(PREFERENCES)})`."
        )


def open_image(value: Any) -> PIL.Image.Image:
    """
    Opens an image of a dataset, with the pixels as they are stored.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            An image, its encoded bytes, a path, or what an undecoded [`~datasets.Image`] column gives: a dictionary with
            `bytes` or `path`.

    Returns:
        `PIL.Image.Image`: the image, loaded.

    Raises:
        `ValueError`: If the value holds no image.
        `OSError`: If the file is missing or is not a readable image.
    """
    image = _open_lazily(value)
    image.load()
    return image


def image_size(value: Any) -> tuple[int, int]:
    """
    The size of an image of a dataset once it is upright, from its header where the format allows it.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            As [`data.formats.open_image`] takes it.

    Returns:
        `tuple[int, int]`: height and width in pixels.

    Raises:
        `ValueError`: If the value holds no image.
        `OSError`: If the file is missing or is not a readable image.
    """
    image = _open_lazily(value)
    turned = image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return image.size if turned else (image.height, image.width)


def image_content(value: Any) -> PIL.Image.Image | bytes:
    """
    Reads an image of a dataset, without opening it.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            As [`data.formats.open_image`] takes it.

    Returns:
        `PIL.Image.Image` or `bytes`: the image where the value is one, else its file.

    Raises:
        `ValueError`: If the value holds no image.
        `OSError`: If the file is missing.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, PIL.Image.Image | bytes):
        return value
    if isinstance(value, str):
        with xopen(value, "rb") as file:  # a path on disk, in an archive or on the Hub
            return file.read()
    raise ValueError(f"expected an image, its bytes or a path, got {type(value).__name__}")


def _open_lazily(value: Any) -> PIL.Image.Image:
    content = image_content(value)
    return PIL.Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content


def check_box(box: Any, width: int, height: int) -> list[float]:
    """
    Checks a stored box against its image.

    Args:
        box (`list[float]`):
            `[x_min, y_min, x_max, y_max]` in pixels.
        width (`int`):
            Width of the stored image in pixels.
        height (`int`):
            Height of the stored image in pixels.

    Returns:
        `list[float]`: the box. A coordinate may lie up to one pixel outside of the image, as detectors' boxes do.

    Raises:
        `ValueError`: If the box has not four finite numbers, is inverted or empty, or reaches outside of the image.
    """
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise ValueError(f"{box} is not a list of four numbers [x_min, y_min, x_max, y_max]")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in box):
        raise ValueError(f"{box} has a coordinate that is not a finite number")
    x_min, y_min, x_max, y_max = box
    if x_min >= x_max or y_min >= y_max:
        raise ValueError(f"{box} is inverted or empty: it must have x_min < x_max and y_min < y_max, in pixels")
    if x_min < -1 or y_min < -1 or x_max > width + 1 or y_max > height + 1:
        raise ValueError(
            f"{box} reaches outside of its image, which is {width} pixels wide and {height} high: boxes are in pixels of "
            "the stored image, not of a resized one"
        )
    return list(box)


def check_preference(preference: Any) -> str:
    """
    Reads an instance's preference.

    Args:
        preference (`int` or `str`):
            A name of `PREFERENCES`, or its index as a [`~datasets.ClassLabel`] stores it.

    Returns:
        `str`: `"chosen"`, `"rejected"` or `"tie"`.

    Raises:
        `ValueError`: If it is something else.
    """
    if preference in PREFERENCES:
        return preference
    if isinstance(preference, int) and 0 <= preference < len(PREFERENCES):
        return PREFERENCES[preference]
    raise ValueError(f"{preference!r} is none of {_quoted(PREFERENCES)}")


def check_attribute_columns(
    dataset: Dataset | IterableDataset, name: str, criteria: Criteria, allow_none: bool
) -> None:
    """
    Checks the attributes of a dataset against the criteria: the type of the columns, and every row, unless the dataset is
    a stream or has a transform of the user's, whose rows are checked as they come.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            What the user calls it, for messages.
        criteria ([`Criteria`]):
            The tree.
        allow_none (`bool`):
            Whether a row may be without any attribute.

    Raises:
        `ValueError`: If a column has other labels than the tree, or a row does not fit, see [`check_attributes`]; rows
            without any attribute are named together.
    """
    ids = [attribute.id for attribute in criteria.attributes]
    for column in ATTRIBUTE_COLUMNS:
        feature = (dataset.features or {}).get(column)
        label = getattr(feature, "feature", None)
        if isinstance(label, ClassLabel) and label.names != ids:
            raise ValueError(
                f"The labels of `{column}` of `{name}` are not the attributes of the criteria {criteria.name!r} in their "
                "order. Name the tree that the dataset was annotated with as `criteria`, or store ids as strings."
            )
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":
        return
    without = []
    for row in dataset.select_columns(["id", *ATTRIBUTE_COLUMNS]):
        if not any(check_attributes(row, criteria)) and not allow_none:
            without.append(str(row["id"]))
    if without:
        raise ValueError(
            f"{len(without)} of the {len(dataset)} rows of `{name}` have neither positive nor negative attributes, so "
            f"that there is nothing to learn from them: the rows with id {_shortened(without)}. Drop them with "
            '`dataset.filter(lambda row: row["positive_attributes"] or row["negative_attributes"])`.'
        )


def check_attributes(row: dict[str, Any], criteria: Criteria) -> tuple[list[str], list[str]]:
    """
    Reads the attributes of a row.

    Args:
        row (`dict`):
            A row with `id`, `positive_attributes` and `negative_attributes`, which hold ids of attributes or their
            indices as a [`~datasets.ClassLabel`] stores them.
        criteria ([`Criteria`]):
            The tree.

    Returns:
        `tuple[list[str], list[str]]`: the ids of the positive and of the negative attributes.

    Raises:
        `ValueError`: If an attribute is not in the tree (names the nearest), or is given twice, as positive and as
            negative or within one column.
    """
    ids = []
    for column in ATTRIBUTE_COLUMNS:
        attributes = row[column] if row[column] is not None else []
        if not isinstance(attributes, list | tuple):
            raise ValueError(f"`{column}` of the row with id {row['id']!r} must be a list of ids, got {attributes!r}.")
        try:
            ids.append([criteria.find(attribute).id for attribute in attributes])
        except ValueError as error:
            raise ValueError(f"`{column}` of the row with id {row['id']!r}: {error}.") from error
        if twice := {attribute for attribute in ids[-1] if ids[-1].count(attribute) > 1}:
            raise ValueError(f"`{column}` of the row with id {row['id']!r} has {_quoted(sorted(twice))} twice.")
    if both := sorted(set(ids[0]) & set(ids[1])):
        raise ValueError(
            f"The row with id {row['id']!r} has {_quoted(both)} as positive and as negative at once. An attribute of one "
            "image is one or the other, or in neither column."
        )
    return ids[0], ids[1]


def _quoted(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shortened(ids: list[str], maximum: int = 20) -> str:
    more = len(ids) - maximum
    return ", ".join(ids[:maximum]) + (f" and {more} more" if more > 0 else "")
