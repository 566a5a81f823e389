# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What files of rows cannot say themselves: which texts are lists, and which are paths of images."""

import ast
import copy
import csv
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, LargeList, List, Value

from ..messages import shortened, shown
from .column_checks import MASKS, UNKNOWN, holds_json
from .columns import Replacement, Source, beside, column_names, with_column, without_decoding
from .image_files import IMAGE_SUFFIXES, stamped
from .presets import FIELDS, refuse_what_has_no_pairs


logger = logging.getLogger(__name__)

LISTS = ("instances", "positive_attributes", "negative_attributes", "dropped", "answers")
TEXTS = ("id", "prompt", "caption", "text")
IMAGE_NAMES = {
    *FIELDS["chosen"],
    *FIELDS["rejected"],
    "image",
    "image_0",
    "image_1",
    "path1",
    "path2",
    "jpg_0",
    "jpg_1",
}


# ----- CSV -----


def csv_settings(path: Path) -> dict[str, Any]:
    """
    Settings under which a CSV file keeps what is written in it: every cell is text, so that the id `001` does not become 1, nor
    the prompt `None` nothing.

    Args:
        path (`Path`):
            The file.

    Returns:
        `dict`: keyword arguments of `load_dataset`.
    """
    packed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with pa.input_stream(str(path), compression=packed) as file:
        header = file.read(1 << 16).decode("utf-8-sig", errors="replace")
    line = header.split("\n", 1)[0]
    separator = "\t" if ".tsv" in path.suffixes else max(",;\t", key=line.count)
    try:
        names = next(csv.reader([line.rstrip("\r")], delimiter=separator), [])
    except csv.Error as error:
        raise ValueError(f"the names of its columns cannot be read: {error}") from error
    return {
        "sep": separator,
        "keep_default_na": False,
        "features": Features({name: Value("string") for name in names}),
        "encoding": "utf-8-sig",
    }


# ----- lists as text -----


class ReadLists:
    """
    Reads the lists in a column of texts.

    Args:
        name (`str`):
            The column.
        where (`str`):
            The file, for messages.
    """

    def __init__(self, name: str, where: str):
        self.name, self.where = name, where

    def __call__(self, texts: list) -> list:
        return [self.read(number, text) if isinstance(text, str) else text for number, text in enumerate(texts)]

    def read(self, number: int, text: str) -> list | None:
        if not text.strip():
            return None
        found = read_list(text)
        if not isinstance(found, list):
            raise ValueError(
                f"`{self.name}` in row {number} of {self.where}, counted from 0, is a text that is no JSON list: {shown(text)}. "
                "Write the lists with `json.dumps`, or write JSON lines or Parquet, which hold lists."
            )
        return found


def read_list(text: str) -> Any:
    """
    Reads a list: JSON, what `str` makes of a Python list, or what numpy makes of an array of strings, which `Dataset.to_csv` writes.

    Args:
        text (`str`):
            The text.

    Returns:
        `list`, or something else if the text is no list.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if re.fullmatch(r"\[\s*('[^']*'\s*)*\]", text):  # ['a' 'b'], which Python would read as ['ab']
            return re.findall(r"'([^']*)'", text)
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def with_lists(dataset: Source, where: str) -> Source:
    """
    Reads columns of lists that are stored as text, as in CSV; and instances of which some lack fields that others have, which
    `datasets` reads from JSON as objects of any type.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        where (`str`):
            The file, for messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If a text is no JSON list.
    """
    for name in first_texts(dataset):
        if name in LISTS:
            dataset = with_column(dataset, name, ReadLists(name, where))
    if isinstance(dataset, Dataset) and holds_json(dataset.features.get("instances")):
        dataset = with_column(dataset, "instances", list)
    return dataset


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


# ----- paths of images -----


class FindImages:
    """
    Makes paths of images absolute.

    Args:
        column (`str`):
            The column.
        file (`Path`):
            The file of the rows. Paths are relative to its folder, or to a folder of its name or called `images` beside it.
    """

    def __init__(self, column: str, file: Path):
        folder = file.absolute().parent
        self.column, self.file = column, file
        self.roots = [str(folder), str(folder / file.name.split(".")[0]), str(folder / "images")]
        self.listings: dict[str, list[tuple[str, frozenset[str]]]] = {}

    def __call__(self, paths: list) -> list:
        found = [self.find(path) if isinstance(path, str) else path for path in paths]
        missing = [path for path, place in zip(paths, found, strict=True) if path is not None and place is None]
        if missing:
            raise ValueError(
                f"{len(missing):,} of the {len(paths):,} images in the column `{self.column}` of {self.file} are missing: "
                f"{shortened(missing, 3)}. Paths are relative to "
                f"{self.file.parent}."
            )
        return found

    def find(self, path: str) -> str | None:
        if "://" in path:
            return path
        folder, _, name = path.replace("\\", "/").rpartition("/")
        if path.startswith("/") and not folder:
            folder = "/"
        for place, names in self.places(folder):
            if name in names:
                return os.path.join(place, name)
        return None

    def places(self, folder: str) -> list[tuple[str, frozenset[str]]]:
        """Where a folder may be, and the names in it. It is listed once: to ask for each file takes long on network drives."""
        if folder not in self.listings:
            found = (os.path.normpath(os.path.join(root, folder)) for root in self.roots)
            self.listings[folder] = [
                (place, frozenset(os.listdir(place)))
                for place in dict.fromkeys(found)
                if os.path.isdir(place) and os.access(place, os.R_OK | os.X_OK)
            ]
        return self.listings[folder]


def with_images(dataset: Source, file: Path) -> Source:
    """
    Makes columns of paths columns of images. `chosen_file_name` becomes `chosen`, `file_name` becomes `image`, and in instances
    `chosen_mask_file_name` becomes `chosen_mask`. The rows of a stream without ids get the paths of their images as ids, for they
    cannot be numbered.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        file (`Path`):
            The file of its rows.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If files are missing. Of a stream, when the row is read.
    """
    found: list[str] = []
    names = list(image_paths(dataset, file))
    if names and isinstance(dataset, IterableDataset) and "id" not in column_names(dataset):
        features = dataset.features
        dataset = without_decoding(dataset).map(PathIds(names))
        if features is not None:
            dataset = dataset.cast(Features({**features, "id": Value("string")}))
    for name in names:
        find = FindImages(name, file)
        dataset = with_column(dataset, name, find)
        if isinstance(dataset, Dataset):
            found += [path for path in dataset[name][:] if path and "://" not in path]
        if dataset.features is not None:
            dataset = dataset.cast_column(name, Image())
        if name.endswith("file_name"):
            dataset = dataset.rename_column(name, name.removesuffix("file_name").rstrip("_") or "image")
    dataset, masks = with_masks(dataset, file)
    found += masks
    return stamped(dataset, found) if found else dataset


class PathIds:
    """Gives a row the paths of its images, without suffixes, as id."""

    def __init__(self, names: list[str]):
        self.names = names

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"id": " ".join(os.path.splitext(str(row[name]))[0] for name in self.names if row[name])}


class FindMasks:
    """
    Makes names of files in instances masks, as [`data.tables.FindImages`] finds them.

    Args:
        file (`Path`):
            The file of the rows.
    """

    def __init__(self, file: Path):
        self.file = file
        names = [name for mask in MASKS for name in (mask, name_of_file(mask))]
        self.finders = {name: FindImages(f"instances.{name}", file) for name in names}

    def __call__(self, rows: list) -> list:
        instances = [found for row in rows if isinstance(row, list) for found in row if isinstance(found, dict)]
        for name, find in self.finders.items():
            named = [instance for instance in instances if isinstance(instance.get(name), str)]
            for instance, place in zip(named, find([instance[name] for instance in named]), strict=True):
                instance[name] = {"bytes": None, "path": place}
        for instance in instances:
            for mask in MASKS:
                if (of_file := instance.pop(name_of_file(mask), None)) is not None:
                    self.refuse_two(mask, instance.get(mask) is not None)
                    instance[mask] = of_file
        return rows

    def refuse_two(self, mask: str, has_other: bool) -> None:
        """Refuses a mask that is in two fields."""
        if has_other:
            raise ValueError(
                f"`{mask}` and `{name_of_file(mask)}` in the instances of {self.file} are two fields for one mask: keep one of them."
            )


def name_of_file(mask: str) -> str:
    """The field that names the file of a mask, as `imagefolder` of `datasets` reads it."""
    return f"{mask}_file_name"


def with_masks(dataset: Source, file: Path) -> tuple[Source, list[str]]:
    """
    Makes names of files in instances masks.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        file (`Path`):
            The file of its rows.

    Returns:
        `tuple`: the dataset, unchanged if its instances name no files; and the files, of a stream none.

    Raises:
        `ValueError`: If files are missing, of a stream when the row is read; or if a mask is in two fields.
    """
    find = FindMasks(file)
    if dataset.features is None:  # a stream of unknown types
        return (with_column(dataset, "instances", find) if "instances" in column_names(dataset) else dataset), []
    feature = dataset.features.get("instances")
    fields = feature.feature if isinstance(feature, List | LargeList) and isinstance(feature.feature, dict) else {}
    names = [name for name in find.finders if is_text(fields.get(name))]
    if not names:
        return dataset, []
    made = {mask: Image() for mask in MASKS if {mask, name_of_file(mask)} & set(names)}
    for mask in made:
        find.refuse_two(mask, name_of_file(mask) in names and fields.get(mask) not in UNKNOWN[:2])
    feature = copy.copy(feature)
    feature.feature = {name: kind for name, kind in fields.items() if name not in names} | made
    features = Features({"instances": feature})
    if isinstance(dataset, IterableDataset):
        dataset = without_decoding(dataset)
        features = Features({**dataset.features, **features})
        return dataset.map(Replacement("instances", find), batched=True, batch_size=100, features=features), []
    rows, order = find(dataset.data.column("instances").to_pylist()), dataset.column_names
    values = pa.array(rows, features.arrow_schema.field("instances").type)
    masks = [instance.get(mask) for row in rows if row for instance in row if instance for mask in made]
    paths = [mask["path"] for mask in masks if mask]
    dataset = beside(dataset.remove_columns("instances"), {"instances": values}, features, values).select_columns(
        order
    )
    return dataset, [path for path in paths if "://" not in path]


def image_paths(dataset: Source, file: Path) -> Iterator[str]:
    """The columns whose first text is the name of an image file. Where the column may hold anything, that file must exist."""
    for name, text in first_texts(dataset).items():
        if (
            name in TEXTS
            or "\n" in text
            or "://" in text
            or Path(text.replace("\\", "/")).suffix.lower() not in IMAGE_SUFFIXES
        ):
            continue
        if name in IMAGE_NAMES or name.endswith("file_name") or FindImages(name, file).find(text):
            yield name


def first_texts(dataset: Source) -> dict[str, str]:
    """The first text in each column of texts; of a stream, those of its first row."""
    if isinstance(dataset, IterableDataset):
        row = next(iter(without_decoding(dataset)), {})
        return {name: value for name, value in row.items() if isinstance(value, str)}
    texts = {}
    for name, feature in dataset.features.items():
        if is_text(feature):
            column = dataset.data.column(name)
            known = pc.index(pc.is_valid(column), True).as_py()
            if known >= 0:
                texts[name] = column[known].as_py()
    return texts


# ----- HPDv2 -----


def without_hpdv2_lists(dataset: Source, where: str) -> Source:
    """
    Turns the two paths and the two preferences in each row of HPDv2's `train.json` into `image_0`, `image_1` and `label_0`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        where (`str`):
            The file, for messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: unchanged if it has other columns.

    Raises:
        `ValueError`: If a row does not have two images.
    """
    present = column_names(dataset)
    if isinstance(dataset, Dataset):
        refuse_what_has_no_pairs(present)
    paths = next((name for name in ("file_path", "image_path") if name in present), None)
    if paths is None or "human_preference" not in present:
        return dataset
    logger.warning(f"Read as HPDv2: `{paths}` and `human_preference` as two images and a label.")
    return dataset.map(Unlisted(paths, where), remove_columns=[paths, "human_preference"])


class Unlisted:
    """Turns a row of HPDv2 into a pair with a label."""

    def __init__(self, paths: str, where: str):
        self.paths, self.where = paths, where

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        paths, preferences = row[self.paths], row["human_preference"]
        if not all(isinstance(values, list) and len(values) == 2 for values in (paths, preferences)):
            raise ValueError(
                f"A row of {self.where} has {how_many(paths)} images and {how_many(preferences)} preferences, not 2."
            )
        label = {(1, 0): 1.0, (0, 1): 0.0}.get(tuple(preferences), 0.5)
        return {"image_0": paths[0], "image_1": paths[1], "label_0": label}


def how_many(values: Any) -> int:
    """How many values a list has; none where there is no list."""
    return len(values) if isinstance(values, list) else 0
