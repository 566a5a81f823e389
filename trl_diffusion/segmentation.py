# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Segmentation masks in the run-length encoding (RLE) of COCO: `{"size": [height, width], "counts": ...}`.

`counts` are the lengths of the runs of pixels that are outside, inside, outside ... of the object, column by column. They are a list of
integers, or a string in which each character holds five bits of an integer, the lowest first: after the third, a number is the
difference to the one two places before.
"""

from numbers import Integral
from typing import Any

import numpy as np

from .messages import shown


WAY_OUT = "; `trl_diffusion.segmentation.encode_rle(mask)` makes those of a mask"
MOST_PIXELS = 2**28  # of a mask whose image is not known
LONGEST_NUMBER = 7  # characters of a number in a string of counts: 35 bits


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """
    Encodes a segmentation mask as COCO does.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, bool):
            The pixels of the object.

    Returns:
        `dict`: `size`, `[H, W]`, and `counts`, a string.
    """
    pixels = np.concatenate([[False], mask.astype(bool).ravel(order="F")])
    ends = np.append(
        np.flatnonzero(pixels[1:] != pixels[:-1]), mask.size
    )  # the first run is outside, perhaps of length 0
    counts = np.diff(ends, prepend=0)
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    return {"size": list(mask.shape), "counts": "".join(map(_characters, numbers.tolist()))}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """
    Decodes a segmentation mask of COCO.

    Args:
        rle (`dict`):
            `size`, `[H, W]` in pixels, and `counts`: a string, the same as bytes, or a list of integers.

    Returns:
        `np.ndarray` of shape `(H, W)`, bool: the pixels of the object.

    Raises:
        `ValueError`: If the size is not two positive integers, or if the counts are not those of a mask of this size.
    """
    height, width = rle_size(rle)
    if height * width > MOST_PIXELS:
        raise ValueError(f"its size, {height} x {width} pixels, is larger than any image's")
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        numbers = _numbers(counts if isinstance(counts, bytes) else counts.encode("ascii", "replace"))
    elif isinstance(counts, list | tuple) and all(
        _is_integer(count) and abs(count) <= MOST_PIXELS for count in counts
    ):
        numbers = np.array(counts, np.int64)
    else:
        raise ValueError(f"its `counts` must be a string or a list of integers, got {shown(counts)}{WAY_OUT}")
    if (numbers < 0).any():
        raise ValueError(f"its `counts` have a negative length, {numbers.min()}")
    if numbers.sum() != height * width:
        raise ValueError(
            f"its `counts` add up to {numbers.sum():,} pixels, but a mask of {height} x {width} has {height * width:,}"
            f"{WAY_OUT}"
        )
    return np.repeat(np.arange(len(numbers)) % 2 == 1, numbers).reshape(width, height).T


def rle_size(rle: dict[str, Any]) -> tuple[int, int]:
    """The height and width in pixels of an encoded mask. Raises a `ValueError` if they are not two positive integers."""
    size = rle.get("size")
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(_is_integer(side) and side > 0 for side in size)
    ):
        raise ValueError(f"its `size` must be two positive integers, [height, width], got {shown(size)}")
    return int(size[0]), int(size[1])


def mask_bounds(mask: np.ndarray) -> list[int]:
    """
    The smallest box around a segmentation mask.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, bool):
            The pixels of the object.

    Returns:
        `list[int]`: `[x_min, y_min, x_max, y_max]` in pixels; four zeros for an empty mask.
    """
    if not mask.any():
        return [0, 0, 0, 0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _characters(number: int) -> str:
    """A number as five bits a character, the lowest first, until those that are left repeat the sign."""
    characters = []
    while True:
        bits, number = number & 31, number >> 5
        is_last = number == (-1 if bits & 16 else 0)
        characters.append(chr(48 + bits + (0 if is_last else 32)))
        if is_last:
            return "".join(characters)


def _numbers(characters: bytes) -> np.ndarray:
    """The counts of a string."""
    values = np.frombuffer(characters, np.uint8).astype(np.int64) - 48
    if ((values < 0) | (values > 63)).any() or (len(values) and values[-1] & 32):
        raise ValueError(
            "its `counts` are no string of COCO's run-length encoding"
            + (
                ": they are bytes that were written as Python shows them, write `counts.decode()`"
                if characters[:2] in (b"b'", b'b"')
                else WAY_OUT
            )
        )
    ends = np.flatnonzero(values < 32)
    starts = np.append(0, ends[:-1] + 1) if len(ends) else ends
    lengths = ends - starts + 1
    if (lengths > LONGEST_NUMBER).any():
        raise ValueError("its `counts` have a number that is larger than any image")
    place = np.arange(len(values)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((values & 31) << 5 * place, starts) if len(ends) else values
    numbers[values[ends] & 16 > 0] -= (1 << 5 * lengths)[values[ends] & 16 > 0]  # the highest bit is the sign
    for parity in (1, 2):  # differences, but for the first three
        numbers[parity::2] = np.cumsum(numbers[parity::2])
    return numbers
