# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The instances of a pair: their types, boxes, segmentation masks and preferences, and readable errors for invalid ones."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value

from ..messages import cut, quoted, shown
from ..segmentation import decode_rle, rle_size
from .column_checks import LARGEST_NUMBER, MASKS, MOST_INSTANCES, PREFERENCES
from .images import image_content, image_errors, open_lazily


Size = tuple[float, float]  # width and height in pixels of a stored image
ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "F")


def instance_pair_features(masks: bool = False) -> Features:
    """
    The columns of [`InstanceDPOTrainer`]: a pair of images, and the instances that both images show.

    Boxes are `[x_min, y_min, x_max, y_max]` in pixels of the stored image, before any EXIF orientation is applied.
    `preference` is the image in which the instance is depicted better.

    Args:
        masks (`bool`, *optional*, defaults to `False`):
            Whether instances also have `chosen_mask` and `rejected_mask`, PNG images of the size of the stored image. Where an
            instance has a mask, its box may be null.

    Returns:
        [`~datasets.Features`]
    """
    box = List(Value("float32"), length=4)
    instance = {
        "label": Value("string"),
        "chosen_box": box,
        "rejected_box": box,
        **({"chosen_mask": Image(), "rejected_mask": Image()} if masks else {}),
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


def check_instances(row: dict[str, Any], sizes: dict[str, Size] | None = None) -> list[dict[str, Any]]:
    """
    Checks the instances of a row, all but the content of their masks.

    Args:
        row (`dict`):
            The row.
        sizes (`dict[str, tuple[float, float]]`, *optional*):
            Width and height in pixels of the stored images by column. If left out, boxes may reach any far.

    Returns:
        `list[dict]`: the instances.

    Raises:
        `ValueError`: At the first of [`data.instances.instance_faults`].
    """
    for fault in instance_faults(row, sizes or {"chosen": (math.inf, math.inf), "rejected": (math.inf, math.inf)}):
        raise ValueError(fault)
    return row.get("instances") or []


def instance_faults(row: dict[str, Any], sizes: dict[str, Size]) -> Iterator[str]:
    """All that is wrong with the instances of a row, see [`data.instances.check_instances`]."""
    instances = row.get("instances") or []
    if not isinstance(instances, list | tuple) or not all(isinstance(instance, dict) for instance in instances):
        yield f"`instances` of the row with id {shown(row.get('id'))} must be a list of objects, got {shown(instances)}."
        return
    if len(instances) > MOST_INSTANCES:
        yield (
            f"`instances` of the row with id {shown(row.get('id'))} are {len(instances):,}; a row has at most {MOST_INSTANCES:,}. Keep those "
            "that matter."
        )
        return
    for index, instance in enumerate(instances):
        of_row = f"of the row with id {shown(row.get('id'))}"
        for column, size in sizes.items():
            box = instance.get(f"{column}_box")
            if box is None and has_mask(instance, column):
                continue
            try:
                check_box(box, *size)
            except ValueError as error:
                yield f"`instances[{index}].{column}_box` {of_row} is not a box: {error}."
        try:
            check_preference(instance.get("preference"))
        except ValueError as error:
            yield f"`instances[{index}].preference` {of_row} is not a preference: {error}."


def has_mask(instance: dict[str, Any], column: str) -> bool:
    """Whether an instance has a segmentation mask in an image."""
    mask = instance.get(f"{column}_mask")
    return any(value is not None for value in mask.values()) if isinstance(mask, dict) else mask is not None


def may_have_masks(dataset: Dataset, columns: Iterable[str]) -> bool:
    """Whether instances may have masks in some images of a dataset: their type has some, or a transform of the user makes the rows."""
    feature, masks = dataset.features.get("instances"), {f"{column}_mask" for column in columns}.intersection(MASKS)
    fields = feature.feature if isinstance(feature, List | LargeList) else None
    may_have = dataset.format["type"] == "custom" or (isinstance(fields, dict) and not fields.keys().isdisjoint(masks))
    return bool(masks) and may_have


def packed_bytes(row: dict[str, Any], columns: Iterable[str], size: tuple[int, int]) -> int:
    """
    How many bytes the masks of a row take in a batch, see [`masks.pack_masks`].

    Args:
        row (`dict`):
            The row.
        columns (`Iterable[str]`):
            The columns of its images.
        size (`tuple[int, int]`):
            (height, width) of the training images in pixels.

    Returns:
        `int`: in an image of which an instance has a mask, each instance takes as much.

    Raises:
        `ValueError`: If the instances are invalid.
    """
    instances, (height, width) = check_instances(row), size
    number = sum(any(has_mask(instance, column) for instance in instances) for column in columns)
    return number * len(instances) * height * -(-width // 8)


def read_regions(row: dict[str, Any], column: str, size: Size) -> tuple[list[list[float]], list[np.ndarray | None]]:
    """
    Reads where the instances of a row are in one of its images.

    Args:
        row (`dict`):
            A row whose instances were checked by [`data.instances.check_instances`].
        column (`str`):
            The column of the image.
        size (`tuple[int, int]`):
            Width and height in pixels of the stored image.

    Returns:
        `tuple[list[list[float]], list[np.ndarray]]`: for each instance its box, `[x_min, y_min, x_max, y_max]` in pixels of the stored
        image, and its segmentation mask of shape `(H, W)`, bool. An instance with a mask has a box of zeros, one with a box alone
        the mask `None`.

    Raises:
        `ValueError`: If a mask cannot be read. The message names the row and the mask.
    """
    instances = row.get("instances") or []
    masks = [_read_mask(row, index, column, size) for index in range(len(instances))]
    boxes = [
        [0.0] * 4 if mask is not None else list(instance[f"{column}_box"])
        for instance, mask in zip(instances, masks, strict=True)
    ]
    return boxes, masks


def mask_faults(row: dict[str, Any], sizes: dict[str, Size]) -> Iterator[str]:
    """All that is wrong with the masks of a row in some images of known sizes, see [`data.instances.read_mask`]."""
    for index in range(len(row.get("instances") or [])):
        for column, size in sizes.items():
            try:
                _read_mask(row, index, column, size)
            except ValueError as error:
                yield str(error)


def _read_mask(row: dict[str, Any], index: int, column: str, size: Size) -> np.ndarray | None:
    instance = row["instances"][index]
    if not has_mask(instance, column):
        return None
    try:
        return read_mask(instance[f"{column}_mask"], size)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`instances[{index}].{column}_mask` of the row with id {shown(row.get('id'))} is not a mask: {cut(str(error))}. "
            "Correct it, or leave the instance out."
        ) from error


def read_mask(mask: Any, size: Size) -> np.ndarray:
    """
    Reads a segmentation mask.

    Args:
        mask (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            A PNG image as [`data.images.open_image`] takes it, or a run-length encoding, see [`segmentation.decode_rle`]. A pixel of the
            image belongs to the object if its value is not 0; of a palette image, if its index is not; of an RGB image, if it is
            not black.
        size (`tuple[int, int]`):
            Width and height in pixels of the stored image, before its EXIF orientation is applied. The mask has the same.

    Returns:
        `np.ndarray` of shape `(H, W)`, bool: the pixels of the object.

    Raises:
        `ValueError`: If the mask cannot be read, has another size, is empty, or has values whose meaning is not clear.
        `OSError`: If the file is missing.
    """
    if isinstance(mask, list | tuple):
        raise ValueError(
            "it is a list, as polygons are: make an RLE of it with `pycocotools.mask.frPyObjects`, or store a PNG image"
        )
    if isinstance(mask, dict) and mask.get("counts") is not None:
        height, width = rle_size(mask)
        if (height, width) == size != (width, height):
            raise ValueError(
                f"its `size` is {[height, width]}, [width, height] of its image: COCO's is [height, width]"
            )
        _check_size((width, height), size)
        pixels = decode_rle(mask)
    else:
        pixels = _read_png(mask, size)
    if not pixels.any():
        raise ValueError("it is empty: no pixel belongs to the object")
    return pixels


def _read_png(mask: Any, size: Size) -> np.ndarray:
    content = image_content(mask)
    with image_errors(content):
        image = open_lazily(content)
        if image.format not in ("PNG", None):
            raise ValueError(
                f"it is a {image.format} file, which may have changed its pixels: store a PNG file, or an RLE"
            )
        if image.mode not in (*ONE_CHANNEL, "RGB"):
            raise ValueError(
                f"its mode is {image.mode}, in which it is not clear which pixels are meant: store one channel, 0 outside of the object"
            )
        _check_size(image.size, size)
        values = np.asarray(image) != 0
    return values.any(axis=-1) if values.ndim == 3 else values


def _check_size(found: tuple[int, int], size: Size) -> None:
    if found != size:
        raise ValueError(
            f"it is {found[0]} pixels wide and {found[1]} high, but its image {size[0]} and {size[1]}: a mask has the size of the "
            "stored image, before any EXIF orientation and resizing"
        )


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
        raise ValueError(f"{shown(box)} is not a list of four numbers [x_min, y_min, x_max, y_max]")
    if not all(is_finite(number) for number in box):
        raise ValueError(f"{shown(box)} has a coordinate that is not a finite number")
    x_min, y_min, x_max, y_max = box
    if x_min >= x_max or y_min >= y_max:
        raise ValueError(f"{shown(box)} is inverted or empty: it must have x_min < x_max and y_min < y_max, in pixels")
    if x_min < -1 or y_min < -1 or x_max > width + 1 or y_max > height + 1:
        raise ValueError(
            f"{shown(box)} reaches outside of its image, which is {width} pixels wide and {height} high: boxes are in pixels of "
            "the stored image, not of a resized one"
        )
    return list(box)


def is_finite(number: Any) -> bool:
    """Whether a value is a number that float32 holds, in which boxes are computed."""
    return isinstance(number, int | float) and abs(number) <= LARGEST_NUMBER  # not so for NaN


def check_preference(preference: Any) -> str:
    """
    Converts the preference of an instance to a string.

    Args:
        preference (`int` or `str`):
            One of `PREFERENCES`, or its index in a [`~datasets.ClassLabel`]. Whether an integer has names is known to its
            dataset alone, see [`data.formats.prepare_dataset`].

    Returns:
        `str`: `"chosen"`, `"rejected"` or `"tie"`.

    Raises:
        `ValueError`: If it is neither.
    """
    if isinstance(preference, str) and preference in PREFERENCES:
        return preference
    if isinstance(preference, int) and not isinstance(preference, bool) and 0 <= preference < len(PREFERENCES):
        return PREFERENCES[preference]
    raise ValueError(f"{shown(preference)} is none of {quoted(PREFERENCES)}")
