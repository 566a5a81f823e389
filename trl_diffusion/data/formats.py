# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The columns of datasets, and readable errors for invalid data."""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value
from datasets.utils.file_utils import xopen

from ..criteria import Criteria
from .pictures import orientation


PREFERENCES = ("chosen", "rejected", "tie")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
ATTRIBUTE_COLUMNS = ("positive_attributes", "negative_attributes")


def instance_pair_features() -> Features:
    """
    The columns of [`InstanceDPOTrainer`]: a pair of images, and the instances that both images show.

    Boxes are `[x_min, y_min, x_max, y_max]` in pixels of the stored image, before any EXIF orientation is applied.
    `preference` is the image in which the instance is depicted better.

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
    The columns of [`AttributeSFTTrainer`] and [`ComplexPOTrainer`]: an image, and its attributes in positive and in negative
    form. Both columns of attributes contain their ids.

    Args:
        criteria ([`Criteria`], *optional*):
            The criteria tree. If given, the ids are [`~datasets.ClassLabel`]s of the tree; otherwise they are strings.

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
    Applies a function to a dataset, or to each of several named datasets. `None` stays `None`.

    Args:
        datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`], `dict` or `None`):
            The datasets.
        name (`str`):
            Name of the parameter, for messages.
        function (`Callable`):
            From a dataset and its name to a dataset.

    Returns:
        The same structure with the results of the function.
    """
    if isinstance(datasets, dict):
        return {split: function(dataset, f"{name}[{split!r}]") for split, dataset in datasets.items()}
    return None if datasets is None else function(datasets, name)


def all_datasets(*datasets: Datasets) -> list[Dataset | IterableDataset]:
    """All datasets among some arguments, each of which is a dataset, several by name, or `None`."""
    several = [split.values() if isinstance(split, dict) else [split] for split in datasets]
    return [dataset for splits in several for dataset in splits if dataset is not None]


def prepare_dataset(
    dataset: Dataset | IterableDataset, name: str, columns: tuple[str, ...], image_columns: tuple[str, ...]
) -> Dataset | IterableDataset:
    """
    Checks the columns of a dataset, adds an `id` column to a dataset in memory that has none, and turns off the decoding of
    images, so that errors can name the row and EXIF orientations are kept.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            Name of the parameter, for messages: `"train_dataset"` or `"eval_dataset"`.
        columns (`tuple[str, ...]`):
            The required columns.
        image_columns (`tuple[str, ...]`):
            Those of them that contain images.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If a column is missing (in a stream also `id`), if the dataset is empty, or if `instances` has a wrong
            type or wrong labels.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"`{name}` must be a `datasets.Dataset` or `datasets.IterableDataset`, got `{type(dataset).__name__}`. If it "
            'is a `DatasetDict`, pass one of its splits, such as `dataset["train"]`.'
        )
    if isinstance(dataset, IterableDataset) or dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # rows as Python objects; keeps a transform of the user
    present = dataset.column_names
    if present is None:  # a stream with unknown columns
        present = list(next(iter(dataset), {}))
    if not present or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"`{name}` has no rows.")
    if missing := [column for column in columns if column not in present]:
        raise ValueError(
            f"`{name}` lacks the column{'s' if len(missing) > 1 else ''} {_quoted(missing)}; it has {_quoted(present)}. "
            f"The required columns are {_quoted(columns)}: rename columns with `dataset.rename_columns`, or create them as "
            "described in docs/source/dataset_formats.md."
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
            f"`{name}` is a stream without the column `id`. Noise, crops and flips depend on the id of a row, and the rows of a "
            "stream cannot be numbered because its shards are read in parallel: add an `id` column with `dataset.map`."
        )
    return dataset.add_column("id", [str(index) for index in range(len(dataset))])


def _check_instances_feature(feature: Any, name: str) -> None:
    if feature in (None, Value("null"), List(Value("null"))):  # unknown type, or no instances at all
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
    Opens an image of a dataset, without applying its EXIF orientation.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            An image, its encoded bytes, a path, or a value of an undecoded [`~datasets.Image`] column: a dictionary with
            `bytes` or `path`.

    Returns:
        `PIL.Image.Image`: the image, loaded.

    Raises:
        `ValueError`: If the value is not an image, or one that cannot be read.
        `OSError`: If the file is missing.
    """
    content = image_content(value)
    with image_errors(content):
        image = _open_lazily(content)
        image.load()
    return image


def image_size(value: Any) -> tuple[int, int]:
    """
    Size of an image of a dataset after its EXIF orientation is applied. Only the header is read if the format allows it.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            As [`data.formats.open_image`] takes it.

    Returns:
        `tuple[int, int]`: height and width in pixels.

    Raises:
        `ValueError`: If the value is not an image, or one that cannot be read.
        `OSError`: If the file is missing.
    """
    content = image_content(value)
    with image_errors(content):
        image = _open_lazily(content)
    return image.size if orientation(image) in (5, 6, 7, 8) else (image.height, image.width)


def image_content(value: Any) -> PIL.Image.Image | bytes:
    """
    Reads an image of a dataset without decoding it.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            As [`data.formats.open_image`] takes it.

    Returns:
        `PIL.Image.Image` or `bytes`: the image if the value is one, otherwise the content of its file.

    Raises:
        `ValueError`: If the value is not an image.
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


@contextmanager
def image_errors(content: PIL.Image.Image | bytes) -> Iterator[None]:
    """
    Turns what PIL raises on a file that it cannot read into a `ValueError` with the reason.

    Args:
        content (`PIL.Image.Image` or `bytes`):
            The image, as [`data.formats.image_content`] returns it.
    """
    if content == b"":
        raise ValueError("the image is empty: it has no bytes")
    try:
        yield
    except PIL.UnidentifiedImageError as error:
        if content[4:8] == b"ftyp" and content[8:12] in HEIC_BRANDS:
            raise ValueError("this is a HEIC file, which Pillow does not read: convert it to JPEG or PNG") from error
        raise ValueError(f"this is not an image that can be read; it starts with {content[:16]!r}") from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"the image claims too many pixels: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # on broken files, PIL raises whatever its decoders run into
        raise ValueError(f"the image is broken: {error}") from error


def _open_lazily(content: PIL.Image.Image | bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content


def check_box(box: Any, width: int, height: int) -> list[float]:
    """
    Checks that a box fits its image.

    Args:
        box (`list[float]`):
            `[x_min, y_min, x_max, y_max]` in pixels.
        width (`int`):
            Width of the stored image in pixels.
        height (`int`):
            Height of the stored image in pixels.

    Returns:
        `list[float]`: the box. Coordinates may be up to one pixel outside the image, as in boxes of detectors.

    Raises:
        `ValueError`: If the box is not four finite numbers, is inverted or empty, or extends beyond the image.
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
    Converts the preference of an instance to a string.

    Args:
        preference (`int` or `str`):
            One of `PREFERENCES`, or its index in a [`~datasets.ClassLabel`].

    Returns:
        `str`: `"chosen"`, `"rejected"` or `"tie"`.

    Raises:
        `ValueError`: If it is neither.
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
    Checks that the attributes of a dataset are those of the criteria: the types of the columns, and all rows. The rows of a
    stream, or of a dataset with a transform, are checked when they are read instead.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            Name of the parameter, for messages.
        criteria ([`Criteria`]):
            The criteria tree.
        allow_none (`bool`):
            Whether rows without attributes are allowed.

    Raises:
        `ValueError`: If the labels of a column are not the attributes of the tree, or if a row is invalid, see
            [`data.formats.check_attributes`]. Rows without attributes are listed in one message.
    """
    ids = [attribute.id for attribute in criteria.attributes]
    for column in ATTRIBUTE_COLUMNS:
        feature = (dataset.features or {}).get(column)
        label = getattr(feature, "feature", None)
        if isinstance(label, ClassLabel) and label.names != ids:
            raise ValueError(
                f"The labels of `{column}` of `{name}` are not the attributes of the criteria {criteria.name!r} in their "
                "order. Pass the tree of the annotation as `criteria`, or store ids as strings."
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
            f"nothing can be learned from them: the rows with id {shortened(without)}. Remove them with "
            '`dataset.filter(lambda row: row["positive_attributes"] or row["negative_attributes"])`.'
        )


def check_attributes(row: dict[str, Any], criteria: Criteria) -> tuple[list[str], list[str]]:
    """
    Reads the attributes of a row.

    Args:
        row (`dict`):
            A row with `id`, `positive_attributes` and `negative_attributes`, which contain ids of attributes or their indices
            in a [`~datasets.ClassLabel`].
        criteria ([`Criteria`]):
            The criteria tree.

    Returns:
        `tuple[list[str], list[str]]`: the ids of the positive and the negative attributes.

    Raises:
        `ValueError`: If an attribute is not in the tree (the message names the nearest one), or occurs twice, in one column or
            in both.
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
            f"The row with id {row['id']!r} has {_quoted(both)} as positive and as negative at once. An attribute is in one of "
            "the two columns, or in neither."
        )
    return ids[0], ids[1]


def _quoted(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def shortened(ids: list[str], maximum: int = 20) -> str:
    """Ids for a message: the first ones, and how many more there are."""
    more = len(ids) - maximum
    return ", ".join(ids[:maximum]) + (f" and {more} more" if more > 0 else "")
