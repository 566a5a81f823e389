# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The rows of an annotation run: how they are read from a dataset and filled in by the roles."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

from datasets import Dataset, IterableDataset

from ..checksums import digest_of
from ..data.columns import check_names, column_names, numbered, with_nested_columns, without_decoding
from ..data.presets import (
    OPTIONAL_COLUMNS,
    PAIR,
    PICK_A_PIC_COLUMNS,
    SINGLE,
    is_unlabelled,
    read_label,
    recognise,
    refuse_what_has_no_pairs,
)
from ..messages import cut, shortened
from ..segmentation import decode_rle, encode_rle
from .images import StoredImage
from .tables import IMAGE_ANNOTATION_FEATURES, PAIR_ANNOTATION_FEATURES, readable
from .tables import STATUSES as STATUSES  # part of what this module is imported for


INPUTS = "inputs"  # of a row that is written: what it was made of, which goes into the metadata of its shard

PAIR_COLUMNS = {"id": "id", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
IMAGE_COLUMNS = {"id": "id", "prompt": "prompt", "image": "image"}


@dataclass
class Record:
    """
    A row that the roles annotate. It ends with one of [`annotation.tables.STATUSES`].

    Args:
        id (`str`):
            Id of the row.
        prompt (`str`):
            Prompt of its images.
        status (`str`, *optional*, defaults to `"ok"`):
            `"ok"`; `"rejected"` if a rule excludes the row; `"error"` if it could not be annotated.
        reason (`str`, *optional*, defaults to `""`):
            Why the status is not `"ok"`.
        inputs (`str`, *optional*, defaults to `""`):
            Hash of all that the roles see of the row, see [`annotation.records.inputs_of`].
    """

    id: str
    prompt: str
    status: str = "ok"
    reason: str = ""
    inputs: str = ""

    def reject(self, reason: str) -> None:
        self.status, self.reason = "rejected", reason

    def fail(self, reason: str) -> None:
        """Makes the row an error. The first reason is kept."""
        if self.status != "error":
            self.status, self.reason = "error", reason


@dataclass
class Instance:
    """
    An instance that both images of a pair show.

    Args:
        label (`str`):
            Label from the planner.
        chosen_box (`list[float]`), rejected_box (`list[float]`):
            Unit boxes in the upright images.
        chosen_score (`float`), rejected_score (`float`):
            The detector's confidence.
        preference (`str`, *optional*, defaults to `"tie"`):
            Which image shows it better: `"chosen"`, `"rejected"` or `"tie"`.
        answer (`str`, *optional*, defaults to `""`), swapped_answer (`str`, *optional*, defaults to `""`):
            The judge's raw answers, with the chosen image first and with the rejected image first.
        chosen_mask (`dict`, *optional*), rejected_mask (`dict`, *optional*):
            Masks in the upright images, see [`segmentation.encode_rle`].
    """

    label: str
    chosen_box: list[float]
    rejected_box: list[float]
    chosen_score: float
    rejected_score: float
    preference: str = "tie"
    answer: str = ""
    swapped_answer: str = ""
    chosen_mask: dict[str, Any] | None = None
    rejected_mask: dict[str, Any] | None = None


@dataclass
class PairRecord(Record):
    """
    An image pair.

    Args:
        chosen (`StoredImage`), rejected (`StoredImage`):
            The images, or `None` if the file could not be read.
        chosen_uid (`str`), rejected_uid (`str`):
            Permanent names of the images, from the dataset or a hash of their bytes.
        tie (`bool`):
            Whether neither image is better according to the dataset.
        labels (`list[str]`):
            Labels from the planner.
        planner_answer (`str`):
            The planner's raw answer.
        instances (`list[Instance]`):
            Instances that the detector finds in both images.
        dropped (`list[dict]`):
            `label` and `reason` of the instances that are not kept.
        without_mask (`list[dict]`, *optional*):
            `label`, `image` and `reason` where an instance has its box alone. `None` without a segmenter.
    """

    chosen: StoredImage | None = None
    rejected: StoredImage | None = None
    chosen_uid: str = ""
    rejected_uid: str = ""
    tie: bool = False
    labels: list[str] = field(default_factory=list)
    planner_answer: str = ""
    instances: list[Instance] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)
    without_mask: list[dict[str, str]] | None = None

    def drop(self, label: str, reason: str) -> None:
        self.dropped.append({"label": label, "reason": reason})

    def to_row(self) -> dict[str, Any]:
        """
        The row to write, with boxes and masks in pixels of the stored images. Only rows with the status `ok` have instances, and only
        those that a segmenter has seen have masks.
        """
        row = {name: getattr(self, name) for name in PAIR_ANNOTATION_FEATURES if name != "instances"}
        row["instances"] = [self.stored(instance) for instance in self.instances if self.status == "ok"]
        if self.without_mask is not None:
            row["without_mask"] = self.without_mask
        return row

    def stored(self, instance: Instance) -> dict[str, Any]:
        """An instance to write."""
        row = asdict(instance)
        for name, image in (("chosen", self.chosen), ("rejected", self.rejected)):
            row[f"{name}_box"] = image.stored_box(row[f"{name}_box"])
            mask = row.pop(f"{name}_mask")
            if self.without_mask is not None:
                row[f"{name}_mask"] = mask and encode_rle(image.stored_mask(decode_rle(mask)))
        return row


@dataclass
class ImageRecord(Record):
    """
    A single image.

    Args:
        image (`StoredImage`):
            The image, or `None` if its file could not be read.
        image_uid (`str`):
            Permanent name of the image, from the dataset or a hash of its bytes.
        positive_attributes (`list[str]`), negative_attributes (`list[str]`):
            Ids of the attributes in positive and in negative form.
        answers (`list[dict]`):
            The expert's raw `answer` on each `dimension`.
    """

    image: StoredImage | None = None
    image_uid: str = ""
    positive_attributes: list[str] = field(default_factory=list)
    negative_attributes: list[str] = field(default_factory=list)
    answers: list[dict[str, str]] = field(default_factory=list)

    def to_row(self) -> dict[str, Any]:
        """The row to write. Only rows with the status `ok` have attributes."""
        row = {name: getattr(self, name) for name in IMAGE_ANNOTATION_FEATURES}
        if self.status != "ok":
            row["positive_attributes"] = row["negative_attributes"] = []
        return row


def check_prompt(record: Record) -> None:
    """Makes a record whose prompt is no text an error. Its prompt becomes a text that can be written."""
    problem = None
    if not isinstance(record.prompt, str):
        problem = f"the prompt is no text but {type(record.prompt).__name__}: {readable(record.prompt)[:100]}"
    elif record.prompt != readable(record.prompt):
        problem = "the prompt is no valid text: it holds single surrogates, which are parts of characters"
    if problem and record.status == "ok":
        record.fail(problem)
    record.prompt = readable(record.prompt)


def inputs_of(record: "PairRecord | ImageRecord") -> str:
    """Hash of all that the roles will see of a row that was read: its texts, and the content of its images."""
    names = ("id", "prompt", "status", "reason", "tie", "chosen_uid", "rejected_uid", "image_uid")
    texts = [getattr(record, name, None) for name in names]
    images = [getattr(record, name, None) for name in ("chosen", "rejected", "image")]
    return digest_of([texts, [image and image.uid for image in images]])


# ----- reading -----


def pair_columns(present: list[str], mapping: dict[str, str] | None = None) -> dict[str, str]:
    """
    Finds the columns of a dataset of pairs.

    Args:
        present (`list[str]`):
            Columns of the dataset.
        mapping (`dict[str, str]`, *optional*):
            The user's mapping from our names to the dataset's columns. Our names are `id`, `prompt`, and either
            `chosen` and `rejected`, or `image_0`, `image_1` and `label_0`; uids such as `chosen_uid` are optional.
            Defaults to the trainers' columns, or to those of a public dataset, see [`data.presets.recognise`].

    Returns:
        `dict[str, str]`: from our names to the dataset's columns.

    Raises:
        `ValueError`: If a column is missing or ambiguous, or a name is unknown.
    """
    if mapping is None:
        if set(PAIR) <= set(present):
            return _present(PAIR_COLUMNS, present)
        refuse_what_has_no_pairs(present)
        if found := recognise(present, PAIR):
            return _present({"id": "id"} | found[1], present)
        raise ValueError(
            f"The dataset has the columns {shortened(present)}: neither `prompt`, `chosen` and `rejected` nor those of "
            "Pick-a-Pic (`caption`, `jpg_0`, `jpg_1`, `label_0`). Name its columns with `--columns`, such as "
            '`--columns \'{"prompt": "text", "chosen": "winner", "rejected": "loser", "id": "key"}\'`.'
        )
    layout = PICK_A_PIC_COLUMNS if "image_0" in mapping else PAIR_COLUMNS
    return _mapped(layout, mapping, present)


def image_columns(present: list[str], mapping: dict[str, str] | None = None) -> dict[str, str]:
    """
    Finds the columns of a dataset of images, as [`annotation.records.pair_columns`] does for pairs. Our names are
    `id`, `prompt`, `image` and `image_uid`.
    """
    if mapping is None and not set(SINGLE) <= set(present) and (found := recognise(present, SINGLE)):
        return _present({"id": "id"} | found[1], present)
    return _mapped(IMAGE_COLUMNS, mapping or {}, present)


def _mapped(layout: dict[str, str], mapping: dict[str, str], present: list[str]) -> dict[str, str]:
    uids = {name: name for name in sorted(OPTIONAL_COLUMNS) if name.removesuffix("_uid") in layout}
    known = uids | layout
    if unknown := set(mapping) - set(known):
        raise ValueError(f"`--columns` names {shortened(sorted(unknown))}; it may name {', '.join(known)}.")
    named = {name: mapping.get(name, name) for name in known}
    if missing := [column for name, column in named.items() if column not in present and _needed(name, mapping)]:
        raise ValueError(
            f"The dataset lacks {shortened(missing)}; it has the columns {shortened(present)}. Name its columns with "
            f"`--columns`, a mapping from {', '.join(layout)} to columns of the dataset."
        )
    return _present(named, present)


def _needed(name: str, mapping: dict[str, str]) -> bool:
    return name in mapping or name not in OPTIONAL_COLUMNS


def _present(columns: dict[str, str], present: list[str]) -> dict[str, str]:
    found = {name: column for name, column in columns.items() if column in present}
    return {"id": "id"} | found


def prepare_rows(
    dataset: Dataset | IterableDataset,
    find_columns: Callable[[list[str], dict[str, str] | None], dict[str, str]],
    mapping: dict[str, str] | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, str]]:
    """
    Selects the columns that the annotation reads and disables the decoding of images. If a dataset in memory has no
    ids, the row numbers become its ids.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        find_columns (`Callable`):
            [`annotation.records.pair_columns`] or [`annotation.records.image_columns`].
        mapping (`dict[str, str]`, *optional*):
            The user's mapping from our names to the dataset's columns.

    Returns:
        `tuple`: the dataset, and the mapping from our names to its columns.

    Raises:
        `ValueError`: If there are no rows, a column is missing, or a stream has no ids.
    """
    if mapping:
        check_names(mapping)
        dataset = with_nested_columns(dataset, mapping.values())
    present = column_names(dataset)
    if not present:
        raise ValueError("The dataset has no rows.")
    columns = find_columns(present, mapping)
    if columns["id"] not in present:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "The stream has no column `id`, which links a row to its annotation. Name the column that holds the ids "
                'with `--columns \'{"id": "..."}\'`, or annotate without `--dataset_streaming`.'
            )
        dataset = numbered(dataset)
    return without_decoding(dataset.with_format(None).select_columns(list(columns.values()))), columns


def read_pair(row: dict[str, Any], columns: dict[str, str], tie_policy: str = "drop") -> PairRecord:
    """
    Reads a row of a dataset of pairs.

    Args:
        row (`dict`):
            The row, with undecoded images.
        columns (`dict[str, str]`):
            From our names to the dataset's columns, see [`annotation.records.pair_columns`].
        tie_policy (`str`, *optional*, defaults to `"drop"`):
            `"drop"` rejects ties (neither image is better); `"keep"` annotates them, with `image_0` as chosen and
            `tie` set to `True`.

    Returns:
        [`PairRecord`]: with the status `"rejected"` if the pair has no label, `"error"` if the file of an image cannot
        be read.
    """
    record = PairRecord(read_id(row, columns), row[columns["prompt"]] or "")
    names = ("chosen", "rejected")
    if "image_0" in columns:
        label = read_label(row[columns["label_0"]])
        if "has_label" in columns and is_unlabelled(row[columns["has_label"]]):
            record.reject("the pair has no label: has_label is false")
            return record
        if label is None:
            record.reject(f"the pair has no label: {columns['label_0']} is {cut(str(row[columns['label_0']]), 100)}")
            return record
        names = ("image_1", "image_0") if label == 0 else ("image_0", "image_1")
        record.tie = label == 0.5
    record.chosen, record.chosen_uid = read_image(record, row, columns, names[0])
    record.rejected, record.rejected_uid = read_image(record, row, columns, names[1])
    if record.tie and tie_policy == "drop":
        record.reject("tie: neither image is better")
    return record


def read_attribute_image(row: dict[str, Any], columns: dict[str, str]) -> ImageRecord:
    """
    Reads a row of a dataset of images.

    Args:
        row (`dict`):
            The row, with an undecoded image.
        columns (`dict[str, str]`):
            From our names to the dataset's columns, see [`annotation.records.image_columns`].

    Returns:
        [`ImageRecord`]: with the status `"error"` if the file of the image cannot be read.
    """
    record = ImageRecord(read_id(row, columns), row[columns["prompt"]] or "")
    record.image, record.image_uid = read_image(record, row, columns, "image")
    return record


def read_id(row: dict[str, Any], columns: dict[str, str]) -> str:
    value = row[columns["id"]]
    if (
        not isinstance(value, str | Integral | float) or value == "" or value != value
    ):  # NaN, where other rows have numbers
        raise ValueError(f"A row has no `{columns['id']}`: every row needs an id, which links it to its annotation.")
    return id_text(value)


def id_text(value: Any) -> str:
    """An id as text. Integers may have become floats, in a column with gaps."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_image(
    record: Record, row: dict[str, Any], columns: dict[str, str], name: str
) -> tuple[StoredImage | None, str]:
    """Reads an image of a row, and its uid. If it cannot be read, the record becomes an error."""
    try:
        image = StoredImage.read(row[columns[name]])
    except (ValueError, OSError) as error:
        record.fail(f"{columns[name]}: {cut(str(error))}")
        return None, ""
    column = columns.get(f"{name}_uid")
    return image, str(row[column]) if column else image.uid


def open_images(record: PairRecord | ImageRecord) -> None:
    """Decodes the images of a record. If one cannot be decoded, the record becomes an error."""
    for name in ("chosen", "rejected", "image"):
        image = getattr(record, name, None)
        if record.status == "ok" and image is not None:
            try:
                image.open()
            except ValueError as error:
                record.fail(f"{name}: {cut(str(error))}")
