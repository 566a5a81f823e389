# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The rows of an annotation run: what is read from a dataset, what each role adds, what is written."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value

from ..data.formats import PREFERENCES
from .images import StoredImage


SCHEMA_VERSION = 1  # counts up with every change of the features below or of what they mean
STATUSES = ("ok", "rejected", "error")

PAIR_COLUMNS = {"id": "id", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
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
IMAGE_COLUMNS = {"id": "id", "prompt": "prompt", "image": "image"}
OPTIONAL_COLUMNS = {"image_0_uid", "image_1_uid", "chosen_uid", "rejected_uid", "image_uid", "has_label"}


@dataclass
class Record:
    """
    A row on its way through the roles. Every row leaves as one of `STATUSES`.

    Args:
        id (`str`):
            Its id.
        prompt (`str`):
            What its images were made for.
        status (`str`, *optional*, defaults to `"ok"`):
            `"ok"`; `"rejected"`: sound, but left out by a rule; `"error"`: it could not be annotated.
        reason (`str`, *optional*, defaults to `""`):
            Why it is not ok.
    """

    id: str
    prompt: str
    status: str = "ok"
    reason: str = ""

    def reject(self, reason: str) -> None:
        self.status, self.reason = "rejected", reason

    def fail(self, reason: str) -> None:
        """Makes the row an error; of several reasons the first stays."""
        if self.status != "error":
            self.status, self.reason = "error", reason


@dataclass
class Instance:
    """
    One thing that both images of a pair show.

    Args:
        label (`str`):
            What the planner calls it.
        chosen_box (`list[float]`), rejected_box (`list[float]`):
            Unit boxes of the upright images.
        chosen_score (`float`), rejected_score (`float`):
            The detector's confidence.
        preference (`str`, *optional*, defaults to `"tie"`):
            In which image it is drawn better: `"chosen"`, `"rejected"` or `"tie"`.
        answer (`str`, *optional*, defaults to `""`), swapped_answer (`str`, *optional*, defaults to `""`):
            The judge's raw answers, with the chosen image first and with the rejected image first.
    """

    label: str
    chosen_box: list[float]
    rejected_box: list[float]
    chosen_score: float
    rejected_score: float
    preference: str = "tie"
    answer: str = ""
    swapped_answer: str = ""


@dataclass
class PairRecord(Record):
    """
    An image pair.

    Args:
        chosen (`StoredImage`), rejected (`StoredImage`):
            The images; `None` where a file could not be read.
        chosen_uid (`str`), rejected_uid (`str`):
            Names of the images that stay, from the dataset or from their bytes.
        tie (`bool`):
            Whether the source says that neither image is better.
        labels (`list[str]`):
            The planner's things.
        planner_answer (`str`):
            Its raw answer.
        instances (`list[Instance]`):
            Those that the detector finds in both images.
        dropped (`list[dict]`):
            `label` and `reason` of the others.
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

    def drop(self, label: str, reason: str) -> None:
        self.dropped.append({"label": label, "reason": reason})

    def to_row(self) -> dict[str, Any]:
        """The row to write, with boxes in pixels of the stored images. Only a row that is ok has instances."""
        row = {name: getattr(self, name) for name in PAIR_ANNOTATION_FEATURES if name != "instances"}
        instances = self.instances if self.status == "ok" else []
        row["instances"] = [
            asdict(instance)
            | {
                "chosen_box": self.chosen.stored_box(instance.chosen_box),
                "rejected_box": self.rejected.stored_box(instance.rejected_box),
            }
            for instance in instances
        ]
        return row


@dataclass
class ImageRecord(Record):
    """
    A single image.

    Args:
        image (`StoredImage`):
            The image; `None` where its file could not be read.
        image_uid (`str`):
            A name of the image that stays, from the dataset or from its bytes.
        positive_attributes (`list[str]`), negative_attributes (`list[str]`):
            Ids of attributes.
        answers (`list[dict]`):
            `dimension` and raw `answer` of the expert.
    """

    image: StoredImage | None = None
    image_uid: str = ""
    positive_attributes: list[str] = field(default_factory=list)
    negative_attributes: list[str] = field(default_factory=list)
    answers: list[dict[str, str]] = field(default_factory=list)

    def to_row(self) -> dict[str, Any]:
        """The row to write. Only a row that is ok has attributes."""
        row = {name: getattr(self, name) for name in IMAGE_ANNOTATION_FEATURES}
        if self.status != "ok":
            row["positive_attributes"] = row["negative_attributes"] = []
        return row


_BOX = List(Value("float32"), length=4)
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
    A row as Parquet holds it, with indices of class labels.

    Args:
        row (`dict`):
            What `to_row` gives.

    Returns:
        `dict`
    """
    encoded = row | {"status": STATUSES.index(row["status"])}
    if "instances" in row:
        encoded["instances"] = [
            instance | {"preference": PREFERENCES.index(instance["preference"])} for instance in row["instances"]
        ]
    return encoded


# ----- reading -----


def pair_columns(present: list[str], mapping: dict[str, str] | None = None) -> dict[str, str]:
    """
    Decides which columns of a dataset of pairs hold what.

    Args:
        present (`list[str]`):
            The dataset's columns.
        mapping (`dict[str, str]`, *optional*):
            What the user says: from our names (`id`, `prompt`, then `chosen` and `rejected`, or `image_0`, `image_1` and
            `label_0`; as well `chosen_uid` and the like) to the dataset's. Left out, the dataset has either the trainers'
            columns or those of Pick-a-Pic v2.

    Returns:
        `dict[str, str]`: from our names to the dataset's columns.

    Raises:
        `ValueError`: If a column is missing, or a name is not known.
    """
    layouts = (PAIR_COLUMNS, PICK_A_PIC_COLUMNS)
    if mapping is None:
        for layout in layouts:
            if all(column in present for name, column in layout.items() if name not in {*OPTIONAL_COLUMNS, "id"}):
                return _present(layout, present)
        raise ValueError(
            f"The dataset has the columns {', '.join(present)}: neither `prompt`, `chosen` and `rejected` nor those of "
            "Pick-a-Pic (`caption`, `jpg_0`, `jpg_1`, `label_0`). Say what they hold with `--columns`, such as "
            '`--columns \'{"prompt": "text", "chosen": "winner", "rejected": "loser", "id": "key"}\'`.'
        )
    layout = PICK_A_PIC_COLUMNS if "image_0" in mapping else PAIR_COLUMNS
    return _mapped(layout, mapping, present)


def image_columns(present: list[str], mapping: dict[str, str] | None = None) -> dict[str, str]:
    """
    Decides which columns of a dataset of images hold what; like [`annotation.records.pair_columns`], with `id`, `prompt`,
    `image` and `image_uid`.
    """
    return _mapped(IMAGE_COLUMNS, mapping or {}, present)


def _mapped(layout: dict[str, str], mapping: dict[str, str], present: list[str]) -> dict[str, str]:
    uids = {name: name for name in OPTIONAL_COLUMNS if name.removesuffix("_uid") in layout}
    known = uids | layout
    if unknown := set(mapping) - set(known):
        raise ValueError(f"`--columns` names {', '.join(sorted(unknown))}; it may name {', '.join(known)}.")
    named = {name: mapping.get(name, name) for name in known}
    if missing := [column for name, column in named.items() if column not in present and _needed(name, mapping)]:
        raise ValueError(
            f"The dataset lacks {', '.join(missing)}; it has the columns {', '.join(present)}. Say what they hold with "
            f"`--columns`, from {', '.join(layout)} to names of columns."
        )
    return _present(named, present)


def _needed(name: str, mapping: dict[str, str]) -> bool:
    return name in mapping or name not in {*OPTIONAL_COLUMNS, "id"}


def _present(columns: dict[str, str], present: list[str]) -> dict[str, str]:
    found = {name: column for name, column in columns.items() if column in present}
    return {"id": "id"} | found


def prepare_rows(
    dataset: Dataset | IterableDataset,
    find_columns: Callable[[list[str], dict[str, str] | None], dict[str, str]],
    mapping: dict[str, str] | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, str]]:
    """
    Keeps the columns of a dataset that annotation reads, leaves its images undecoded, and numbers the rows of a dataset in
    memory that has no ids.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        find_columns (`Callable`):
            [`annotation.records.pair_columns`] or [`annotation.records.image_columns`].
        mapping (`dict[str, str]`, *optional*):
            What the user says.

    Returns:
        `tuple`: the dataset, and which of its columns hold what.

    Raises:
        `ValueError`: If there are no rows, a column is missing, or a stream has no ids.
    """
    present = dataset.column_names or list(next(iter(dataset), {}))
    if not present:
        raise ValueError("The dataset has no rows.")
    columns = find_columns(present, mapping)
    if columns["id"] not in present:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "The stream has no column `id`, by which a row's annotation is found again. Say which column names its rows "
                'with `--columns \'{"id": "..."}\'`, or annotate it without `--dataset_streaming`.'
            )
        dataset = dataset.add_column("id", [str(number) for number in range(len(dataset))])
    dataset = dataset.with_format(None).select_columns(list(columns.values()))
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset, columns


def read_pair(row: dict[str, Any], columns: dict[str, str], tie_policy: str = "drop") -> PairRecord:
    """
    Reads a row of a dataset of pairs.

    Args:
        row (`dict`):
            The row, with its images undecoded.
        columns (`dict[str, str]`):
            Which columns hold what, see [`annotation.records.pair_columns`].
        tie_policy (`str`, *optional*, defaults to `"drop"`):
            `"drop"` rejects pairs of which neither image is better; `"keep"` annotates them, with `image_0` as chosen and
            `tie` true.

    Returns:
        [`PairRecord`]: an error where the prompt, the label or an image's file cannot be read.
    """
    record = PairRecord(read_id(row, columns), row[columns["prompt"]] or "")
    names = ("chosen", "rejected")
    if "image_0" in columns:
        label = row[columns["label_0"]]
        if "has_label" in columns and row[columns["has_label"]] is False:
            record.reject("the pair has no label: has_label is false")
            return record
        if label not in (0, 0.5, 1):
            record.reject(f"the pair has no label: {columns['label_0']} is {label}")
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
            The row, with its image undecoded.
        columns (`dict[str, str]`):
            Which columns hold what, see [`annotation.records.image_columns`].

    Returns:
        [`ImageRecord`]: an error where the image's file cannot be read.
    """
    record = ImageRecord(read_id(row, columns), row[columns["prompt"]] or "")
    record.image, record.image_uid = read_image(record, row, columns, "image")
    return record


def read_id(row: dict[str, Any], columns: dict[str, str]) -> str:
    value = row[columns["id"]]
    if value is None or value == "":
        raise ValueError(
            f"A row has no `{columns['id']}`: every row needs an id, by which its annotation is found again."
        )
    return str(value)


def read_image(
    record: Record, row: dict[str, Any], columns: dict[str, str], name: str
) -> tuple[StoredImage | None, str]:
    """An image of a row and its uid; where it cannot be read, the record becomes an error."""
    try:
        image = StoredImage.read(row[columns[name]])
    except (ValueError, OSError) as error:
        record.fail(f"{columns[name]}: {error}")
        return None, ""
    column = columns.get(f"{name}_uid")
    return image, str(row[column]) if column else image.uid


def open_images(record: PairRecord | ImageRecord) -> None:
    """Decodes a record's images; where one cannot be read, the record becomes an error."""
    for name in ("chosen", "rejected", "image"):
        image = getattr(record, name, None)
        if record.status == "ok" and image is not None:
            try:
                image.open()
            except ValueError as error:
                record.fail(f"{name}: {error}")
