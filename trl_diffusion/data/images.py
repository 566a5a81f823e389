# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Reads images as datasets store them."""

import io
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import PIL.Image
from datasets.utils.file_utils import xopen

from ..messages import cut, shown
from .pictures import orientation


HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
REDUCED_SIDES = (
    4  # a JPEG is decoded at a fraction of its size only where that leaves so many times the sides asked for
)
LONGEST_SIDE = 200  # times the shorter one: models refuse more, and what covers a square has as many pixels more
LARGEST_FILE = 2**30  # bytes
BROKEN_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)  # also of encrypted ones
ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")  # what a place in an archive may begin with


def open_image(value: Any, any_shape: bool = False) -> PIL.Image.Image:
    """
    Opens an image of a dataset, without applying its EXIF orientation.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            An image, its encoded bytes, a path, or a value of an undecoded [`~datasets.Image`] column: a dictionary with
            `bytes` or `path`.
        any_shape (`bool`, *optional*, defaults to `False`):
            Whether the longer side may be more than 200 times the shorter one.

    Returns:
        `PIL.Image.Image`: the image, loaded.

    Raises:
        `ValueError`: If the value is not an image, or one that cannot be read.
        `OSError`: If the file is missing.
    """
    content = image_content(value)
    with image_errors(content):
        image = open_lazily(content)
        if not any_shape:
            check_shape(image)
        image.load()
    return image


def open_reduced(value: Any, size: tuple[int, int]) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """
    Opens an image of a dataset that will be made smaller. A JPEG file with at least 8 times the sides that are needed is decoded
    at 1/2, 1/4 or 1/8 of its size, which leaves at least 4 times those sides.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            As [`data.images.open_image`] takes it.
        size (`tuple[int, int]`):
            (height, width) in pixels that the upright image will be resized to cover.

    Returns:
        `tuple[PIL.Image.Image, tuple[int, int]]`: the image, loaded, and the (width, height) in pixels of the stored one.

    Raises:
        `ValueError`: If the value is not an image, or one that cannot be read.
        `OSError`: If the file is missing.
    """
    content = image_content(value)
    with image_errors(content):
        image, reduction = open_lazily(content), None
        check_shape(image)
        stored_size = image.size
        if isinstance(content, bytes):  # an image that was given as one is left as it is
            height, width = size[::-1] if orientation(image) in (5, 6, 7, 8) else size
            scale = REDUCED_SIDES * max(height / image.height, width / image.width)
            reduction = image.draft(None, (math.ceil(scale * image.width), math.ceil(scale * image.height)))
        image.load()
    return image, image.size if reduction is None else stored_size


def image_size(value: Any) -> tuple[int, int]:
    """
    Size of an image of a dataset after its EXIF orientation is applied. Only the header is read if the format allows it.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            As [`data.images.open_image`] takes it.

    Returns:
        `tuple[int, int]`: height and width in pixels.

    Raises:
        `ValueError`: If the value is not an image, or one that cannot be read.
        `OSError`: If the file is missing.
    """
    content = image_content(value)
    with image_errors(content):
        image = open_lazily(content)
        check_shape(image)
    return image.size if orientation(image) in (5, 6, 7, 8) else (image.height, image.width)


def image_content(value: Any) -> PIL.Image.Image | bytes:
    """
    Reads an image of a dataset without decoding it.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`):
            As [`data.images.open_image`] takes it.

    Returns:
        `PIL.Image.Image` or `bytes`: the image if the value is one, otherwise the content of its file.

    Raises:
        `ValueError`: If the value is not an image.
        `OSError`: If the file is missing.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, PIL.Image.Image | bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected an image, its bytes or a path, got {type(value).__name__}")
    check_place(value)
    try:
        with xopen(value, "rb") as file:  # a path on disk, in an archive or on the Hub
            content = file.read(LARGEST_FILE + 1)
    except (*BROKEN_ARCHIVE, KeyError, ImportError) as error:
        raise ValueError(f"{shown(value)} cannot be read: {error or type(error).__name__}") from error
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{shown(value)} is larger than {LARGEST_FILE >> 30} GiB, which no image is")
    return content


def check_place(path: str) -> None:
    """
    Checks where an image is: in a file on disk, in an archive, or on the Hub. Nothing else is opened: an address may belong to
    anybody, and a device or a pipe has no end.

    Args:
        path (`str`):
            The path.

    Raises:
        `ValueError`: If it is an address, or no file.
    """
    *archives, last = path.split("::")
    scheme, separator, _ = last.partition("://")
    for place in archives:
        if place.partition("://")[0] not in ARCHIVES:
            raise ValueError(f"{shown(path)} is no place in an archive; it may begin with {', '.join(ARCHIVES)}")
    if separator and scheme != "hf":
        raise ValueError(f"{shown(path)} is an address: download the file, and store its path or its bytes")
    if not separator and stat.S_ISDIR(mode := os.stat(last).st_mode):
        raise ValueError(f"{shown(path)} is a folder")
    if not separator and not stat.S_ISREG(mode):
        raise ValueError(f"{shown(path)} is no file but a device or a pipe")


@contextmanager
def image_errors(content: PIL.Image.Image | bytes) -> Iterator[None]:
    """
    Turns what PIL raises on a file that it cannot read into a `ValueError` with the reason.

    Args:
        content (`PIL.Image.Image` or `bytes`):
            The image, as [`data.images.image_content`] returns it.
    """
    if content == b"":
        raise ValueError("the image is empty: it has no bytes")
    try:
        yield
    except PIL.UnidentifiedImageError as error:
        if content[4:8] == b"ftyp" and content[8:12] in HEIC_BRANDS:
            raise ValueError("this is a HEIC file, which Pillow does not read: convert it to JPEG or PNG") from error
        raise ValueError(f"this is not an image that can be read; it starts with {content[:16]!r}") from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"the image claims too many pixels: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # on broken files, PIL raises whatever its decoders run into
        raise ValueError(f"the image is broken: {cut(str(error)) or type(error).__name__}") from error


def open_lazily(content: PIL.Image.Image | bytes) -> PIL.Image.Image:
    """
    Opens an image without decoding it.

    Args:
        content (`PIL.Image.Image` or `bytes`):
            The image, as [`data.images.image_content`] returns it.

    Returns:
        `PIL.Image.Image`

    Raises:
        `ValueError`: If it is no picture of pixels.
    """
    image = PIL.Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
    if image.format in ("EPS", "WMF"):
        raise ValueError(
            f"this is a drawing ({image.format}), which another program would have to run: convert it to PNG"
        )
    return image


def check_shape(image: PIL.Image.Image) -> None:
    """Raises a `ValueError` for a thread, which would become very large where it covers a square."""
    if max(image.size) > LONGEST_SIDE * min(image.size):
        raise ValueError(
            f"the image is {image.width} x {image.height} pixels: models refuse images whose longer side is more "
            f"than {LONGEST_SIDE} times the shorter one"
        )
