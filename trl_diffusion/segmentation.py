# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Segmentation masks as COCO's run lengths."""

from typing import Any

import numpy as np


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """
    Encodes a mask as COCO's compressed run lengths.

    Args:
        mask (`np.ndarray` of shape `(height, width)`):
            The mask: bool.

    Returns:
        `dict`: `size` (`[height, width]`) and `counts` (`str`).
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    text = []
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            bits = number & 31
            number >>= 5
            more = number != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return {"size": list(mask.shape), "counts": "".join(text)}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """
    Decodes a mask from COCO's compressed run lengths.

    Args:
        rle (`dict`):
            `size` (`[height, width]`) and `counts` (`str`).

    Returns:
        `np.ndarray` of shape `(height, width)`: the mask, bool.
    """
    runs, number, shift = [], 0, 0
    for code in rle["counts"].encode():
        code -= 48
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number, shift = 0, 0
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(rle["size"], order="F")
