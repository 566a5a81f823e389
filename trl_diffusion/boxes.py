# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Conversions of box formats, which all take place in this module.

A dataset stores a box as `[x_min, y_min, x_max, y_max]` in pixels of the stored image. In memory, a box has the same
four numbers as fractions of the image size ("unit box"), so resizing does not change it. Every operation that moves
the content of an image (EXIF orientation, crop, flip) has its counterpart here.
"""

import torch


def normalize_boxes(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """
    Converts boxes from pixels of an image to unit boxes of that image.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`):
            Boxes as `[x_min, y_min, x_max, y_max]` in pixels.
        width (`int`):
            Width of the image in pixels.
        height (`int`):
            Height of the image in pixels.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: the boxes in [0, 1], float32.
    """
    return boxes.float() / torch.tensor([width, height, width, height], device=boxes.device)


def denormalize_boxes(boxes: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """
    Converts unit boxes of an image to pixels of that image; the inverse of [`normalize_boxes`].

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`):
            Unit boxes.
        width (`int`):
            Width of the image in pixels.
        height (`int`):
            Height of the image in pixels.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: the boxes as `[x_min, y_min, x_max, y_max]` in pixels, float32.
    """
    return boxes.float() * torch.tensor([width, height, width, height], device=boxes.device)


def widen_boxes(boxes: torch.Tensor, margin: float, width: int, height: int) -> torch.Tensor:
    """
    Adds a margin to each side of boxes, as far as the image reaches.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`):
            Boxes as `[x_min, y_min, x_max, y_max]` in pixels.
        margin (`float`):
            The margin, as a share of the width of the box to the left and to the right, and of its height above and below.
        width (`int`):
            Width of the image in pixels.
        height (`int`):
            Height of the image in pixels.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: the boxes in pixels, float32. A box of area 0 stays as it is.
    """
    boxes = boxes.float()
    sides = margin * (boxes[..., 2:] - boxes[..., :2])
    size = torch.tensor([width, height], device=boxes.device)
    low = torch.minimum((boxes[..., :2] - sides).clamp(min=0), size)
    return torch.cat([low, torch.minimum(boxes[..., 2:] + sides, size)], dim=-1)


def orient_boxes(boxes: torch.Tensor, orientation: int) -> torch.Tensor:
    """
    Moves unit boxes of a stored image to where `PIL.ImageOps.exif_transpose` moves its pixels.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`):
            Unit boxes of the stored image.
        orientation (`int`):
            EXIF orientation tag of the stored image, 1 to 8. Other values change nothing, as in PIL.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: unit boxes of the upright image.
    """
    x_min, y_min, x_max, y_max = boxes.unbind(-1)
    if orientation in (2, 3, 7, 8):  # mirrored left to right
        x_min, x_max = 1 - x_max, 1 - x_min
    if orientation in (3, 4, 6, 7):  # mirrored top to bottom
        y_min, y_max = 1 - y_max, 1 - y_min
    if orientation in (5, 6, 7, 8):  # rows and columns are swapped
        x_min, y_min, x_max, y_max = y_min, x_min, y_max, x_max
    return torch.stack([x_min, y_min, x_max, y_max], dim=-1)


def crop_boxes(boxes: torch.Tensor, window: tuple[float, float, float, float]) -> torch.Tensor:
    """
    Converts unit boxes of an image to unit boxes of a crop of it.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`):
            Unit boxes of the image.
        window (`tuple[float, float, float, float]`):
            The crop as a unit box of the image.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: unit boxes of the crop, clipped to it. A box outside the crop has area 0.
    """
    left, top, right, bottom = window
    origin = torch.tensor([left, top, left, top], device=boxes.device)
    extent = torch.tensor([right - left, bottom - top, right - left, bottom - top], device=boxes.device)
    return ((boxes - origin) / extent).clamp(0, 1)


def flip_boxes(boxes: torch.Tensor) -> torch.Tensor:
    """
    Mirrors unit boxes left to right, like a horizontal flip of the image.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`):
            Unit boxes of the image.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: unit boxes of the flipped image.
    """
    x_min, y_min, x_max, y_max = boxes.unbind(-1)
    return torch.stack([1 - x_max, y_min, 1 - x_min, y_max], dim=-1)
