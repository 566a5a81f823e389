# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Reads every row of a dataset as a trainer does, and says all that is wrong with it and what it holds."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, IterableDataset

from ..criteria import Criteria
from ..messages import cut, shown
from .columns import column_names
from .formats import (
    ATTRIBUTE_COLUMNS,
    check_attribute_columns,
    check_attributes,
    check_preference,
    instance_faults,
    prepare_dataset,
    read_image,
    row_id,
    row_prompt,
)
from .images import image_content, image_errors, open_image
from .instances import has_mask, mask_faults
from .labels import label_faults, refuse_pairs, row_label
from .pictures import is_transparent, orientation, upright_image


ROWS_AT_ONCE = 256  # their images are in memory together
VALUES = re.compile(r"""'[^']*'|"[^"]*"|\[[^\[\]]*\]|-?\d[\d.,]*""")  # what differs between messages of one reason
SHOWN_ROWS = 5
SHOWN_LABELS = 20


def check_dataset(
    dataset: Dataset | IterableDataset,
    columns: tuple[str, ...],
    image_columns: tuple[str, ...],
    resolution: int,
    criteria: Criteria | None = None,
    needs_attributes: bool = False,
    fits: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """
    Checks a dataset: the types of its columns, and all of every row, each image decoded in full. Resizing and cropping alone
    are left out, which cannot fail. The columns tell what is read: with `chosen` or `rejected` also instances, with `label` labels, with
    those of attributes attributes.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        columns (`tuple[str, ...]`):
            The columns that the trainer requires.
        image_columns (`tuple[str, ...]`):
            Those of them that contain images.
        resolution (`int`):
            Width and height of the training images in pixels. Smaller images are counted.
        criteria ([`Criteria`], *optional*):
            The tree of the attributes, if the trainer reads some.
        needs_attributes (`bool`, *optional*, defaults to `False`):
            Whether a row without attributes is a fault.
        fits (`Callable[[str], bool]`, *optional*):
            Whether the text encoders read the whole of a prompt. Longer ones are counted.

    Returns:
        `dict`: `faults`, each with `column`, `message`, and `row` and `id` if it is one of a row; `reasons`, the faults by their
        reason, each with `column`, `message` (the first), `count` and `rows` (all of them); and `holds`, which counts what the
        dataset contains.
    """
    of_columns: list[tuple[str, str]] = []
    has_label, has_pairs = "label" in columns, not {"chosen", "rejected"}.isdisjoint(columns)
    try:
        if has_label:
            refuse_pairs(dataset, "dataset")
        dataset = prepare_dataset(dataset, "dataset", columns, image_columns, of_columns)
    except ValueError as error:  # without its columns, or its rows, no trainer reads it; what is there is still read
        of_columns = [("dataset", str(error))]
        present = column_names(dataset) if isinstance(dataset, Dataset | IterableDataset) else ()
        columns, image_columns = (
            tuple(name for name in names if name in present) for names in (columns, image_columns)
        )
        try:
            dataset = prepare_dataset(dataset, "dataset", columns, image_columns, of_columns)
        except ValueError:
            dataset, columns, image_columns = [], (), ()
    if "label" in columns:
        of_columns += [("label", fault) for fault in label_faults(dataset, "dataset")]
    mistyped = {column for column, _ in of_columns}
    if criteria is not None and set(ATTRIBUTE_COLUMNS) <= set(columns) and mistyped.isdisjoint(ATTRIBUTE_COLUMNS):
        try:
            check_attribute_columns(dataset, "dataset", criteria, allow_none=True)  # its rows say which have none
        except ValueError as error:
            of_columns.append(("attributes", str(error)))
    counts, faults = Counts(image_columns, resolution, has_label, has_pairs, criteria, fits), []

    def inspect(row: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        return inspect_row(row, columns, image_columns, criteria, needs_attributes)

    rows = enumerate(dataset)
    with ThreadPoolExecutor() as pool:  # PIL decodes without the global interpreter lock
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            for (index, row), (found, content) in zip(
                batch, pool.map(inspect, [row for _, row in batch]), strict=True
            ):
                faults += [
                    {"row": index, "id": row.get("id"), "column": column, "message": text} for column, text in found
                ]
                counts.add(row, content)
    seen = {fault["message"] for fault in faults}
    faults = [
        {"row": None, "id": None, "column": column, "message": text}
        for column, text in of_columns
        if text.rsplit(" It is ", 1)[0] not in seen  # else its rows say it
    ] + faults
    return {"faults": faults, "reasons": by_reason(faults), "holds": counts.summary()}


def inspect_row(
    row: dict[str, Any],
    columns: tuple[str, ...],
    image_columns: tuple[str, ...],
    criteria: Criteria | None,
    needs_attributes: bool,
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """
    Reads one row with the functions of the collators.

    Args:
        row (`dict`):
            The row.
        columns, image_columns, criteria, needs_attributes:
            As for [`data.check.check_dataset`].

    Returns:
        `tuple[list[tuple[str, str]], dict]`: columns and messages of what is wrong; and what could be read.
    """
    faults, content = [], {}

    def attempt(name: str, read: Callable[[], Any]) -> None:
        try:
            content[name] = read()
        except ValueError as error:
            faults.append((name, str(error)))

    attempt("id", lambda: row_id(row))
    if "prompt" in columns:
        attempt("prompt", lambda: row_prompt(row))
    for column in image_columns:
        attempt(column, lambda column=column: read_image(row, column, describe_image))
    if "label" in columns:
        attempt("label", lambda: row_label(row))
    if not {"chosen", "rejected"}.isdisjoint(columns):
        sizes = {
            column: content[column]["stored"] if column in content else (np.inf, np.inf) for column in image_columns
        }
        of_instances = list(instance_faults(row, sizes)) or list(
            mask_faults(row, {column: content[column]["stored"] for column in image_columns if column in content})
        )
        faults += [("instances", text) for text in of_instances]
    if criteria is not None and set(ATTRIBUTE_COLUMNS) <= set(columns):
        attempt("attributes", lambda: check_attributes(row, criteria))
        if needs_attributes and content.get("attributes") == ([], []):
            text = f"The row with id {shown(row.get('id'))} has neither positive nor negative attributes. Drop such rows with `dataset.filter`."
            faults.append(("attributes", text))
    return faults, content


def describe_image(value: Any) -> dict[str, Any]:
    """Decodes an image of a dataset: its `stored` and its upright `size` (width, height), a hash of it, and what it has."""
    content = image_content(value)
    image = open_image(content)
    data = content if isinstance(content, bytes) else image.mode.encode() + image.tobytes()
    with image_errors(content):
        return {
            "stored": image.size,
            "size": upright_image(image).size,
            "hash": hashlib.sha256(data).hexdigest(),
            "transparent": is_transparent(image),
            "turned": orientation(image) != 1,
            "animated": _is_animated(image),
        }


def _is_animated(image: PIL.Image.Image) -> bool:
    return getattr(image, "is_animated", False)  # PIL: only of formats that can be


class Counts:
    """
    Counts what a dataset holds.

    Args:
        image_columns, resolution, criteria, fits:
            As for [`data.check.check_dataset`].
        has_label, has_pairs (`bool`):
            Whether its rows are images with a label, or pairs, which may have instances.
    """

    def __init__(
        self,
        image_columns: tuple[str, ...],
        resolution: int,
        has_label: bool,
        has_pairs: bool,
        criteria: Criteria | None,
        fits: Callable[[str], bool] | None,
    ):
        self.resolution, self.criteria, self.fits = resolution, criteria, fits
        self.has_label, self.has_pairs = has_label, has_pairs
        self.sizes: dict[str, list[tuple[int, int]]] = {column: [] for column in image_columns}
        self.images = {column: Counter() for column in image_columns}
        self.prompts, self.labels, self.preferences, self.attributes = (
            Counter(),
            Counter(),
            Counter(),
            defaultdict(Counter),
        )
        self.ids, self.contents = set(), set()
        self.holds = {"rows": 0, "instances": Counter(), "duplicates": Counter()}

    def add(self, row: dict[str, Any], content: dict[str, Any]) -> None:
        """Counts a row, of which `content` could be read."""
        self.holds["rows"] += 1
        duplicates = self.holds["duplicates"]
        duplicates["id"] += content.get("id") in self.ids
        self.ids |= {content["id"]} if "id" in content else set()
        if "prompt" in content:
            prompt = content["prompt"]
            self.prompts["empty"] += not prompt.strip()
            if self.fits:
                self.prompts["too long"] += not self.fits(prompt)
        for column, counter in self.images.items():
            if column in content:
                image = content[column]
                self.sizes[column].append(image["size"])
                counter.update(["images", *(name for name in ("transparent", "turned", "animated") if image[name])])
                counter["smaller"] += min(image["size"]) < self.resolution
        hashes = [content[column]["hash"] for column in self.images if column in content]
        if hashes and len(hashes) == len(self.images) and "prompt" in content:
            key = content["prompt"], *hashes
            duplicates["prompt and images"] += key in self.contents
            self.contents.add(key)
            duplicates["chosen is rejected"] += len(hashes) == 2 and hashes[0] == hashes[1]
        if "label" in content:
            self.labels["desirable" if content["label"] else "undesirable"] += 1
        if self.has_pairs:
            self._add_instances(row)
        for form, names in zip(("positive", "negative"), content.get("attributes", ()), strict=False):
            for name in names:
                self.attributes[self.criteria.find(name).dimension][form] += 1
        self.holds["instances"]["rows without attributes"] += content.get("attributes") == ([], [])

    def _add_instances(self, row: dict[str, Any]) -> None:
        instances = row.get("instances") or []
        self.holds["instances"]["rows without"] += not instances
        for instance in instances if isinstance(instances, list) else ():
            if isinstance(instance, dict):
                self.labels[cut(str(instance.get("label")), 100)] += 1
                self.holds["instances"]["masks"] += any(has_mask(instance, column) for column in self.images)
                try:
                    self.preferences[check_preference(instance.get("preference"))] += 1
                except ValueError:
                    self.preferences["none"] += 1

    def summary(self) -> dict[str, Any]:
        """The counts, as JSON takes them."""
        images = {}
        for column, sizes in self.sizes.items():
            counter = self.images[column]
            images[column] = {
                name: counter[name] for name in ("images", "smaller", "transparent", "turned", "animated")
            }
            if sizes:
                widths, heights = np.array(sizes).T
                images[column] |= {
                    side: [int(values.min()), int(np.median(values)), int(values.max())]
                    for side, values in (("width", widths), ("height", heights))
                }
        held: dict[str, Any] = {
            "rows": self.holds["rows"],
            "images": images,
            "prompts": {"empty": self.prompts["empty"]},
        }
        if self.fits:
            held["prompts"]["longer than the text encoders read"] = self.prompts["too long"]
        if self.has_label:
            held["labels"] = {name: self.labels[name] for name in ("desirable", "undesirable")}
        if self.has_pairs:
            number = self.labels.total()
            held["instances"] = {
                "instances": number,
                "rows without": self.holds["instances"]["rows without"],
                "preferences": dict(self.preferences),
                "conflicts": round(self.preferences["rejected"] / number, 4) if number else 0.0,
                "ties": round(self.preferences["tie"] / number, 4) if number else 0.0,
                "labels": dict(self.labels.most_common()),
            }
            if masks := self.holds["instances"]["masks"]:
                held["instances"]["with masks"] = masks
        if self.criteria is not None:
            held["attributes"] = {
                "rows without": self.holds["instances"]["rows without attributes"],
                "dimensions": {name: dict(forms) for name, forms in sorted(self.attributes.items())},
            }
        duplicates = ["id", "prompt and images"] + (["chosen is rejected"] if len(self.sizes) == 2 else [])
        return held | {"duplicates": {name: self.holds["duplicates"][name] for name in duplicates}}


def by_reason(faults: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The faults that differ only in their values together: `column`, `message` of the first, `count`, and all `rows`."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for fault in faults:
        key = fault["column"], VALUES.sub("…", fault["message"])
        group = groups.setdefault(
            key, {"column": fault["column"], "message": fault["message"], "count": 0, "rows": []}
        )
        group["count"] += 1
        if fault["row"] is not None:
            group["rows"].append(fault["row"])
    return list(groups.values())


def as_text(report: dict[str, Any]) -> Iterator[str]:
    """
    Writes a report for people.

    Args:
        report (`dict`):
            A result of [`data.check.check_dataset`].

    Yields:
        `str`: the lines.
    """
    held = report["holds"]
    yield f"{held['rows']} rows"
    for column, image in held["images"].items():
        sides = ", ".join(
            f"{side} {' / '.join(map(str, image[side]))}" for side in ("width", "height") if side in image
        )
        counts = ", ".join(f"{image[name]} {name}" for name in ("smaller", "transparent", "turned", "animated"))
        yield f"{column}: {image['images']} images; {sides or 'none'} (least / median / most); {counts}"
    yield "prompts: " + _counts(held["prompts"])
    if "labels" in held:
        yield "labels: " + _counts(held["labels"])
    if "instances" in held:
        instances = held["instances"]
        yield (
            f"instances: {instances['instances']}; {instances['rows without']} rows without; conflicts "
            f"{instances['conflicts']:.1%}, ties {instances['ties']:.1%}"
            + (f"; {instances['with masks']} with masks" if "with masks" in instances else "")
        )
        labels = list(instances["labels"].items())
        more = len(labels) - SHOWN_LABELS
        if labels:
            yield "labels: " + _counts(dict(labels[:SHOWN_LABELS])) + (f" and {more} more" if more > 0 else "")
    if "attributes" in held:
        yield f"attributes: {held['attributes']['rows without']} rows without"
        for name, forms in held["attributes"]["dimensions"].items():
            yield f"  {name}: {_counts(forms)}"
    yield "duplicates: " + _counts(held["duplicates"])
    for reason in report["reasons"]:
        rows, more = reason["rows"][:SHOWN_ROWS], len(reason["rows"]) - SHOWN_ROWS
        where = f" (rows {', '.join(map(str, rows))}{f' and {more} more' if more > 0 else ''})" if rows else ""
        yield f"WRONG, {reason['count']} x {reason['column']}{where}: {reason['message']}"
    number = len({fault["row"] for fault in report["faults"]} - {None})
    yield f"{number} of {held['rows']} rows would stop a training." if report["faults"] else "Nothing is wrong."


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
