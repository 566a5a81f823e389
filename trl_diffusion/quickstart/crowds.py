# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A third small world: three shapes that overlap, and an oracle that looks past the shapes in front."""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .world import (
    BACKGROUND,
    COLORS,
    KINDS,
    SIZE,
    Place,
    Shape,
    coverage,
    sample_box,
)


LABELS = ("A", "B", "C")
NAMED = rf"a ({'|'.join(COLORS)}) ({'|'.join(KINDS)})"
PROMPT = re.compile(f"{NAMED}, {NAMED} and {NAMED}")

BITE_SEEN = 0.8  # share of a bite that no shape in front may cover

# From front to back
PLACES = tuple(
    Place(columns=(0, SIZE), center=center, side=(14.0, 15.5), jitter=(1.5, 1.5))
    for center in ((10.5, 11.0), (21.5, 11.0), (16.0, 21.0))
)


@dataclass(frozen=True)
class Crowd:
    """Three shapes from front to back: A (left), B (right), C (below, in the middle)."""

    shapes: tuple[Shape, Shape, Shape]

    @property
    def prompt(self) -> str:
        a, b, c = (f"a {shape.color} {shape.kind}" for shape in self.shapes)
        return f"{a}, {b} and {c}"


def parse_prompt(prompt: str) -> tuple[tuple[str, str], ...]:
    found = PROMPT.fullmatch(prompt)
    if found is None:
        raise ValueError(
            f"Not a prompt of the crowds: {prompt!r}. They read like 'a red circle, a blue square and a green triangle'."
        )
    words = found.groups()
    return tuple(zip(words[::2], words[1::2], strict=True))


def render(crowd: Crowd) -> Image.Image:
    """Draw a crowd as a `SIZE`x`SIZE` RGB image with smooth edges, from back to front."""
    pixels = np.tile(np.array(BACKGROUND, dtype=float), (SIZE, SIZE, 1))
    for shape in reversed(crowd.shapes):
        pixels += coverage(shape)[..., None] * (np.array(COLORS[shape.color]) - pixels)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def sample_crowd(
    rng: np.random.Generator, prompt: str | None = None, defective: tuple[bool, bool, bool] | None = None
) -> Crowd:
    named = sample_named(rng) if prompt is None else parse_prompt(prompt)
    flags = rng.random(len(LABELS)) < 0.5 if defective is None else defective
    shapes, hidden = [], np.zeros((SIZE, SIZE))
    for (color, kind), place, flag in zip(named, PLACES, flags, strict=True):
        shapes.append(sample_shape(rng, kind, color, place, bool(flag), hidden))
        hidden = np.maximum(hidden, coverage(shapes[-1]))
    return Crowd(tuple(shapes))


def sample_shape(
    rng: np.random.Generator, kind: str, color: str, place: Place, defective: bool, hidden: np.ndarray
) -> Shape:
    """A shape of which what is `hidden` does not show; a bite is where it shows."""
    box = sample_box(place, rng)
    whole = coverage(Shape(kind, color, box, False))
    while True:
        shape = Shape(kind, color, box, defective, float(rng.random()))
        bite = whole - coverage(shape)
        if ((1 - hidden) * bite).sum() >= BITE_SEEN * bite.sum():
            return shape


def sample_named(rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    colors = rng.choice(list(COLORS), size=len(LABELS), replace=False)
    return tuple((str(color), str(rng.choice(KINDS))) for color in colors)
