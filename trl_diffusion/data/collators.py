# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Collators, which turn rows of a dataset into a batch of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import List, Value

from ..boxes import widen_boxes
from ..criteria import Criteria
from ..masks import pack_masks
from ..randomness import keyed_generator
from .buckets import nearest_bucket
from .caching import OPTIONAL, is_precomputed, read_batch, read_example, stack_padded
from .formats import check_attributes, read_image, row_id, row_prompt
from .images import image_content, image_errors, image_size, open_reduced
from .instances import check_instances, check_preference, read_regions
from .labels import row_label
from .transforms import TrainingImage, prepare_image


@dataclass
class ImageCollator:
    """
    Base class of the collators. Each row is converted to an example of tensors. Examples are padded and stacked. A precomputed
    row already is an example, with latents instead of pixels.

    Crop and flip of an image depend on the seed, the id of the row and the column. So they are the same in every epoch, in
    every process and after resuming.

    Args:
        resolution (`int`):
            Width and height of the training images in pixels.
        center_crop (`bool`, *optional*, defaults to `True`):
            Crop at the centre, otherwise at a random position.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip left to right with probability one half.
        seed (`int`, *optional*, defaults to `0`):
            Seed of crops and flips.
        buckets (`list[tuple[int, int]]`, *optional*):
            Sizes (height, width) in pixels to use instead of a square of `resolution`. A row gets the size that is nearest to
            its images in shape, see [`data.buckets.nearest_bucket`]. All rows of a batch must have the same size.
    """

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    seed: int = 0
    buckets: list[tuple[int, int]] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows (`list[dict]` of length `B`):
                The rows.

        Returns:
            `dict`: tensors whose first dimension is `B`, padded with zeros, and lists of `B` values.

        Raises:
            `ValueError`: If a row is invalid. The message names the row and the column.
        """
        if all(map(is_precomputed, rows)):
            return read_batch(rows)
        examples = [read_example(row) if is_precomputed(row) else self.prepare(row) for row in rows]
        names = dict.fromkeys(name for example in examples for name in example)
        return {name: _batch(values_of(examples, name)) for name in names}

    def texts(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns of an example that hold no tensors. Raises a `ValueError` if one is invalid."""
        return {"id": row_id(row), "prompt": row_prompt(row)}

    def size(self, row: dict[str, Any]) -> tuple[int, int]:
        """
        The training size of a row.

        Args:
            row (`dict`):
                A row of the dataset.

        Returns:
            `tuple[int, int]`: height and width in pixels.
        """
        if self.buckets is None:
            return self.resolution, self.resolution
        return nearest_bucket([read_image(row, column, image_size) for column in self.image_columns], self.buckets)

    def _open_images(
        self, row: dict[str, Any]
    ) -> tuple[dict[str, tuple[PIL.Image.Image, tuple[int, int]]], tuple[int, int]]:
        """The images of a row and their stored sizes (width, height) by column, and their training size."""
        row = row | {column: read_image(row, column, image_content) for column in self.image_columns}
        size = self.size(row)
        return {
            column: read_image(row, column, partial(open_reduced, size=size)) for column in self.image_columns
        }, size

    def _prepare_image(
        self,
        opened: tuple[PIL.Image.Image, tuple[int, int]],
        boxes: torch.Tensor | list,
        size: tuple[int, int],
        row: dict[str, Any],
        column: str,
        masks: Sequence[np.ndarray | None] = (),
    ) -> dict[str, Any]:
        image, stored_size = opened
        generator = keyed_generator(self.seed, str(row["id"]), column, "augmentation")

        def prepare(_: Any) -> TrainingImage:
            with image_errors(image):
                return prepare_image(
                    image,
                    torch.as_tensor(boxes).reshape(-1, 4),
                    size,
                    generator,
                    center_crop=self.center_crop,
                    random_flip=self.random_flip,
                    stored_size=stored_size,
                    masks=masks,
                )

        prepared = read_image(row, column, prepare)
        moved = {} if prepared.masks is None else {f"{column}_masks": pack_masks(prepared.masks)}
        return moved | {
            f"{column}_pixel_values": prepared.pixels,
            f"{column}_original_sizes": torch.tensor(prepared.original_size),
            f"{column}_crop_top_lefts": torch.tensor(prepared.crop_top_left),
            f"{column}_boxes": prepared.boxes,
        }


@dataclass
class InstancePairCollator(ImageCollator):
    """
    Collates rows with the columns `id`, `prompt`, `chosen`, `rejected` and optionally `instances`. See
    [`data.collators.ImageCollator`] for the arguments. A batch contains:

    - `chosen_pixel_values`, `rejected_pixel_values` `(B, 3, H, W)`, uint8, see [`data.transforms.normalize_pixels`]; for
      precomputed rows instead `*_latents_mean`, `*_latents_std` `(B, C, h, w)`;
    - for both images `*_boxes` `(B, N, 4)` (unit boxes, padded with zeros), `*_original_sizes`, `*_crop_top_lefts` `(B, 2)`;
    - where an instance of the batch has a segmentation mask in an image, `*_masks` `(B, M, H, ceil(W / 8))`, uint8, as
      [`masks.instance_masks`] takes them: a bit for each pixel of the first `M` instances. An instance with a mask has a box of zeros;
    - `judged`, `conflicts` `(B, N)`, bool;
    - `id`, `prompt`, lists of `B` strings.

    Args:
        box_margin (`float`, *optional*, defaults to `0.0`):
            Margin around boxes, see [`boxes.widen_boxes`]. Masks have none.
    """

    box_margin: float = 0.0

    image_columns = ("chosen", "rejected")
    text_features = {}  # columns of an example besides `id`, `prompt` and its tensors

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
        example = self.texts(row)
        images, size = self._open_images(row)
        instances = check_instances(row, {column: stored_size for column, (_, stored_size) in images.items()})
        for column, opened in images.items():
            boxes, masks = read_regions(row, column, opened[1])
            if self.box_margin:
                boxes = widen_boxes(torch.tensor(boxes).reshape(-1, 4), self.box_margin, *opened[1])
            example |= self._prepare_image(opened, boxes, size, row, column, masks)
        preferences = [check_preference(instance["preference"]) for instance in instances]
        judged = [preference != "tie" for preference in preferences]
        conflicts = [preference == "rejected" for preference in preferences]
        return example | {
            "judged": torch.tensor(judged, dtype=torch.bool),
            "conflicts": torch.tensor(conflicts, dtype=torch.bool),
        }

    def __getstate__(self) -> dict[str, Any]:
        # What was precomputed before there was a margin is what is precomputed without one
        return {name: value for name, value in self.__dict__.items() if name != "box_margin" or value}


@dataclass
class SingleImageCollator(ImageCollator):
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


@dataclass
class LabelCollator(SingleImageCollator):
    """
    Collates rows with the columns `id`, `prompt`, `image` and `label`. See [`data.collators.ImageCollator`] for the arguments. A
    batch contains what that of [`data.collators.SingleImageCollator`] does, and

    - `label`, a list of `B` bools.
    """

    text_features = {"label": Value("bool")}

    def texts(self, row: dict[str, Any]) -> dict[str, Any]:
        return super().texts(row) | {"label": row_label(row)}


@dataclass
class AttributeCollator(SingleImageCollator):
    """
    Collates rows with the columns `id`, `prompt`, `image`, `positive_attributes` and `negative_attributes`. See
    [`data.collators.ImageCollator`] for the other arguments. A batch contains what that of
    [`data.collators.SingleImageCollator`] does, and

    - `positive_attributes`, `negative_attributes`, lists of `B` lists of ids.

    Args:
        criteria ([`Criteria`]):
            The criteria tree.
    """

    criteria: Criteria = field(kw_only=True)

    text_features = {"positive_attributes": List(Value("string")), "negative_attributes": List(Value("string"))}

    def texts(self, row: dict[str, Any]) -> dict[str, Any]:
        positive, negative = check_attributes(row, self.criteria)
        return super().texts(row) | {"positive_attributes": positive, "negative_attributes": negative}


def values_of(examples: list[dict[str, Any]], name: str) -> list:
    """The values of a column of examples. Masks, which only rows with masks have, are none for the others."""
    present = next(example[name] for example in examples if name in example)
    if name not in OPTIONAL:
        return [example[name] for example in examples]
    return [example.get(name, present[:0]) for example in examples]


def _batch(values: list) -> torch.Tensor | list:
    """Stacks tensors, padded with zeros along their first dimension. Other values stay a list."""
    return stack_padded(values) if isinstance(values[0], torch.Tensor) else values
