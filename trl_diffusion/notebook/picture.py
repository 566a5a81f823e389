# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A picture that displays itself."""

import io
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from ..files import save_picture


SIZE = 256  # pixels of the longer side of an image in a picture


@dataclass(frozen=True, repr=False)
class Picture:
    """
    A picture that a notebook shows where a cell ends with it.

    Attributes:
        image (`PIL.Image.Image`):
            The picture.
    """

    image: PIL.Image.Image

    def __repr__(self) -> str:
        return f"{type(self).__name__}, {self.image.width} x {self.image.height} pixels"

    def save(self, path: str | Path) -> None:
        """
        Writes the picture, whole or not at all.

        Args:
            path (`str` or `Path`):
                The file. Its ending says the format, such as `.png`.

        Raises:
            `ValueError`: If no format has this ending, or the file cannot be written.
        """
        save_picture(Path(path), self.image)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()
