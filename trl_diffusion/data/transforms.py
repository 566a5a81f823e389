# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Prepares images and their boxes for training."""

from typing import NamedTuple

import PIL.Image
import PIL.ImageOps
import torch
from diffusers.image_processor import VaeImageProcessor

from ..boxes import crop_boxes, flip_boxes, normalize_boxes, orient_boxes
from .pictures import orientation, upright_image


class TrainingImage(NamedTuple):
    """
    An image that is ready for training.

    Attributes:
        pixel_values (`torch.Tensor` of shape `(3, H, W)`):
            float32 in [-1, 1].
        boxes (`torch.Tensor` of shape `(N, 4)`):
            Unit boxes in `pixel_values`. A box outside the crop has area 0.
        original_size (`tuple[int, int]`):
            (height, width) in pixels of the upright image.
        crop_top_left (`tuple[int, int]`):
            (top, left) in pixels of the crop in the resized, possibly flipped image.
    """

    pixel_values: torch.Tensor
    boxes: torch.Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def prepare_image(
    image: PIL.Image.Image,
    boxes: torch.Tensor,
    size: tuple[int, int],
    generator: torch.Generator,
    center_crop: bool = True,
    random_flip: bool = False,
) -> TrainingImage:
    """
    Makes an image the picture that a viewer shows (see [`data.pictures.upright_image`]), resizes it such that it just covers
    `size`, flips it (optionally) and crops it, together with its boxes.

    Args:
        image (`PIL.Image.Image`):
            The image as stored.
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

    Returns:
        [`TrainingImage`]
    """
    boxes = normalize_boxes(boxes, *image.size)
    boxes = orient_boxes(boxes, orientation(image))
    image = upright_image(image)
    original_size = (image.height, image.width)

    crop_height, crop_width = size
    scale = max(crop_height / image.height, crop_width / image.width)
    height, width = max(crop_height, round(image.height * scale)), max(crop_width, round(image.width * scale))
    image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)

    if random_flip and torch.rand((), generator=generator) < 0.5:
        image, boxes = PIL.ImageOps.mirror(image), flip_boxes(boxes)

    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    if not center_crop:
        left = int(torch.randint(width - crop_width + 1, (), generator=generator))
        top = int(torch.randint(height - crop_height + 1, (), generator=generator))
    right, bottom = left + crop_width, top + crop_height
    image = image.crop((left, top, right, bottom))
    boxes = crop_boxes(boxes, (left / width, top / height, right / width, bottom / height))

    pixel_values = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))[0]
    return TrainingImage(VaeImageProcessor.normalize(pixel_values), boxes, original_size, (top, left))
