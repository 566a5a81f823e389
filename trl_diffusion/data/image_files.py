# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Datasets that are folders of images: pairs in two folders, and single images with captions."""

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Image

from ..messages import CONTROL, cut, shown
from .content import state_of


logger = logging.getLogger(__name__)

UNWRITABLE = (pa.ArrowException, TypeError, ValueError, OverflowError)  # what Arrow raises at values that do not fit
LONGEST_TEXT = 2**30

IMAGE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".jp2",
    ".ppm",
}
CHOSEN_FOLDERS = ("chosen", "w", "win", "winner", "winners")
REJECTED_FOLDERS = ("rejected", "l", "lose", "loser", "losers")
CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_FILES = ("captions", "prompts", "metadata")
CAPTION_FOLDERS = ("captions", "prompts", "texts", "text")
CAPTION_COLUMNS = ("prompt", "caption", "text")
NAME_COLUMNS = ("file_name", "id", "name", "image", "key")


# ----- pairs in two folders -----


def find_pair_folders(folder: Path, splits: dict[str, tuple[str, ...]]) -> dict[str, tuple[Path, Path, Path]]:
    """
    Finds folders of chosen and of rejected images, such as `w/` and `l/` or `chosen/` and `rejected/`.

    Args:
        folder (`Path`):
            The folder of the dataset, which holds them, or a folder for each split that holds them.
        splits (`dict[str, tuple[str, ...]]`):
            Names of the folders of each split.

    Returns:
        `dict[str, tuple[Path, Path, Path]]`: their parent, the chosen and the rejected images, of each split. Empty if there
        are no such folders, or if a metadata file names the images of both.

    Raises:
        `ValueError`: If there are several such folders.
    """
    if found := pair_folders(folder):
        return {"train": found}
    found = {}
    for path in sorted(folder.iterdir()):
        split = next((split for split, names in splits.items() if path.name.lower() in names), None)
        if split and path.is_dir() and (pair := pair_folders(path)):
            found[split] = pair
    return found


def pair_folders(folder: Path) -> tuple[Path, Path, Path] | None:
    """The folder itself, and its folders of chosen and of rejected images, if it has both."""
    found = []
    for names in (CHOSEN_FOLDERS, REJECTED_FOLDERS):
        paths = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() in names]
        if len(paths) > 1:
            raise ValueError(
                f"The folder {folder} has {' and '.join(path.name for path in paths)}: one folder of "
                f"{names[0]} images is read. Rename or move the other."
            )
        found += paths
    if len(found) != 2 or names_both_images(folder):
        return None
    return folder, found[0], found[1]


def names_both_images(folder: Path) -> bool:
    """Whether a metadata file of the folder names the chosen image, and so is the table of the dataset."""
    for path in filter(Path.is_file, folder.glob("metadata.*")):
        if path.suffix == ".parquet":
            return True
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            line = file.readline(1 << 16)
        if re.search(r"""(^|[,;\t{ "])chosen(_file_name)?"?\s*[,;\t:\n]""", line):
            return True
    return False


def pairs_in_folders(folder: Path, chosen: Path, rejected: Path) -> Dataset:
    """
    Reads pairs in two folders. Images of one name, whatever their suffix, are a pair, and the name is its id.

    Args:
        folder (`Path`):
            Folder that holds both.
        chosen (`Path`):
            Folder of the chosen images.
        rejected (`Path`):
            Folder of the rejected images.

    Returns:
        [`~datasets.Dataset`]: with `id`, `prompt`, `chosen`, `rejected`, and the other columns of a file of captions.

    Raises:
        `ValueError`: If no images match, or a pair has no caption.
    """
    winners, losers = images_by_stem(chosen), images_by_stem(rejected)
    names = [name for name in winners if name in losers]
    if not names:
        raise ValueError(
            f"No image in {chosen} has the name of one in {rejected}: {first(winners)} and {first(losers)}. The images of a pair "
            "have one name, such as w/001.png and l/001.png."
        )
    unmatched = [f"{chosen.name}/{name}" for name in winners if name not in losers]
    unmatched += [f"{rejected.name}/{name}" for name in losers if name not in winners]
    if unmatched:
        logger.warning(
            f"{len(unmatched):,} images of {folder.name} have no image of the same name in the other folder and are left out: "
            f"{first(unmatched)}."
        )
    captions = Captions(folder, [chosen, rejected])
    rows = [
        captions.of(name) | {"id": name, "chosen": str(winners[name]), "rejected": str(losers[name])} for name in names
    ]
    captions.check(names)
    logger.warning(f"Read {len(rows):,} pairs: {chosen.name}/ as `chosen`, {rejected.name}/ as `rejected`.")
    return in_order(rows, ("id", "prompt", "chosen", "rejected"))


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The images in a folder and below, by their relative path without suffix."""
    found: dict[str, Path] = {}
    for image in visible_files(folder.absolute()):
        if image.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        stem = stem_in(image, folder.absolute())
        if stem in found:
            raise ValueError(
                f"{found[stem]} and {image} have one name without their suffixes, so it is not clear which belongs to the "
                "pair. Remove or rename one of them."
            )
        found[stem] = image
    return found


def visible_files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """
    The files in a folder and below, without hidden ones and those of `__MACOSX`.

    Args:
        folder (`Path`):
            The folder.
        above (`tuple[str, ...]`, *optional*):
            The folders that it is in. A link back to one of them is not followed.

    Raises:
        `ValueError`: If a name is no text.
    """
    here = os.path.realpath(folder)
    if here in above or not os.path.isdir(here):
        return
    names = sorted(os.listdir(folder))
    for name in names:
        if CONTROL.search(name):
            raise ValueError(
                f"The name {shown(name)} in the folder {shown(str(folder))} has characters that are no text: rename it."
            )
    yield from (Path(folder) / name for name in names if name[0] != "." and os.path.isfile(os.path.join(folder, name)))
    for name in names:
        if not name.startswith((".", "__")) and os.path.isdir(os.path.join(folder, name)):
            yield from visible_files(Path(folder) / name, (*above, here))


def stem_in(path: Path, folder: Path) -> str:
    """The path of a file in a folder, without its suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def first(names: Any, maximum: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - maximum:,} more" if len(names) > maximum else ""
    return (", ".join(names[:maximum]) or "none") + more


def in_order(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Dataset:
    """A dataset of rows with paths of images, with some columns first."""
    try:
        dataset = Dataset.from_list(rows)
    except UNWRITABLE as error:
        raise ValueError(
            f"The captions of {rows[0]['id']} and the other images fit no columns: {cut(str(error))}."
        ) from error
    images = [name for name in ("chosen", "rejected", "image") if name in columns]
    for name in images:
        dataset = dataset.cast_column(name, Image())
    dataset = dataset.select_columns([*columns, *(name for name in dataset.column_names if name not in columns)])
    return stamped(dataset, [row[name] for row in rows for name in images])


def stamped(dataset: Dataset, paths: list[str]) -> Dataset:
    """
    Makes the fingerprint of a dataset depend on its image files, so that what was computed from it is computed again when a file
    has changed.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset, changed in place.
        paths (`list[str]`):
            The files.

    Returns:
        [`~datasets.Dataset`]
    """
    digest = hashlib.blake2b(dataset._fingerprint.encode(), digest_size=8)
    for path in dict.fromkeys(paths):
        digest.update(f"{path}\0{state_of(path)}\0".encode("utf-8", "surrogateescape"))
    dataset._fingerprint = digest.hexdigest()
    return dataset


# ----- captions -----


class Captions:
    """
    The captions of images: in a file such as `captions.jsonl`, or in a text file of the image's name, beside the image, in the
    folder above, or in a folder `captions/`.

    Args:
        folder (`Path`):
            Folder of the dataset.
        image_folders (`list[Path]`):
            Folders of the images.
    """

    def __init__(self, folder: Path, image_folders: list[Path]):
        self.folder, self.image_folders = folder, image_folders
        self.table = read_captions(folder)
        self.texts: dict[str, list[Path]] = defaultdict(list)
        for place in (*image_folders, folder, *(folder / name for name in CAPTION_FOLDERS)):
            for path in visible_files(place):
                if path.suffix.lower() in CAPTION_SUFFIXES:
                    self.texts[stem_in(path, place)].append(path)
        self.missing: list[str] = []

    def of(self, name: str) -> dict[str, Any]:
        """The `prompt` of an image, and what else the file of captions says of it."""
        for key in (name, *(f"{folder.name}/{name}" for folder in self.image_folders)):
            if key in self.table:
                return self.table[key]
        texts = [read_text(path).strip() for path in self.texts.get(name, [])]
        if len(set(texts)) > 1:
            raise ValueError(
                f"The captions of {name} in {self.folder} differ: {' and '.join(map(shown, sorted(set(texts))))}. Both images of a "
                "pair have one prompt."
            )
        if not texts:
            self.missing.append(name)
        return {"prompt": texts[0] if texts else ""}

    def check(self, names: list[str]) -> None:
        """Refuses images without a caption."""
        if self.missing:
            raise ValueError(
                f"{len(self.missing):,} of the {len(names):,} images in {self.folder} have no caption: {first(self.missing)}. Write "
                "the caption of name.png into name.txt beside it, or the captions of all into captions.jsonl, with lines such as "
                '{"file_name": "name.png", "prompt": "..."}. The caption of an image without text is an empty file.'
            )


def read_captions(folder: Path) -> dict[str, dict[str, Any]]:
    """
    Reads a file of captions.

    Args:
        folder (`Path`):
            Folder of the dataset.

    Returns:
        `dict[str, dict]`: the rows by the name of their image without its suffix, with `prompt`. Empty if there is no file.

    Raises:
        `ValueError`: If there are several files, or a row lacks the name or the caption, or a name is repeated.
    """
    files = [folder / f"{name}{suffix}" for name in CAPTION_FILES for suffix in (".jsonl", ".json", ".csv", ".tsv")]
    files = [path for path in files if path.is_file()]
    if len(files) > 1:
        raise ValueError(f"{' and '.join(map(str, files))} both hold captions: remove one of them.")
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(caption_rows(files[0]) if files else []):
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            raise ValueError(
                f"Row {number} of {files[0]}, counted from 0, is no object with the columns of the others."
            )
        name = next((row.pop(column) for column in NAME_COLUMNS if row.get(column) is not None), None)
        text = next((row.pop(column) for column in CAPTION_COLUMNS if row.get(column) is not None), None)
        if name is None or text is None:
            raise ValueError(
                f"Row {number} of {files[0]}, counted from 0, has no "
                f"{'name (`file_name` or `id`)' if name is None else 'caption (`prompt`, `caption` or `text`)'}."
            )
        if not isinstance(text, str):
            raise ValueError(
                f"The caption in row {number} of {files[0]}, counted from 0, is no text but {shown(text)}."
            )
        path = Path(str(name).replace("\\", "/"))
        stem = (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()
        if stem in found:
            raise ValueError(f"{files[0]} has two captions for {cut(stem, 100)}.")
        found[stem] = row | {"prompt": text}
    return found


def caption_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of captions. A JSON object maps names to captions."""
    text = read_text(path)
    try:
        if path.suffix in (".csv", ".tsv"):
            lines = io.StringIO(text, newline="")
            return list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
        if path.suffix == ".jsonl":
            return [
                json.loads(line) for line in text.split("\n") if line.strip()
            ]  # not at other ends of lines within a text
        rows = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {cut(str(error))}.") from error
    if not isinstance(rows, list | dict):
        raise ValueError(f"{path} must hold a list of rows, or an object of names and captions.")
    return [{"id": name, "prompt": text} for name, text in rows.items()] if isinstance(rows, dict) else rows


def read_text(path: Path) -> str:
    """The text of a file. Raises a `ValueError` if it is not UTF-8, or longer than any file of captions."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read(LONGEST_TEXT + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save the file as UTF-8.") from error
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{path} has more than {LONGEST_TEXT:,} characters.")
    return text


# ----- single images -----


def captioned_images(folder: Path, images: list[Path]) -> Dataset:
    """
    Reads single images with captions in text files of the same name, or in a file such as `captions.jsonl`.

    Args:
        folder (`Path`):
            The folder of the dataset.
        images (`list[Path]`):
            The images.

    Returns:
        [`~datasets.Dataset`]: with `id` (the relative path without suffix), `prompt`, `image`.

    Raises:
        `ValueError`: If an image has no caption.
    """
    captions = Captions(folder, [])
    rows = []
    for path in images:
        name = stem_in(path, folder)
        rows.append(captions.of(name) | {"id": name, "image": str(path.absolute())})
    captions.check([row["id"] for row in rows])
    repeats = sorted({part for row in rows for part in row["id"].split("/")[:-1] if re.match(r"\d+_", part)})
    if repeats:
        logger.warning(
            f"The number of repeats in the names of folders ({first(repeats)}) is not read: every image counts once."
        )
    return in_order(rows, ("id", "prompt", "image"))
