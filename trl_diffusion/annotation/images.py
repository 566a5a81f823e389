# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The images of an annotation run: decodes each image once, upright, and maps boxes and masks back to pixels of the stored file."""

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..boxes import denormalize_boxes, orient_boxes
from ..data.images import check_shape, image_content, image_errors, open_lazily
from ..data.pictures import TURNS, orientation, rgb_image, upright_image


INVERSE_ORIENTATIONS = {6: 8, 8: 6}  # every other orientation is its own inverse
BOMB_PIXELS = 89_478_485  # PIL warns above this number
MOST_PIXELS = 2048 * 2048  # no role sees more pixels, and thousands of images are in memory at once
PADDING = (127, 127, 127)


@dataclass
class StoredImage:
    """
    An image as the dataset stores it.

    Args:
        data (`bytes`):
            The encoded image.
    """

    data: bytes

    @classmethod
    def read(cls, value: Any) -> "StoredImage":
        """
        Reads an image of a dataset without decoding it.

        Args:
            value (`dict`, `bytes`, `str` or `PIL.Image.Image`):
                An image in any form that [`data.images.open_image`] accepts.

        Returns:
            [`StoredImage`]

        Raises:
            `ValueError`: If the value is not an image.
            `OSError`: If a file is missing.
        """
        content = image_content(value)
        if isinstance(content, bytes):
            return cls(content)
        buffer, exif = io.BytesIO(), PIL.Image.Exif()
        with image_errors(content):
            if (turn := orientation(content)) != 1:
                exif[PIL.Image.ExifTags.Base.Orientation] = turn
            rgb_image(content).save(buffer, format="PNG", exif=exif)  # PNG does not have every mode
        return cls(buffer.getvalue())

    def __getstate__(self) -> dict:
        return {"data": self.data}  # decoded pixels are not sent to another process

    @cached_property
    def uid(self) -> str:
        """A hash of the content."""
        return hashlib.sha256(self.data).hexdigest()[:32]

    @cached_property
    def _opened(self) -> tuple[PIL.Image.Image, tuple[int, int], int]:
        with image_errors(self.data):
            image = open_lazily(self.data)
            check_shape(image)
            pixels = image.width * image.height
            if pixels > BOMB_PIXELS:
                raise ValueError(f"the image claims {pixels:,} pixels; more than {BOMB_PIXELS:,} are refused")
            image.load()
            return limit_pixels(upright_image(image), MOST_PIXELS), image.size, orientation(image)

    def open(self) -> None:
        """
        Decodes the image.

        Raises:
            `ValueError`: If it cannot be read, with the reason.
        """
        _ = self._opened  # not an assert, which `python -O` would skip

    @property
    def readable(self) -> bool:
        """Whether the image can be decoded."""
        try:
            self.open()
        except ValueError:
            return False
        return True

    @property
    def upright(self) -> PIL.Image.Image:
        """The image as [`data.pictures.upright_image`] shows it, downscaled to at most `MOST_PIXELS`."""
        return self._opened[0]

    def shown(self, max_pixels: int) -> tuple[PIL.Image.Image, bytes | None]:
        """
        Prepares the image for a model.

        Args:
            max_pixels (`int`):
                Images with more pixels are downscaled.

        Returns:
            `tuple`: the upright image, and its file if that is a JPEG with exactly these pixels, else `None`.
        """
        image = limit_pixels(self.upright, max_pixels)
        return image, self.data if image.format == "JPEG" else None  # any change resets the format

    def stored_box(self, box: list[float]) -> list[float]:
        """
        Converts a box of the upright image to the stored file.

        Args:
            box (`list[float]`):
                Unit box in `upright`.

        Returns:
            `list[float]`: `[x_min, y_min, x_max, y_max]` in pixels of the stored image, clipped to it.
        """
        _, size, orientation = self._opened
        stored = orient_boxes(torch.tensor(box).clamp(0, 1), INVERSE_ORIENTATIONS.get(orientation, orientation))
        return denormalize_boxes(stored, *size).tolist()

    def stored_mask(self, mask: np.ndarray) -> np.ndarray:
        """
        Converts a mask of the upright image to the stored file.

        Args:
            mask (`np.ndarray` of shape `(height, width)` of `upright`):
                The mask: bool.

        Returns:
            `np.ndarray` of shape `(height, width)` of the stored image: bool.
        """
        _, size, orientation = self._opened
        stored = PIL.Image.fromarray(mask)
        if orientation != 1:
            stored = stored.transpose(TURNS[INVERSE_ORIENTATIONS.get(orientation, orientation)])
        return np.array(stored.resize(size, PIL.Image.Resampling.NEAREST))


def crop_around(image: PIL.Image.Image, box: list[float], size: int, margin: float) -> PIL.Image.Image:
    """
    Crops a square around the centre of an instance. The longer side of the box fills the same share of every crop.

    Args:
        image (`PIL.Image.Image`):
            An upright image.
        box (`list[float]`):
            Unit box of the instance.
        size (`int`):
            Width and height of the result in pixels.
        margin (`float`):
            Side of the square divided by the longer side of the box.

    Returns:
        `PIL.Image.Image`: the crop, padded with grey outside the image.
    """
    x_min, x_max = box[0] * image.width, box[2] * image.width
    y_min, y_max = box[1] * image.height, box[3] * image.height
    side = margin * max(x_max - x_min, y_max - y_min, 1)
    left, top = (x_min + x_max - side) / 2, (y_min + y_max - side) / 2
    inside = (max(left, 0), max(top, 0), min(left + side, image.width), min(top + side, image.height))
    scale = size / side
    corner = round((inside[0] - left) * scale), round((inside[1] - top) * scale)
    extent = round((inside[2] - left) * scale) - corner[0], round((inside[3] - top) * scale) - corner[1]
    extent = max(extent[0], 1), max(extent[1], 1)
    part = image.resize(extent, PIL.Image.Resampling.BILINEAR, box=inside, reducing_gap=2)
    if extent == (size, size):
        return part
    crop = PIL.Image.new("RGB", (size, size), PADDING)
    crop.paste(part, corner)
    return crop


def limit_pixels(image: PIL.Image.Image, max_pixels: int) -> PIL.Image.Image:
    """
    Downscales an image that has too many pixels.

    Args:
        image (`PIL.Image.Image`):
            The image.
        max_pixels (`int`):
            Maximum of width times height.

    Returns:
        `PIL.Image.Image`: the image itself, or a smaller copy with the same aspect ratio.
    """
    pixels = image.width * image.height
    if pixels <= max_pixels:
        return image
    scale = (max_pixels / pixels) ** 0.5
    size = max(int(image.width * scale), 1), max(int(image.height * scale), 1)
    return image.resize(size, PIL.Image.Resampling.BICUBIC, reducing_gap=2)
