# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Prepares images, their boxes and segmentation masks for training."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from ..boxes import crop_boxes, flip_boxes, normalize_boxes, orient_boxes
from .pictures import TURNS, orientation, upright_image


class TrainingImage(NamedTuple):
    """
    An image that is ready for training.

    Attributes:
        pixels (`torch.Tensor` of shape `(3, H, W)`):
            uint8.
        boxes (`torch.Tensor` of shape `(N, 4)`):
            Unit boxes in `pixels`. A box outside the crop has area 0.
        original_size (`tuple[int, int]`):
            (height, width) in pixels of the upright image.
        crop_top_left (`tuple[int, int]`):
            (top, left) in pixels of the crop in the resized, possibly flipped image.
        masks (`torch.Tensor` of shape `(N, H, W)`, bool, or `None`):
            Segmentation masks on `pixels`, empty for what has none. `None` if nothing has one.
    """

    pixels: torch.Tensor
    boxes: torch.Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    masks: torch.Tensor | None = None

    @property
    def pixel_values(self) -> torch.Tensor:
        """The pixels as the VAE takes them, float32 in [-1, 1]."""
        return normalize_pixels(self.pixels)


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """
    Scales bytes to [-1, 1], as diffusers does, with the same numbers on every device.

    Args:
        pixels (`torch.Tensor`):
            uint8; anything else is returned as it is.

    Returns:
        `torch.Tensor`: float32 in [-1, 1], of the same shape and on the same device.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    # By a tensor: by a number, CUDA multiplies with its rounded reciprocal
    white = torch.full((), 255.0, device=pixels.device)
    return pixels.float().div_(white).mul_(2).sub_(1)


def prepare_image(
    image: PIL.Image.Image,
    boxes: torch.Tensor,
    size: tuple[int, int],
    generator: torch.Generator,
    center_crop: bool = True,
    random_flip: bool = False,
    stored_size: tuple[int, int] | None = None,
    masks: Sequence[np.ndarray | None] = (),
) -> TrainingImage:
    """
    Makes an image the picture that a viewer shows (see [`data.pictures.upright_image`]), resizes it such that it just covers
    `size`, flips it (optionally) and crops it, together with its boxes and masks.

    Args:
        image (`PIL.Image.Image`):
            The image as stored, or as [`data.images.open_reduced`] opened it.
        boxes (`torch.Tensor` of shape `(N, 4)`):
            Boxes `[x_min, y_min, x_max, y_max]` in pixels of the stored image.
        size (`tuple[int, int]`):
            (height, width) of the result in pixels.
        generator (`torch.Generator`):
            Random generator for crop and flip.
        center_crop (`bool`, *optional*, defaults to `True`):
            Crop at the centre, otherwise at a random position.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip left to right with probability one half.
        stored_size (`tuple[int, int]`, *optional*):
            (width, height) in pixels of the stored image. Defaults to that of `image`.
        masks (`list[np.ndarray]` of length `N`, *optional*):
            Segmentation masks `(height, width)` of bools in pixels of the stored image, or `None` for what has a box alone. A pixel of the
            result belongs to a mask if half of it does.

    Returns:
        [`TrainingImage`]
    """
    stored_width, stored_height = stored_size or image.size
    turn = orientation(image)
    boxes = orient_boxes(normalize_boxes(boxes, stored_width, stored_height), turn)
    original_size = (stored_width, stored_height) if turn in (5, 6, 7, 8) else (stored_height, stored_width)
    extent = _extent(image.size, (stored_width, stored_height), turn)
    image = upright_image(image)

    crop_height, crop_width = size
    scale = max(crop_height / original_size[0], crop_width / original_size[1])
    height, width = max(crop_height, round(original_size[0] * scale)), max(crop_width, round(original_size[1] * scale))
    image = image.resize((width, height), PIL.Image.Resampling.LANCZOS, extent)

    is_flipped = random_flip and bool(torch.rand((), generator=generator) < 0.5)
    if is_flipped:
        image, boxes = PIL.ImageOps.mirror(image), flip_boxes(boxes)

    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    if not center_crop:
        left = int(torch.randint(width - crop_width + 1, (), generator=generator))
        top = int(torch.randint(height - crop_height + 1, (), generator=generator))
    right, bottom = left + crop_width, top + crop_height
    image = image.crop((left, top, right, bottom))
    boxes = crop_boxes(boxes, (left / width, top / height, right / width, bottom / height))

    moved = None
    if any(mask is not None for mask in masks):
        moved = torch.zeros(len(masks), *size, dtype=torch.bool)
        for place, mask in enumerate(masks):
            if mask is not None:
                moved[place] = _move_mask(mask, turn, (width, height), is_flipped, (left, top, right, bottom))

    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    return TrainingImage(pixels, boxes, original_size, (top, left), moved)


def upright_mask(mask: np.ndarray, turn: int) -> np.ndarray:
    """Moves a mask `(h, w)` of a stored image to where [`data.pictures.upright_image`] moves its pixels."""
    return np.asarray(PIL.Image.fromarray(mask.astype(np.uint8)).transpose(TURNS[turn])) > 0 if turn in TURNS else mask


def _move_mask(
    mask: np.ndarray, turn: int, size: tuple[int, int], is_flipped: bool, window: tuple[int, int, int, int]
) -> torch.Tensor:
    """
    Moves a mask `(h, w)` as its image is moved: turns it upright, resizes it to `size` (width, height), flips it, and cuts out the
    window. A pixel is inside if at least half of its area is.
    """
    image = PIL.Image.fromarray(np.where(upright_mask(mask, turn), np.uint8(255), np.uint8(0)))
    image = image.resize(size, PIL.Image.Resampling.BOX)
    if is_flipped:
        image = PIL.ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image.crop(window)) >= 128)


def _extent(size: tuple[int, int], stored_size: tuple[int, int], turn: int) -> tuple[float, float, float, float]:
    """
    Where the picture lies in an image that was decoded at a fraction, whose size is rounded up to whole pixels: `(left, top,
    right, bottom)` in pixels of the upright image.
    """
    (width, height), (stored_width, stored_height) = size, stored_size
    fraction = round(stored_width / width)
    extent = (0.0, 0.0, stored_width / fraction / width, stored_height / fraction / height)
    left, top, right, bottom = orient_boxes(torch.tensor(extent, dtype=torch.float64), turn).tolist()
    width, height = (height, width) if turn in (5, 6, 7, 8) else (width, height)
    return left * width, top * height, right * width, bottom * height
