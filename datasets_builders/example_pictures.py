# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a few rows for the card of a dataset: pairs with their boxes, images with their attributes."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.run import Row
from trl_diffusion.boxes import normalize_boxes, orient_boxes
from trl_diffusion.cards.facts import PICTURES
from trl_diffusion.criteria import Attribute
from trl_diffusion.data.formats import PREFERENCES
from trl_diffusion.data.instances import read_regions
from trl_diffusion.data.pictures import orientation
from trl_diffusion.data.transforms import upright_mask
from trl_diffusion.visualization import BOX_COLORS, draw_boxes, image_grid


EXAMPLES = 3
EXAMPLE = re.compile(rf"{PICTURES}/example-\d+\.png")  # names of the pictures
CANDIDATES = 20  # rows of which the examples are chosen
SIDE = 384  # of an image in a picture, in pixels
PANEL = 420  # width of the text beside an image
LINE = 20
MOST_FORMS = 7  # of a kind
CANVAS = (245, 245, 245)


@dataclass(frozen=True)
class Picture:
    """
    A picture of a card.

    Attributes:
        name (`str`):
            Its path beside the card.
        data (`bytes`):
            The PNG file.
        caption (`str`):
            What it shows.
    """

    name: str
    data: bytes
    caption: str


def example_pictures(
    folder: Path, draw: Callable[[Row], PIL.Image.Image], interest: Callable[[Row], int]
) -> list[Picture]:
    """
    Draws a few rows of a configuration. Of the first `CANDIDATES` rows, those of the most interest are shown. Only images of these
    are decoded.

    Args:
        folder (`Path`):
            Folder of the configuration, with Parquet files as [`common.build`] writes them. Rows for training are shown, if there are
            any.
        draw (`Callable`):
            Draws a row, with class labels as indices and images as `{"bytes": ..., "path": ...}`.
        interest (`Callable`):
            How much there is to see in a row, given without its images.

    Returns:
        `list[Picture]` of length up to `EXAMPLES`.
    """
    files = sorted(folder.glob("train-*.parquet")) or sorted(folder.glob("*.parquet"))
    with pq.ParquetFile(files[0], pre_buffer=False) as file:
        columns = [field.name for field in file.schema_arrow if not pa.types.is_struct(field.type)]  # no images
        candidates = next(file.iter_batches(CANDIDATES, columns=columns)).to_pylist()
        numbers = sorted(range(len(candidates)), key=lambda number: -interest(candidates[number]))[:EXAMPLES]
        batches = islice(file.iter_batches(1), max(numbers) + 1)
        rows = [batch.to_pylist()[0] for number, batch in enumerate(batches) if number in numbers]
    return [
        Picture(f"{PICTURES}/example-{number}.png", encode(draw(row)), row["prompt"])
        for number, row in enumerate(rows)
    ]


def pair_picture(row: Row, with_images: bool) -> PIL.Image.Image:
    """
    Draws a pair with the boxes of its instances, in the colours of their preferences.

    Args:
        row (`dict`):
            A row in the columns of [`data.formats.instance_pair_features`], as Parquet holds it.
        with_images (`bool`):
            Whether to show the images, or only their shapes.

    Returns:
        `PIL.Image.Image`: both sides in a row, the prompt below.
    """
    labels = [instance["label"] for instance in row["instances"]]
    preferences = [PREFERENCES[instance["preference"]] for instance in row["instances"]]
    sides = []
    for name in ("chosen", "rejected"):
        data = row[name]["bytes"]
        with PIL.Image.open(io.BytesIO(data)) as image:
            size, turn = image.size, orientation(image)
        boxes, masks = read_regions(row, name, size)
        boxes = orient_boxes(normalize_boxes(torch.tensor(boxes).reshape(-1, 4), *size), turn)
        masks = [None if mask is None else upright_mask(mask, turn) for mask in masks]
        if with_images:
            side = StoredImage(data).upright
        else:
            side = PIL.Image.new("RGB", size if turn < 5 else size[::-1], CANVAS)
        side = scaled(side)
        draw_boxes(side, boxes, labels, preferences, masks)
        sides.append(side)
    return image_grid([sides], ["chosen", "rejected"], [row["prompt"]], SIDE)


def attribute_picture(row: Row, attributes: tuple[Attribute, ...]) -> PIL.Image.Image:
    """
    Draws an image beside its attributes.

    Args:
        row (`dict`):
            A row in the columns of [`data.formats.attribute_features`], as Parquet holds it.
        attributes (`tuple[Attribute, ...]`):
            The attributes of the tree, in order.

    Returns:
        `PIL.Image.Image`
    """
    font = PIL.ImageFont.load_default(15)
    lines = [(line, "black") for line in wrapped(row["prompt"], font, 3)]
    for kind, sign, preference in (("positive", "+", "chosen"), ("negative", "-", "rejected")):
        forms = [getattr(attributes[index], kind) for index in row[f"{kind}_attributes"]]
        lines += [("", "black"), (f"{kind}: {len(forms) or 'none'}", BOX_COLORS[preference])]
        lines += [
            (f"{'   ' if number else f'{sign} '}{line}", "black")
            for form in forms[:MOST_FORMS]
            for number, line in enumerate(wrapped(form, font, 2))
        ]
        lines += [(f"   and {len(forms) - MOST_FORMS} more", "black")] if len(forms) > MOST_FORMS else []
    side = scaled(StoredImage(row["image"]["bytes"]).upright)
    picture = PIL.Image.new("RGB", (SIDE + PANEL + 24, max(side.height, LINE * len(lines)) + 16), "white")
    picture.paste(side, (8 + (SIDE - side.width) // 2, 8))
    draw = PIL.ImageDraw.Draw(picture)
    for number, (line, color) in enumerate(lines):
        draw.text((SIDE + 24, 8 + number * LINE), line, color, font)
    return picture


def scaled(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image with a longer side of `SIDE` pixels. Small ones show their own pixels."""
    scale = SIDE / max(image.size)
    filter = PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS
    return image.resize([max(1, round(side * scale)) for side in image.size], filter)


def wrapped(text: str, font: PIL.ImageFont.ImageFont, most: int) -> list[str]:
    """A text in up to `most` lines that fit the panel."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= PANEL - 24 or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] += " ..."
            break
    return lines


def encode(picture: PIL.Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
