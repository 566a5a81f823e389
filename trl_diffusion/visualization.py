# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Labelled grids of images, and overlays of masks on images."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import PIL.ImageFont
import torch

from .data.instances import check_preference
from .data.transforms import normalize_pixels
from .masks import instance_masks, unpacked
from .segmentation import mask_bounds


BOX_COLORS = {"chosen": (0, 158, 115), "rejected": (213, 94, 0), "tie": (120, 120, 120)}


def image_grid(
    rows: list[list[PIL.Image.Image]], column_labels: list[str], row_labels: list[str] | None = None, size: int = 256
) -> PIL.Image.Image:
    """
    Arranges images in a labelled grid.

    Args:
        rows (`list[list[PIL.Image.Image]]`):
            Rows of images, all of the same length.
        column_labels (`list[str]`):
            Labels above the columns.
        row_labels (`list[str]`, *optional*):
            Labels below the rows, such as prompts. Long ones are truncated.
        size (`int`, *optional*, defaults to `256`):
            Maximum width and height of each image in pixels.

    Returns:
        `PIL.Image.Image`: the grid.
    """
    font, gap, line = PIL.ImageFont.load_default(16), 8, 24
    row_height = size + (line if row_labels else 0) + gap
    width = gap + len(column_labels) * (size + gap)
    grid = PIL.Image.new("RGB", (width, line + gap + len(rows) * row_height), "white")
    draw = PIL.ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        center = gap + column * (size + gap) + size // 2
        draw.text((center, gap), _fitting(label, font, size), "black", font, anchor="mt")
    for index, row in enumerate(rows):
        top = line + gap + index * row_height
        for column, image in enumerate(row):
            scale = size / max(image.size)
            # Small images are enlarged without smoothing, to show their actual pixels
            filter = PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS
            image = image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size], filter)
            left = gap + column * (size + gap) + (size - image.width) // 2
            grid.paste(image, (left, top + (size - image.height) // 2))
        if row_labels:
            draw.text((gap, top + size + 3), _fitting(row_labels[index], font, width - 2 * gap), "black", font)
    return grid


def instance_pictures(
    batch: dict[str, Any], row: dict[str, Any], vae_scale_factor: int, w_neg: float, mask_overlap: str
) -> list[PIL.Image.Image]:
    """
    Draws the instance masks of a pair over its images, as in training.

    Args:
        batch (`dict`):
            The row alone, as [`data.collators.InstancePairCollator`] prepares it.
        row (`dict`):
            The row, with `instances`.
        vae_scale_factor (`int`):
            Width and height in pixels of a latent cell.
        w_neg (`float`), mask_overlap (`str`):
            See [`masks.instance_masks`].

    Returns:
        `list[PIL.Image.Image]`: the chosen image and the rejected one.
    """
    instances = row.get("instances") or []
    labels = [instance["label"] for instance in instances]
    preferences = [check_preference(instance["preference"]) for instance in instances]
    pictures = []
    for column in ("chosen", "rejected"):
        pixel_values, boxes = batch[f"{column}_pixel_values"][0], batch[f"{column}_boxes"]
        grid = [side // vae_scale_factor for side in pixel_values.shape[1:]]
        packed = batch.get(f"{column}_masks")
        mask = instance_masks(boxes, batch["judged"], batch["conflicts"], *grid, w_neg, mask_overlap, packed)[0]
        pictures.append(mask_overlay(pixel_values, mask, boxes[0], labels, preferences, outlines(batch, column)))
    return pictures


def outlines(batch: dict[str, Any], column: str) -> np.ndarray:
    """
    The segmentation masks of a row.

    Args:
        batch (`dict`):
            The row alone, as [`data.collators.InstancePairCollator`] prepares it.
        column (`str`):
            The column of the image.

    Returns:
        `np.ndarray` of shape `(M, H, W)`: bools, for the first `M` instances. Empty ones for those that have boxes.
    """
    height, width = batch[f"{column}_pixel_values"].shape[2:]
    packed = batch.get(f"{column}_masks")
    return np.zeros((0, height, width), bool) if packed is None else unpacked(packed[0], height, width).numpy()


def mask_overlay(
    pixel_values: torch.Tensor,
    mask: torch.Tensor,
    boxes: torch.Tensor,
    labels: list[str],
    preferences: list[str],
    outlines: Sequence[np.ndarray | None] = (),
) -> PIL.Image.Image:
    """
    Draws an instance mask and the boxes or outlines of the instances on the image that is used in training.

    Args:
        pixel_values (`torch.Tensor` of shape `(3, H, W)`):
            The image: uint8, or floating point numbers in [-1, 1].
        mask (`torch.Tensor` of shape `(h, w)`):
            Mask of the image on the latent grid. Cells with lower weights are darker, those with negative weights red.
        boxes (`torch.Tensor` of shape `(N, 4)`):
            Unit boxes. A box of area 0 is not drawn.
        labels (`list[str]` of length `N`):
            Labels of the instances.
        preferences (`list[str]` of length `N`):
            `"chosen"` (green), `"rejected"` (orange, a conflict with the pair's label) or `"tie"` (grey).
        outlines (`list[np.ndarray]` of length `N`, *optional*):
            Segmentation masks of the instances, see [`visualization.draw_boxes`].

    Returns:
        `PIL.Image.Image`: the picture, at least 256 pixels high.
    """
    _, height, width = pixel_values.shape
    scale = math.ceil(256 / height)
    size = (width * scale, height * scale)
    rgb = ((normalize_pixels(pixel_values).permute(1, 2, 0) / 2 + 0.5) * 255).round().clamp(0, 255).byte()
    image = PIL.Image.fromarray(rgb.numpy()).resize(size, PIL.Image.Resampling.NEAREST)

    weights = mask / mask.abs().max().clamp(min=1e-6)
    strength = ((1 - weights) * 192).clamp(0, 192).byte()
    shade = PIL.Image.fromarray(strength.numpy()).resize(size, PIL.Image.Resampling.NEAREST)
    tint = torch.zeros(*mask.shape, 3, dtype=torch.uint8)
    tint[mask < 0, 0] = 255
    tint = PIL.Image.fromarray(tint.numpy()).resize(size, PIL.Image.Resampling.NEAREST)
    image = PIL.Image.composite(tint, image, shade)

    draw_boxes(image, boxes, labels, preferences, outlines)
    return image


def draw_boxes(
    image: PIL.Image.Image,
    boxes: torch.Tensor,
    labels: list[str],
    preferences: list[str],
    masks: Sequence[np.ndarray | None] = (),
) -> None:
    """
    Draws instances on an image: their boxes, or the outlines of their segmentation masks.

    Args:
        image (`PIL.Image.Image`):
            The RGB image, which is changed.
        boxes (`torch.Tensor` of shape `(N, 4)`):
            Unit boxes. A box of area 0 is not drawn, nor one of an instance with a mask.
        labels (`list[str]` of length `N`):
            Labels of the instances. Long ones are truncated.
        preferences (`list[str]` of length `N`):
            `"chosen"` (green), `"rejected"` (orange) or `"tie"` (grey).
        masks (`list[np.ndarray]` of length at most `N`, *optional*):
            Masks `(H, W)` of bools on the whole image, of any size. `None` or an empty one for an instance without a mask.
    """
    draw = PIL.ImageDraw.Draw(image)
    width, height = image.size
    font, taken, line = PIL.ImageFont.load_default(max(12, height // 32)), [], max(2, height // 200)
    drawn = []
    for place, (box, label, preference) in enumerate(zip(boxes.tolist(), labels, preferences, strict=True)):
        mask = masks[place] if place < len(masks) else None
        if mask is not None and mask.any():
            x_min, y_min, x_max, y_max = mask_bounds(mask)
            rows, columns = mask.shape
            drawn.append((x_min / columns, y_min / rows, label, preference))
            image.paste(BOX_COLORS[preference], mask=_outline(mask, image.size, line))
        elif box[0] < box[2] and box[1] < box[3]:
            x_min, y_min, x_max, y_max = box
            drawn.append((x_min, y_min, label, preference))
            sides = (x_min * width, y_min * height, x_max * width - 1, y_max * height - 1)
            draw.rectangle(sides, outline=BOX_COLORS[preference], width=line)
    for x_min, y_min, label, preference in drawn:
        label = _fitting(label, font, width - 14)
        left, top = max(0, min(x_min * width, width - 14 - font.getlength(label))), y_min * height
        place = _label_place(draw, left, top, label, font)
        # Below the labels that are already there, as long as there is room
        while any(_overlap(place, other) for other in taken) and place[3] + place[3] - place[1] < height:
            top += place[3] - place[1]
            place = _label_place(draw, left, top, label, font)
        taken.append(place)
        draw.rectangle(place, fill=BOX_COLORS[preference])
        draw.text((left + 4, top + 3), label, "white", font)


def _outline(mask: np.ndarray, size: tuple[int, int], line: int) -> PIL.Image.Image:
    """The outermost pixels of a mask on an image of a size (width, height), as many as the line is thick."""
    whole = PIL.Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).resize(size, PIL.Image.Resampling.NEAREST)
    framed = PIL.Image.new(
        "L", (size[0] + 2 * line, size[1] + 2 * line)
    )  # outside of the image is outside of the mask
    framed.paste(whole, (line, line))
    core = framed.filter(PIL.ImageFilter.MinFilter(2 * line + 1)).crop((line, line, size[0] + line, size[1] + line))
    return PIL.Image.composite(PIL.Image.new("L", size), whole, core)


def _label_place(
    draw: PIL.ImageDraw.ImageDraw, left: float, top: float, label: str, font: PIL.ImageFont.ImageFont
) -> tuple[float, float, float, float]:
    """The background of a label in the upper left corner of a box."""
    x_min, y_min, x_max, y_max = draw.textbbox((left + 4, top + 3), label, font)
    return x_min - 3, y_min - 3, x_max + 3, y_max + 3


def _overlap(first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _fitting(text: str, font: PIL.ImageFont.ImageFont, width: int) -> str:
    """Puts a text on one line, truncated with an ellipsis to at most `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    length = bisect_right(range(len(text)), width, key=lambda length: font.getlength(text[:length] + "..."))
    return text[: max(length - 1, 0)] + "..."
