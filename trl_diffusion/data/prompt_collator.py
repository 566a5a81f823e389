# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The collator of single images with nothing but a prompt."""

from dataclasses import dataclass
from typing import Any

from .collators import ImageCollator


@dataclass
class PromptCollator(ImageCollator):
    """
    Collates rows with the columns `id`, `prompt` and `image`, and leaves out any others. See [`data.collators.ImageCollator`] for the
    arguments. A batch contains:

    - `image_pixel_values` `(B, 3, H, W)`, uint8, see [`data.transforms.normalize_pixels`]; for precomputed rows instead
      `image_latents_mean`, `image_latents_std` `(B, C, h, w)`;
    - `image_original_sizes`, `image_crop_top_lefts` `(B, 2)`;
    - `id`, `prompt`, lists of `B` strings.
    """

    image_columns = ("image",)
    text_features = {}

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """
        Prepares one row.

        Args:
            row (`dict`):
                The row.

        Returns:
            `dict`: the part of the batch that belongs to this row.

        Raises:
            `ValueError`: If the row is invalid. The message names the row and the column.
        """
        texts = self.texts(row)
        images, size = self._open_images(row)
        image = self._prepare_image(images["image"], [], size, row, "image")
        del image["image_boxes"]
        return texts | image
