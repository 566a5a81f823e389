# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A second small world: tiny paintings with four qualities, and an oracle that reads them.

A painting is 32x32 pixels and holds one shape of the kinds and colours of `world.py`. Its prompt names only these: "a
red circle". The qualities are those of `criteria.yaml`: the outline is whole or bitten, the colour vivid or pale, the
placement centered or aside, the ground bright or murky. Each is negative half of the time and no prompt says which, so
the images of a model trained on these paintings have about two negatives each, and one image in 16 has none. The effect of
preference training on the attributes can be measured by how many negatives an image has afterwards.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .world import (
    BACKGROUND,
    COLORS,
    KINDS,
    SIZE,
    Shape,
    check_size,
    coverage,
    look_past_bite,
    png_bytes,
    product_of,
    square_box,
)


if TYPE_CHECKING:
    from datasets import Dataset

# The leaves of criteria.yaml, each with its positive and its negative word.
ATTRIBUTES = {
    "outline": ("whole", "bitten"),
    "chroma": ("vivid", "pale"),
    "placement": ("centered", "aside"),
    "ground": ("bright", "murky"),
}
PROMPT = re.compile(rf"a ({'|'.join(COLORS)}) ({'|'.join(KINDS)})")

MURKY = (158, 134, 118)
PALE = 0.4  # how far a pale colour is on the way from the ground to the full one
SIDE = (13.0, 14.5)  # of a shape's box
MIDDLE = SIZE / 2
JITTER = 0.8  # of a centered shape's centre, and of any shape's height
ASIDE = (5.0, 6.5)  # how far the centre of a shape that is aside is to the left or the right of the middle

# Halfway between what is drawn for the positive and for the negative word of a quality
BRIGHT_WITHIN = float(np.linalg.norm(np.subtract(BACKGROUND, MURKY))) / 2
VIVID_FROM = (1 + PALE) / 2
CENTERED_WITHIN = (JITTER + ASIDE[0]) / 2
WHOLE_QUALITY = 0.91  # agreement with a whole shape; a bite costs about twice as much
MATCH_QUALITY = 0.65  # below this no shape can be recognised
MATCH_SHARE = 0.4  # of the image's departure from its ground that the shape must explain
MATCH_CHROMA = PALE / 2  # a shape that is paler than this does not count


@dataclass(frozen=True)
class Painting:
    """One shape on a ground.

    Args:
        shape (`Shape`):
            The shape, with the box in which it is drawn.
        negative_attributes (`tuple[str, ...]`):
            The keys of `ATTRIBUTES` whose negative word is true of this painting, in the order of `ATTRIBUTES`.
    """

    shape: Shape
    negative_attributes: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"a {self.shape.color} {self.shape.kind}"

    @property
    def positive_attributes(self) -> tuple[str, ...]:
        return others(self.negative_attributes)


@dataclass(frozen=True)
class PaintingFinding:
    """What the oracle sees.

    Args:
        match (`bool`):
            Whether the image shows the colour and the kind that the prompt names, on any ground, vivid or pale.
        positive_attributes (`tuple[str, ...]`), negative_attributes (`tuple[str, ...]`):
            The keys of `ATTRIBUTES`, each in one of the two. If no shape can be recognised, all are negative,
            except that the ground may be positive.
    """

    match: bool
    positive_attributes: tuple[str, ...]
    negative_attributes: tuple[str, ...]


def others(attributes: Collection[str]) -> tuple[str, ...]:
    return tuple(attribute for attribute in ATTRIBUTES if attribute not in attributes)


def parse_prompt(prompt: str) -> tuple[str, str]:
    """
    Read what a prompt names.

    Args:
        prompt (`str`):
            Such as `"a red circle"`.

    Returns:
        `tuple[str, str]`: colour and kind.

    Raises:
        `ValueError`: If the prompt does not have that form.
    """
    found = PROMPT.fullmatch(prompt)
    if found is None:
        raise ValueError(f"Not a prompt of the paintings: {prompt!r}. They read like 'a red circle'.")
    return found[1], found[2]


# ----- drawing -----


def render(painting: Painting) -> Image.Image:
    """Draw a painting as a `SIZE`x`SIZE` RGB image with smooth edges."""
    ground = np.array(MURKY if "ground" in painting.negative_attributes else BACKGROUND, dtype=float)
    departure = np.array(COLORS[painting.shape.color]) - ground
    if "chroma" in painting.negative_attributes:
        departure *= PALE
    return Image.fromarray(np.round(ground + coverage(painting.shape)[..., None] * departure).astype(np.uint8))


def sample_painting(
    rng: np.random.Generator, prompt: str | None = None, negatives: Collection[str] | None = None
) -> Painting:
    """
    Sample a random painting.

    Args:
        rng (`np.random.Generator`):
            Source of all randomness.
        prompt (`str`, *optional*):
            What the painting shows. If left out, colour and kind are uniform.
        negatives (`Collection[str]`, *optional*):
            The keys of `ATTRIBUTES` that are negative. If left out, each is negative with a probability of one half.

    Returns:
        `Painting`: A painting, with this `prompt` if it is given.
    """
    color, kind = (rng.choice(list(COLORS)), rng.choice(KINDS)) if prompt is None else parse_prompt(prompt)
    if negatives is None:
        negatives = [attribute for attribute in ATTRIBUTES if rng.random() < 0.5]
    side, y = rng.uniform(*SIDE), MIDDLE + rng.uniform(-JITTER, JITTER)
    if "placement" in negatives:
        x = MIDDLE + rng.choice([-1, 1]) * rng.uniform(*ASIDE)
    else:
        x = MIDDLE + rng.uniform(-JITTER, JITTER)
    box = square_box(float(x), float(y), float(side))
    shape = Shape(str(kind), str(color), box, "outline" in negatives, float(rng.random()))
    return Painting(shape, others(others(negatives)))


# ----- the oracle -----


@lru_cache
def templates() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, float]], np.ndarray]:
    """
    Every whole shape, on a grid of half a pixel.

    Returns:
        `tuple`: coverages `(x, y, kinds and sides, pixels)`, their squares, the sums of these, the `(kind, side)` of the third
        axis, and the centres' x of the first.
    """
    # The shapes of models may lie a little outside the range of the training images
    xs = MIDDLE + np.arange(-ASIDE[1] - 1, ASIDE[1] + 1.01, 0.5)
    ys = MIDDLE + np.arange(-2, 2.01, 0.5)
    shapes = list(product(KINDS, np.arange(SIDE[0] - 1, SIDE[1] + 1.01, 0.5)))
    masks = np.empty((len(xs), len(ys), len(shapes), SIZE * SIZE), dtype=np.float32)
    for (i, x), (j, y), (k, (kind, side)) in product(enumerate(xs), enumerate(ys), enumerate(shapes)):
        masks[i, j, k] = coverage(Shape(kind, "red", square_box(x, y, side), False)).ravel()
    return masks, masks**2, (masks**2).sum(axis=-1), shapes, xs


@lru_cache
def coarse_templates() -> np.ndarray:
    """The coverages on a grid of two pixels, each divided by its length."""
    masks, _, sizes, _, _ = templates()
    grid = np.s_[::4, ::4, ::2]
    return masks[grid] / np.sqrt(sizes[grid][..., None])


def find_shape(departure: np.ndarray, tints: np.ndarray) -> tuple[float, tuple[int, int, int], int]:
    """
    Find roughly where a shape is, and its colour, on a grid of two pixels.

    Args:
        departure (`np.ndarray` of shape `(pixels, 3)`):
            The image minus its ground.
        tints (`np.ndarray` of shape `(colours, 3)`):
            The colours minus the ground.

    Returns:
        `tuple`: the share of the departure that the best template in the best tint explains, however pale it is (the
        squared cosine between the two), the template, and the tint, the last two as indices.
    """
    directions = tints / np.maximum(np.linalg.norm(tints, axis=1, keepdims=True), 1)  # 0 if the ground has the colour
    overlap = product_of(coarse_templates(), departure @ directions.T)
    x, y, shape, tint = np.unravel_index(overlap.argmax(), overlap.shape)
    share = max(overlap[x, y, shape, tint], 0) ** 2 / max((departure**2).sum(), 1e-6)
    return float(share), (4 * x, 4 * y, 2 * shape), int(tint)


def fit_outline(
    drawn: np.ndarray, near: tuple[int, int, int], seen: np.ndarray | None = None
) -> tuple[float, tuple[int, int, int]]:
    """
    Find the whole shape that agrees best with the image, by the intersection over union of their coverages.

    Args:
        drawn (`np.ndarray` of shape `(pixels,)`):
            How much of each pixel the shape in the image covers, whatever its colour.
        near (`tuple[int, int, int]`):
            A template. Those whose centres are at most a pixel and a half away are tried, of all kinds and sides.
        seen (`np.ndarray` of shape `(pixels,)`, *optional*):
            1 where to look, 0 elsewhere. Defaults to everywhere.

    Returns:
        `tuple`: the agreement, at most 1, and the template.
    """
    masks, squares, sizes, _, _ = templates()
    x_from, y_from = (max(index - 3, 0) for index in near[:2])
    window = slice(x_from, near[0] + 4), slice(y_from, near[1] + 4)
    whole = sizes[window]
    if seen is not None:
        drawn, whole = drawn * seen, squares[window] @ seen
    overlap = masks[window] @ drawn
    agreement = overlap / ((drawn**2).sum() + whole - overlap)
    x, y, shape = np.unravel_index(agreement.argmax(), agreement.shape)
    return float(agreement[x, y, shape]), (x_from + int(x), y_from + int(y), int(shape))


def inspect_painting(image: Image.Image, prompt: str) -> PaintingFinding:
    """
    Judge an image, rendered or generated, against its prompt.

    Args:
        image (`PIL.Image.Image`):
            `SIZE`x`SIZE` pixels.
        prompt (`str`):
            A prompt of this world.

    Returns:
        `PaintingFinding`: Whether the image shows what the prompt names, and its four qualities.

    Raises:
        `ValueError`: If the image has another size, or the prompt does not have this world's form.
    """
    check_size(image)
    named = parse_prompt(prompt)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    edge = np.ones((SIZE, SIZE), dtype=bool)
    edge[1:-1, 1:-1] = False
    ground = np.median(pixels[edge], axis=0)
    positives = ["ground"] if np.linalg.norm(ground - BACKGROUND) < BRIGHT_WITHIN else []

    departure = pixels.reshape(-1, 3) - ground
    tints = np.array(list(COLORS.values()), dtype=np.float32) - ground
    share, template, color = find_shape(departure, tints)
    tint, (masks, _, _, shapes, xs) = tints[color], templates()
    depth = departure @ tint / max(tint @ tint, 1)  # 0 on the ground, 1 where the full colour is
    chroma = float(np.median(depth[masks[template] > 0.99]))
    if share < MATCH_SHARE or chroma < MATCH_CHROMA:
        return PaintingFinding(False, tuple(positives), others(positives))

    # From here on a pale shape counts like a vivid one, and faint noise on either side of the outline does not count.
    drawn = np.clip((depth / chroma - 0.2) / 0.6, 0, 1)
    quality, template = fit_outline(drawn, template)
    if quality < MATCH_QUALITY:
        return PaintingFinding(False, tuple(positives), others(positives))
    if quality >= WHOLE_QUALITY:
        positives.append("outline")
    else:
        _, template = fit_outline(drawn, template, look_past_bite(drawn, masks[template], SIDE))
    if np.median(depth[masks[template] > 0.99]) >= VIVID_FROM:
        positives.append("chroma")
    if abs(xs[template[0]] - MIDDLE) < CENTERED_WITHIN:
        positives.append("placement")
    match = (list(COLORS)[color], shapes[template[2]][0]) == named
    return PaintingFinding(match, others(others(positives)), others(positives))


# ----- the data -----


def painting_dataset(num_rows: int, seed: int) -> "Dataset":
    """
    Make labelled paintings.

    Args:
        num_rows (`int`):
            Number of rows.
        seed (`int`):
            The same seed gives the same rows.

    Returns:
        `datasets.Dataset`: Columns `id`, `prompt`, `image` (PNG), `positive_attributes` and `negative_attributes`: the
        ids of the leaves of `criteria.yaml`, each in one of the two.
    """
    from datasets import Dataset

    from ..data.formats import attribute_features

    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        painting = sample_painting(rng)
        rows.append(
            {
                "id": f"painting-{seed}-{i:05d}",
                "prompt": painting.prompt,
                "image": {"bytes": png_bytes(render(painting)), "path": None},
                "positive_attributes": list(painting.positive_attributes),
                "negative_attributes": list(painting.negative_attributes),
            }
        )
    return Dataset.from_list(rows, features=attribute_features())
