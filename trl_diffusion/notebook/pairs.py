# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Pairs: with their verdicts, and with the masks that they are trained with."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..boxes import normalize_boxes, orient_boxes
from ..cards.pictures import fit
from ..data.collators import InstancePairCollator
from ..data.formats import prepare_dataset, read_image, row_prompt
from ..data.instances import check_instances, check_preference, read_regions
from ..data.pictures import orientation, upright_image
from ..data.transforms import upright_mask
from ..visualization import BOX_COLORS, draw_boxes, image_grid, instance_pictures
from .picture import SIZE, Picture


SIDES = ("chosen", "rejected")
VERDICTS = {"chosen": "agrees", "rejected": "contradicts", "tie": "neither"}


@dataclass(frozen=True, repr=False)
class Pair(Picture):
    """
    A pair with its verdicts.

    Attributes:
        prompt (`str`):
            The prompt.
        verdicts (`list[tuple[str, str]]`):
            The label of each instance, and which image shows it better: `"chosen"`, `"rejected"` or `"tie"`.
    """

    prompt: str
    verdicts: list[tuple[str, str]]

    def _repr_png_(self) -> None:
        """The page below shows the picture already."""

    def _repr_html_(self) -> str:
        content = base64.b64encode(super()._repr_png_()).decode()
        lines = [f'<img src="data:image/png;base64,{content}" alt="{escape(self.prompt)}">']
        if self.verdicts:
            heading = "".join(f"<th>{name}</th>" for name in ("instance", "better in", "the label of the pair"))
            rows = [
                f"<tr><td>{escape(label)}</td><td style='color: rgb{BOX_COLORS[preference]}'>{preference}</td>"
                f"<td>{VERDICTS[preference]}</td></tr>"
                for label, preference in self.verdicts
            ]
            lines.append(f"<table><tr>{heading}</tr>{''.join(rows)}</table>")
        else:
            lines.append("<p>No instances: trained on as in Diffusion-DPO.</p>")
        return "\n".join(lines)


def show_pair(row: Mapping[str, Any]) -> Pair:
    """
    Shows a pair: both images whole, the box of each instance or the outline of its mask, and which image shows it better. It is green
    where that is the chosen image, orange where it is the rejected one, and grey for a tie.

    Args:
        row (`dict`):
            A row with `prompt`, `chosen`, `rejected` and `instances`, see [dataset formats](dataset_formats). Boxes are
            `[x_min, y_min, x_max, y_max]` in pixels of the stored image. Without instances the images alone are shown. `datasets` turns
            an image with an EXIF orientation as it decodes it, but not its boxes: of such files, pass rows with undecoded images
            (`dataset.cast_column("chosen", datasets.Image(decode=False))`).

    Returns:
        [`notebook.Pair`]

    Raises:
        `ValueError`: If an image cannot be read, or an instance is not valid. The message names the row and the column.
    """
    prompt = row_prompt(row)
    stored = {side: read_image(row, side) for side in SIDES}
    instances = check_instances(row, {side: image.size for side, image in stored.items()})
    labels = [str(instance["label"]) for instance in instances]
    preferences = [check_preference(instance["preference"]) for instance in instances]
    images = []
    for side, image in stored.items():
        (boxes, masks), turn = read_regions(row, side, image.size), orientation(image)
        boxes = orient_boxes(normalize_boxes(torch.tensor(boxes).reshape(-1, 4), *image.size), turn)
        masks = [None if mask is None else upright_mask(mask, turn) for mask in masks]
        images.append(fit(upright_image(image), SIZE))
        draw_boxes(images[-1], boxes, labels, preferences, masks)
    picture = image_grid([images], list(SIDES), [prompt], SIZE)
    return Pair(picture, prompt, list(zip(labels, preferences, strict=True)))


def show_masks(
    data: Dataset | IterableDataset | list[dict[str, Any]],
    num_rows: int = 4,
    resolution: int = 512,
    vae_scale_factor: int = 8,
    w_neg: float = 0.0,
    mask_overlap: str = "mean",
    box_margin: float = 0.0,
) -> Picture:
    """
    Shows the instance masks of pairs over their images as [`InstanceDPOTrainer`] trains on them: cut to a square at their centre,
    the mask on the latent grid. Dark cells weigh less, and in red ones the label is reversed.

    Args:
        data ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `list[dict]`):
            Pairs with instances, see [dataset formats](dataset_formats). Rows in a list are taken as [`notebook.show_pair`] does.
        num_rows (`int`, *optional*, defaults to `4`):
            How many to show, from the first one on.
        resolution (`int`, *optional*, defaults to `512`):
            Width and height in pixels of the training images.
        vae_scale_factor (`int`, *optional*, defaults to `8`):
            Width and height in pixels of a latent cell.
        w_neg (`float`, *optional*, defaults to `0.0`), mask_overlap (`str`, *optional*, defaults to `"mean"`):
            See [`masks.instance_masks`].
        box_margin (`float`, *optional*, defaults to `0.0`):
            See [`InstanceDPOConfig`].

    Returns:
        [`notebook.Picture`]: a row for each pair.

    Raises:
        `ValueError`: If there is no row, a column is missing, or a row is not valid.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, got {num_rows}.")
    if isinstance(data, list):
        rows = data[:num_rows]
        if not rows:
            raise ValueError("`data` has no rows. Pass at least one.")
    else:
        some = data.take(min(num_rows, len(data)) if isinstance(data, Dataset) else num_rows)
        rows = list(prepare_dataset(some, "data", ("prompt", *SIDES, "instances"), SIDES))
    collate = InstancePairCollator(resolution, box_margin=box_margin)
    pictures = [instance_pictures(collate([row]), row, vae_scale_factor, w_neg, mask_overlap) for row in rows]
    return Picture(image_grid(pictures, list(SIDES), [row["prompt"] for row in rows], SIZE))
