# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The oracles of both worlds in the roles of annotation: they answer the requests of a vision-language model, a detector and a
segmenter.

An oracle reads only the text and the images of a request. Everything around it is as with real models: prompts, crops in
both orders, parsing, boxes.
"""

import json
import re
from functools import lru_cache
from itertools import product
from typing import get_args

import numpy as np
from PIL import Image

from ..annotation.attribute_expert import DimensionAnswer
from ..annotation.detector import Detection, Detector
from ..annotation.images import PADDING
from ..annotation.judge import Verdict
from ..annotation.planner import Plan
from ..annotation.segmenter import Segmenter
from ..annotation.vlm import VLM, Request
from . import paintings, world


SIDES = ("left", "right")
LABEL = re.compile(rf"({'|'.join(SIDES)}) ({'|'.join(world.COLORS)}) ({'|'.join(world.KINDS)})")
CROP_MARGIN = 1.25  # as the judge cuts its crops


class OracleVLM(VLM):
    """Plans and judges scenes of two shapes, names what a prompt asks for, and reads paintings."""

    def describe(self) -> dict:
        return {"model": "oracle", "revision": "1"}

    def generate(self, requests: list[Request]) -> list[str]:
        return [json.dumps(self.answer(request)) for request in requests]

    def answer(self, request: Request) -> dict:
        if request.schema is Plan:
            return {"instances": plan(request.images, world.PROMPT.search(request.text)[0])}
        if request.schema is Verdict:
            _, color, kind = LABEL.search(request.text).groups()
            first, second = (crop_quality(crop, color, kind) for crop in request.images)
            # It has to choose. Equal crops give "A" in both orders, which the judge counts as a tie.
            return {"better": "B" if second - first > world.TIE_MARGIN else "A"}
        if "things" in request.schema.model_fields:
            prompt = world.PROMPT.search(request.text) or paintings.PROMPT.search(request.text)
            return {"things": named_shapes(prompt[0])}
        assert issubclass(request.schema, DimensionAnswer)
        asked = get_args(get_args(request.schema.model_fields["positive"].annotation)[0])
        found = paintings.inspect_painting(request.images[0], paintings.PROMPT.search(request.text)[0])
        return {
            "positive": [attribute for attribute in asked if attribute in found.positive_attributes],
            "negative": [attribute for attribute in asked if attribute in found.negative_attributes],
        }


class OracleDetector(Detector):
    """Finds the shapes that [`OracleVLM`] names."""

    def describe(self) -> dict:
        return {"model": "oracle", "revision": "1"}

    def detect(self, queries: list[tuple[Image.Image, str]]) -> list[Detection | None]:
        return [self.detect_shape(image, label) for image, label in queries]

    def detect_shape(self, image: Image.Image, label: str) -> Detection | None:
        if paintings.PROMPT.fullmatch(f"a {label}"):  # in a painting the shape may be anywhere
            is_there = paintings.inspect_painting(image, f"a {label}").match
            return Detection([0.0, 0.0, 1.0, 1.0], 1.0) if is_there else None
        side, color, kind = LABEL.fullmatch(label).groups()
        found = look(image.tobytes(), image.size, side, color, kind)
        if not found.match:
            return None
        return Detection([coordinate / world.SIZE for coordinate in found.box], found.quality)


class OracleSegmenter(Segmenter):
    """Outlines the shape in a box: the pixels that are at least half covered by its colour, without a bite that is missing."""

    def describe(self) -> dict:
        return {"model": "oracle", "revision": "1"}

    def segment(self, queries: list[tuple[Image.Image, list[float]]]) -> list[np.ndarray | None]:
        return [colored_pixels(image, box) for image, box in queries]


def colored_pixels(image: Image.Image, box: list[float]) -> np.ndarray:
    """
    Finds the pixels of the shape in a box.

    Args:
        image (`PIL.Image.Image`):
            A scene or a painting.
        box (`list[float]`):
            Unit box of the shape.

    Returns:
        `np.ndarray` of shape `(height, width)`: bool, with the colour that covers the most of the box.
    """
    departure = np.asarray(image, dtype=np.float32) - np.array(world.BACKGROUND, dtype=np.float32)
    columns, rows = (np.arange(length) for length in image.size)
    left, top, right, bottom = np.array(box) * (image.size * 2)
    is_inside = ((top < rows + 1) & (rows < bottom))[:, None] & (left < columns + 1) & (columns < right)
    best = min(world.DEPARTURES, key=lambda tint: residue(departure[is_inside], tint))
    share = departure @ best / (best @ best)
    return is_inside & (share >= 0.5)


def residue(departure: np.ndarray, tint: np.ndarray) -> float:
    """How much of `(pixels, 3)` departures from the background is no mixture of the background and one colour."""
    share = np.clip(departure @ tint / (tint @ tint), 0, 1)
    return float(((departure - share[:, None] * tint) ** 2).sum())


def plan(images: tuple[Image.Image, ...], prompt: str) -> list[str]:
    """The shapes that the prompt names and both images show, with their sides, because two may have the same name."""
    return [
        label
        for label in named_shapes(prompt)
        if all(look(image.tobytes(), image.size, *LABEL.fullmatch(label).groups()).match for image in images)
    ]


def named_shapes(prompt: str) -> list[str]:
    """The shapes that a prompt names: two with their sides in a scene, or one in a painting."""
    if paintings.PROMPT.fullmatch(prompt):
        return [prompt.removeprefix("a ")]
    return [f"{side} {' '.join(shape)}" for side, shape in zip(SIDES, world.parse_prompt(prompt), strict=True)]


@lru_cache(maxsize=4096)
def look(pixels: bytes, size: tuple[int, int], side: str, color: str, kind: str) -> world.Finding:
    """What is seen on one side of an image. Cached, because the planner and the detector ask for the same."""
    return world.inspect_place(Image.frombytes("RGB", size, pixels), world.PLACES[SIDES.index(side)], (color, kind))


def crop_quality(crop: Image.Image, color: str, kind: str) -> float:
    """
    How well a shape is drawn in a crop around it.

    Args:
        crop (`PIL.Image.Image`):
            A square crop, `CROP_MARGIN` times as wide as the shape's box.
        color (`str`), kind (`str`):
            The shape.

    Returns:
        `float`: agreement with the best-fitting whole shape, at most 1, as in [`quickstart.world.best_fit`].
    """
    beyond = Image.fromarray(255 * (np.asarray(crop) == PADDING).all(-1).astype(np.uint8))
    size = (world.SIZE, world.SIZE)
    seen = np.asarray(beyond.resize(size, Image.Resampling.BOX)).ravel() == 0
    pixels = np.asarray(crop.resize(size, Image.Resampling.BOX), dtype=np.float32).reshape(-1, 3)
    departure = (pixels - np.array(world.BACKGROUND, dtype=np.float32)) * seen[:, None]
    tint = np.subtract(world.COLORS[color], world.BACKGROUND).astype(np.float32)
    masks = crop_templates(kind)
    overlap = masks @ (departure @ tint)
    quality = overlap / ((departure**2).sum() + (masks**2 @ seen) * (tint @ tint) - overlap)
    return float(quality.max())


@lru_cache
def crop_templates(kind: str) -> np.ndarray:
    """Coverages `(templates, pixels)` of a whole shape in the middle of a crop, slightly moved and scaled."""
    steps = (-1.0, 0.0, 1.0)
    return np.array(
        [
            world.coverage(
                world.Shape(kind, "red", world.square_box(world.SIZE / 2 + x, world.SIZE / 2 + y, side), False)
            )
            for x, y, side in product(steps, steps, world.SIZE / CROP_MARGIN + np.array(steps))
        ],
        dtype=np.float32,
    ).reshape(-1, world.SIZE**2)
