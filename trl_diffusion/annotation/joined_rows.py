# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The rows that a source and its annotations give together, and their columns."""

import io
from collections.abc import Callable
from typing import Any

import PIL.Image
from datasets import ClassLabel, Features, List

from ..data.formats import ATTRIBUTE_COLUMNS, attribute_features, instance_pair_features
from ..messages import shortened, shown
from ..segmentation import decode_rle
from .records import Record, id_text, read_id, read_image
from .run import Row


BOXES, MASKS = ("chosen_box", "rejected_box"), ("chosen_mask", "rejected_mask")


def joined_features(annotated: Features) -> Features:
    """
    Determines the columns of the joined dataset.

    Args:
        annotated ([`~datasets.Features`]):
            Columns of the annotations.

    Returns:
        [`~datasets.Features`]: the trainers' columns. Attributes keep their type in the annotations.

    Raises:
        `ValueError`: If the columns are not those of annotations.
    """
    if {"id", "instances"} <= set(annotated):
        instance = annotated["instances"].feature if isinstance(annotated["instances"], List) else None
        return instance_pair_features(masks=isinstance(instance, dict) and set(MASKS) <= set(instance))
    if {"id", *ATTRIBUTE_COLUMNS} <= set(annotated):
        return Features(
            {**attribute_features(), **{name: attribute_type(annotated[name], name) for name in ATTRIBUTE_COLUMNS}}
        )
    raise ValueError(
        f"`annotations` has the columns {shortened(list(annotated))}, which are not those of annotations. Load them with "
        "`load_annotations`, or from the configuration `annotations` of a published dataset."
    )


def attribute_type(feature: Any, name: str) -> List:
    """The type of a column of attributes: class labels as in the annotations, or else strings."""
    label = feature.feature if isinstance(feature, List) else feature
    if isinstance(label, ClassLabel):
        return feature
    if "int" in str(label):
        raise ValueError(
            f"`{name}` of the annotations holds integers without names: which attributes they are was lost when they were "
            "written. Write annotations with `save_annotations`, which writes the ids of the attributes."
        )
    return attribute_features()[name]


def join_pair(row: Row, columns: dict[str, str], annotation: Row, preference: Callable[[Any], str]) -> Row | None:
    """
    Joins a pair with its annotation.

    Args:
        row (`dict`):
            A row of the source, with undecoded images.
        columns (`dict[str, str]`):
            From our column names to those of the source.
        annotation (`dict`):
            The annotation of the row.
        preference (`Callable`):
            Reads a preference.

    Returns:
        `dict`: a training row, or `None` if the images are not those that were annotated. Instances have masks if the annotation
        has any, as PNG files.

    Raises:
        `ValueError`: If the file of an image cannot be read.
    """
    names = ("image_0", "image_1") if "image_0" in columns else ("chosen", "rejected")
    stored = [read_stored(row, columns, name) for name in names]
    images = dict(stored)
    chosen, rejected = (annotation.get(f"{name}_uid", stored[n][0]) for n, name in enumerate(("chosen", "rejected")))
    if set(images) != {chosen, rejected}:
        return None
    return {
        "id": id_text(annotation["id"]),
        "prompt": row[columns["prompt"]] or "",
        "chosen": images[chosen],
        "rejected": images[rejected],
        "instances": [
            {name: found[name] for name in ("label", *BOXES)}
            | {name: png_of(found[name]) for name in MASKS if name in found}
            | {"preference": preference(found["preference"])}
            for found in annotation["instances"] or []
        ],
    }


def join_image(row: Row, columns: dict[str, str], annotation: Row) -> Row | None:
    """Joins an image with its annotation, as [`annotation.join.join_pair`] does for pairs."""
    uid, image = read_stored(row, columns, "image")
    if uid != annotation.get("image_uid", uid):
        return None
    attributes = {name: annotation[name] or [] for name in ATTRIBUTE_COLUMNS}
    return {"id": id_text(annotation["id"]), "prompt": row[columns["prompt"]] or "", "image": image} | attributes


def read_stored(row: Row, columns: dict[str, str], name: str) -> tuple[str, dict[str, bytes | None]]:
    """Reads an image of a row: its uid, and the image as a dataset stores it."""
    record = Record(read_id(row, columns), "")
    image, uid = read_image(record, row, columns, name)
    if image is None:
        raise ValueError(f"An image of the row with id {shown(record.id)} cannot be read: {record.reason}.")
    return uid, {"bytes": image.data, "path": None}


def png_of(mask: dict[str, Any] | None) -> dict[str, bytes | None] | None:
    """
    A mask as a dataset stores it.

    Args:
        mask (`dict`, *optional*):
            Run lengths, see [`segmentation.encode_rle`]; or an undecoded image, which stays as it is.

    Returns:
        `dict`: an undecoded PNG image of one bit per pixel; `None` if there is no mask.

    Raises:
        `ValueError`: If the run lengths are not those of a mask.
    """
    if mask is None or "counts" not in mask:
        return mask
    if mask["counts"] is None:
        return None
    try:
        pixels = decode_rle(mask)
    except ValueError as error:
        raise ValueError(
            f"A mask of the annotations cannot be read: {error}. Load them as they were written."
        ) from error
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
