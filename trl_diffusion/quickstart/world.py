# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A small world of coloured shapes, with an oracle that tells how well each shape is drawn.

A scene is 32x32 pixels and holds two shapes: A, large and on the left, and B, smaller and on the right. A prompt names
them in that order: "a red circle and a blue square". A *defective* shape has a bite taken out of its outline. The
prompt never mentions defects, so a model trained on a mixture of clean and defective shapes generates both kinds, and
the effect of preference training can be measured by how often each shape is clean.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image


if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 32  # pixels, both ways
BACKGROUND = (244, 242, 238)
COLORS = {"red": (214, 40, 44), "green": (36, 150, 72), "blue": (46, 84, 214), "yellow": (246, 192, 20)}
AREA = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # of a box of side 1
KINDS = tuple(AREA)
DEPARTURES = np.array(list(COLORS.values()), dtype=np.float32) - np.array(BACKGROUND, dtype=np.float32)
LABELS = ("A", "B")
PROMPT = re.compile(rf"a ({'|'.join(COLORS)}) ({'|'.join(KINDS)}) and a ({'|'.join(COLORS)}) ({'|'.join(KINDS)})")

BITE_AREA = 0.2  # share of a shape's area that a bite removes
MATCH_QUALITY = 0.7  # below this no shape can be recognised
CLEAN_QUALITY = 0.9  # a bite costs at least BITE_AREA of the quality; a good drawing loses less than half as much
TIE_MARGIN = 0.02  # difference in quality below which two drawings are equally good


@dataclass(frozen=True)
class Place:
    """Where one of the two shapes of a scene is: its columns of pixels, its centre, the range of its side, its jitter."""

    columns: tuple[int, int]
    center: tuple[float, float]
    side: tuple[float, float]
    jitter: tuple[float, float]


PLACES = (
    Place(columns=(0, 18), center=(9.0, 16.0), side=(14.0, 15.5), jitter=(0.6, 2.0)),
    Place(columns=(18, 32), center=(25.0, 16.0), side=(11.0, 12.5), jitter=(0.6, 2.0)),
)


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Args:
        kind (`str`):
            One of `KINDS`.
        color (`str`):
            One of `COLORS`.
        box (`tuple[float, float, float, float]`):
            `[x_min, y_min, x_max, y_max]` in pixels, of the whole shape, whether or not a bite is missing.
        defective (`bool`):
            Whether a bite is taken out of the outline.
        bite_at (`float`, *optional*, defaults to `0.0`):
            Where on the outline the bite is, as a fraction in `[0, 1)` of the way round. Unused if the shape is not
            defective.
    """

    kind: str
    color: str
    box: tuple[float, float, float, float]
    defective: bool
    bite_at: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Two shapes: A (large, left), then B (smaller, right)."""

    shapes: tuple[Shape, Shape]

    @property
    def prompt(self) -> str:
        a, b = self.shapes
        return f"a {a.color} {a.kind} and a {b.color} {b.kind}"


@dataclass(frozen=True)
class Finding:
    """What the oracle sees in the place of one shape.

    Args:
        match (`bool`):
            Whether this place shows the colour and the kind that the prompt names.
        clean (`bool`):
            Whether this place shows a shape without a defect, of any colour and kind.
        quality (`float`):
            Agreement with the best-fitting whole shape, at most 1; higher is better.
        box (`tuple[float, float, float, float]` or `None`):
            `[x_min, y_min, x_max, y_max]` of that shape in pixels; `None` if no shape can be recognised.
    """

    match: bool
    clean: bool
    quality: float
    box: tuple[float, float, float, float] | None


def parse_prompt(prompt: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """
    Read what a prompt names.

    Args:
        prompt (`str`):
            Such as `"a red circle and a blue square"`.

    Returns:
        `tuple`: `((color, kind), (color, kind))` of A and B.

    Raises:
        `ValueError`: If the prompt does not have that form.
    """
    found = PROMPT.fullmatch(prompt)
    if found is None:
        raise ValueError(f"Not a prompt of the scenes: {prompt!r}. They read like 'a red circle and a blue square'.")
    return (found[1], found[2]), (found[3], found[4])


# ----- drawing -----


def bite_center(kind: str, box: tuple[float, float, float, float], at: float) -> tuple[float, float]:
    """Where the centre of a bite is on the outline; on a polygon it stays near the middle of an edge."""
    x_min, y_min, x_max, y_max = box
    if kind == "circle":
        radius, angle = (x_max - x_min) / 2, 2 * np.pi * at
        return (x_min + x_max) / 2 + radius * np.cos(angle), (y_min + y_max) / 2 + radius * np.sin(angle)
    if kind == "square":
        corners = [(x_min, y_min), (x_max, y_min), (x_max, y_max), (x_min, y_max)]
    else:
        corners = [((x_min + x_max) / 2, y_min), (x_max, y_max), (x_min, y_max)]
    edge, along = int(at * len(corners)), 0.35 + 0.3 * (at * len(corners) % 1)
    (x0, y0), (x1, y1) = corners[edge], corners[(edge + 1) % len(corners)]
    return x0 + along * (x1 - x0), y0 + along * (y1 - y0)


def coverage(shape: Shape) -> np.ndarray:
    """The share of each pixel that the shape covers, `(SIZE, SIZE)`, from 4x4 points per pixel."""
    points = (np.arange(4 * SIZE) + 0.5) / 4
    x, y = points[None, :], points[:, None]
    x_min, y_min, x_max, y_max = shape.box
    u, v = (x - x_min) / (x_max - x_min), (y - y_min) / (y_max - y_min)  # 0 to 1 within the box
    if shape.kind == "circle":
        inside = (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    elif shape.kind == "square":
        inside = (abs(u - 0.5) <= 0.5) & (abs(v - 0.5) <= 0.5)
    else:  # a triangle standing on its base
        inside = (abs(u - 0.5) <= v / 2) & (v <= 1)
    if shape.defective:
        # Centred on the outline, about half of the disc lies inside: pi r^2 / 2 = BITE_AREA of the shape.
        radius = (x_max - x_min) * np.sqrt(2 * BITE_AREA * AREA[shape.kind] / np.pi)
        bite_x, bite_y = bite_center(shape.kind, shape.box, shape.bite_at)
        inside = inside & ((x - bite_x) ** 2 + (y - bite_y) ** 2 > radius**2)
    return inside.reshape(SIZE, 4, SIZE, 4).mean((1, 3))


def render(scene: Scene) -> Image.Image:
    """Draw a scene as a `SIZE`x`SIZE` RGB image with smooth edges."""
    background = np.array(BACKGROUND, dtype=float)
    pixels = np.tile(background, (SIZE, SIZE, 1))
    for shape in scene.shapes:
        pixels += coverage(shape)[..., None] * (np.array(COLORS[shape.color]) - background)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def square_box(x: float, y: float, side: float) -> tuple[float, float, float, float]:
    """The box of a square with this centre and side."""
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def sample_box(place: Place, rng: np.random.Generator) -> tuple[float, float, float, float]:
    side = rng.uniform(*place.side)
    x, y = (center + rng.uniform(-jitter, jitter) for center, jitter in zip(place.center, place.jitter, strict=True))
    return square_box(x, y, side)


def sample_scene(
    rng: np.random.Generator, prompt: str | None = None, defective: tuple[bool, bool] | None = None
) -> Scene:
    """
    Sample a random scene.

    Args:
        rng (`np.random.Generator`):
            Source of all randomness.
        prompt (`str`, *optional*):
            What the scene shows. If left out, colours and kinds are uniform.
        defective (`tuple[bool, bool]`, *optional*):
            Whether A and B are defective. If left out, each is defective with a probability of one half.

    Returns:
        `Scene`: A scene, with this `prompt` if it is given.
    """
    named = sample_named(rng) if prompt is None else parse_prompt(prompt)
    flags = rng.random(2) < 0.5 if defective is None else defective
    shapes = tuple(
        Shape(kind, color, sample_box(place, rng), bool(flag), float(rng.random()))
        for (color, kind), place, flag in zip(named, PLACES, flags, strict=True)
    )
    return Scene(shapes)


def sample_named(rng: np.random.Generator) -> tuple[tuple[str, str], tuple[str, str]]:
    a, b = ((str(rng.choice(list(COLORS))), str(rng.choice(KINDS))) for _ in LABELS)
    return a, b


# ----- the oracle -----


@lru_cache
def templates(
    place: Place,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[str, tuple[float, float, float, float]]]]:
    """
    Every whole shape that may stand in a place, on a grid of half a pixel.

    Returns:
        `tuple`: coverages `(templates, pixels of the place)`, their squares, the sums of these, and the `(kind, box)` of each.
    """
    margin = 1.0  # the shapes of models may lie a little outside the places of the training images
    x_offsets, y_offsets = (np.arange(-(j + margin), j + margin + 0.01, 0.5) for j in place.jitter)
    sides = np.arange(place.side[0] - margin, place.side[1] + margin + 0.01, 0.5)
    (x0, y0), masks, drawn = place.center, [], []
    for kind, side, x, y in product(KINDS, sides, x0 + x_offsets, y0 + y_offsets):
        box = square_box(float(x), float(y), float(side))
        masks.append(coverage(Shape(kind, "red", box, False))[:, slice(*place.columns)].ravel())
        drawn.append((kind, box))
    masks = np.array(masks, dtype=np.float32)
    return masks, masks**2, (masks**2).sum(axis=1), drawn


def product_of(masks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`masks @ values`. By torch: on a matrix this thin the threads of NumPy's BLAS wait for each other."""
    return (torch.from_numpy(masks) @ torch.from_numpy(values)).numpy()


def best_fit(departure: np.ndarray, place: Place, seen: np.ndarray | None = None) -> tuple[float, int, int]:
    """
    Find the whole shape whose rendering is closest to the image.

    The measure is the intersection over union, generalised from sets to colours. With `p` the image's departure from
    the background, `c` a colour's, and `m` a template's coverage, it is `<p, mc> / (|p|^2 + |mc|^2 - <p, mc>)`: 1
    if the rendering is exact, 1 - f if a fraction f of the shape is missing, near 0 for texture. Missing pieces, smears,
    wrong shades and anything else in the place all lower it.

    Args:
        departure (`np.ndarray` of shape `(pixels, 3)`):
            The image minus the background.
        place (`Place`):
            Where these pixels are.
        seen (`np.ndarray` of shape `(pixels,)`, *optional*):
            1 where to look, 0 elsewhere. Defaults to everywhere.

    Returns:
        `tuple`: `(quality, template, color)`, the last two as indices.
    """
    masks, squares, sizes, _ = templates(place)
    if seen is not None:
        departure, sizes = departure * seen[:, None], product_of(squares, seen)
    overlap = product_of(masks, departure @ DEPARTURES.T)  # (templates, colours)
    drawn, whole = (departure**2).sum(), sizes[:, None] * (DEPARTURES**2).sum(1)
    quality = overlap / (drawn + whole - overlap)
    template, color = np.unravel_index(quality.argmax(), quality.shape)
    return float(quality[template, color]), int(template), int(color)


def look_past_bite(
    drawn: np.ndarray, mask: np.ndarray, side: tuple[float, float], columns: tuple[int, int] = (0, SIZE)
) -> np.ndarray:
    """
    Tell which pixels to look at again to find out what shape a bitten one was before the bite.

    A whole shape that is fitted to a bitten one shifts at the bite, so its box is wrong by about a pixel. The pixels that the
    image still lacks lie in the bite, and a second fit that ignores a disc around them finds the box.

    Args:
        drawn (`np.ndarray` of shape `(pixels,)`):
            How much of the shape's colour each pixel has: 0 for none, 1 for all of it.
        mask (`np.ndarray` of shape `(pixels,)`):
            Coverage of the whole shape that was fitted.
        side (`tuple[float, float]`):
            Range of the sides of shapes, in pixels.
        columns (`tuple[int, int]`, *optional*, defaults to `(0, SIZE)`):
            First column of these pixels, and the one after the last.

    Returns:
        `np.ndarray`: 1 where to look, 0 in the disc, `(pixels,)`. If nothing is missing, there is no disc.
    """
    missing = np.clip(mask - drawn, 0, 1) ** 2
    if not missing.any():
        return np.ones_like(mask)
    y, x = np.mgrid[:SIZE, slice(*columns)].reshape(2, -1)
    bite_x, bite_y = (missing * x).sum() / missing.sum(), (missing * y).sum() / missing.sum()
    return (np.hypot(x - bite_x, y - bite_y) > 0.4 * np.mean(side)).astype(np.float32)


def check_size(image: Image.Image) -> None:
    if image.size != (SIZE, SIZE):
        raise ValueError(f"The oracle reads images of {SIZE}x{SIZE} pixels, not {image.size[0]}x{image.size[1]}.")


def inspect_image(image: Image.Image, prompt: str) -> list[Finding]:
    """
    Judge an image, rendered or generated, against its prompt.

    Args:
        image (`PIL.Image.Image`):
            `SIZE`x`SIZE` pixels.
        prompt (`str`):
            A prompt of this world.

    Returns:
        `list[Finding]`: What is seen of A, then of B.

    Raises:
        `ValueError`: If the image has another size, or the prompt does not have this world's form.
    """
    return [inspect_place(image, place, named) for place, named in zip(PLACES, parse_prompt(prompt), strict=True)]


def inspect_place(image: Image.Image, place: Place, named: tuple[str, str]) -> Finding:
    """
    Judge what an image shows in one of the two places.

    Args:
        image (`PIL.Image.Image`):
            `SIZE`x`SIZE` pixels.
        place (`Place`):
            Where to look.
        named (`tuple[str, str]`):
            The colour and the kind that should be there.

    Returns:
        `Finding`: What is seen.

    Raises:
        `ValueError`: If the image has another size.
    """
    check_size(image)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) - np.array(BACKGROUND, dtype=np.float32)
    departure = pixels[:, slice(*place.columns)].reshape(-1, 3)
    quality, template, color = best_fit(departure, place)
    if quality < MATCH_QUALITY:
        return Finding(match=False, clean=False, quality=quality, box=None)
    clean = quality >= CLEAN_QUALITY
    if not clean:
        mask, tint = templates(place)[0][template], DEPARTURES[color]
        past_bite = look_past_bite(departure @ tint / (tint @ tint), mask, place.side, place.columns)
        _, template, color = best_fit(departure, place, past_bite)
    kind, box = templates(place)[-1][template]
    return Finding((list(COLORS)[color], kind) == named, clean, quality, box)


def judge(first_image: Image.Image, second_image: Image.Image, prompt: str) -> list[str]:
    """
    Compare two images of one prompt, shape by shape.

    Args:
        first_image (`PIL.Image.Image`), second_image (`PIL.Image.Image`):
            `SIZE`x`SIZE` pixels each.
        prompt (`str`):
            A prompt of this world.

    Returns:
        `list[str]`: For A, then B: `"first"` or `"second"`, the image with the better shape, or `"tie"`.
    """
    verdicts = []
    for first, second in zip(inspect_image(first_image, prompt), inspect_image(second_image, prompt), strict=True):
        if abs(first.quality - second.quality) < TIE_MARGIN:
            verdicts.append("tie")
        else:
            verdicts.append("first" if first.quality > second.quality else "second")
    return verdicts


# ----- the data -----


def evaluation_prompts(num_prompts: int, seed: int, sample: Callable = sample_scene) -> list[str]:
    """
    Sample prompts of a world, uniformly over colours and kinds.

    Args:
        num_prompts (`int`):
            Number of prompts.
        seed (`int`):
            The same seed gives the same prompts.
        sample (`Callable`, *optional*, defaults to [`sample_scene`]):
            Samples a scene, or a painting: something with a `prompt`, from a `np.random.Generator`.

    Returns:
        `list[str]`: The prompts.
    """
    rng = np.random.default_rng(seed)
    return [sample(rng).prompt for _ in range(num_prompts)]


def preference_dataset(num_pairs: int, seed: int, conflict_rate: float = 0.46) -> "Dataset":
    """
    Make preference pairs in which the label of the images and the labels of the instances disagree at a known rate.

    Both images of a pair show the same prompt. Shape A decides which image is chosen: it is clean in the chosen image and
    defective in the rejected one. Shape B agrees, except in the conflicts, where the *rejected* image has the clean B.

    Args:
        num_pairs (`int`):
            Number of rows.
        seed (`int`):
            The same seed gives the same rows.
        conflict_rate (`float`, *optional*, defaults to `0.46`):
            Share of the pairs in which B contradicts the label, exact up to rounding. The default is the share of the
            instance pairs of Pick-a-Pic v2 that contradict their label.

    Returns:
        `datasets.Dataset`: Columns `id`, `prompt`, `chosen`, `rejected` (PNG) and `instances`, A then B, with boxes as
        `[x_min, y_min, x_max, y_max]` in pixels.
    """
    rng = np.random.default_rng(seed)
    conflicts = set(rng.permutation(num_pairs)[: round(conflict_rate * num_pairs)].tolist())
    preferences = [["chosen", "rejected" if i in conflicts else "chosen"] for i in range(num_pairs)]
    return pair_dataset(f"world-{seed}", preferences, rng, sample_scene, render)


def pair_dataset(
    name: str, preferences: list[list[str]], rng: np.random.Generator, sample: Callable, render: Callable
) -> "Dataset":
    """
    Draw a pair of images for each list of preferences.

    Args:
        name (`str`):
            What the ids begin with.
        preferences (`list[list[str]]`):
            For each pair and each of its shapes: `"chosen"` or `"rejected"`, the image in which the shape is clean while it is
            defective in the other, or `"tie"`: it is clean in both or defective in both, as likely.
        rng (`np.random.Generator`):
            Source of all randomness.
        sample (`Callable`):
            Samples something with a `prompt` and `shapes`, as [`sample_scene`] does.
        render (`Callable`):
            Draws it.

    Returns:
        `datasets.Dataset`: See [`preference_dataset`].
    """
    from datasets import Dataset

    from ..data.formats import instance_pair_features

    rows = []
    for i, of_pair in enumerate(preferences):
        defective = [
            (bool(rng.random() < 0.5),) * 2 if side == "tie" else (side == "rejected", side == "chosen")
            for side in of_pair
        ]
        chosen = sample(rng, defective=tuple(first for first, _ in defective))
        rejected = sample(rng, chosen.prompt, defective=tuple(second for _, second in defective))
        instances = [
            {
                "label": f"{first.color} {first.kind}",
                "chosen_box": first.box,
                "rejected_box": second.box,
                "preference": side,
            }
            for first, second, side in zip(chosen.shapes, rejected.shapes, of_pair, strict=True)
        ]
        rows.append(
            {
                "id": f"{name}-{i:05d}",
                "prompt": chosen.prompt,
                "chosen": {"bytes": png_bytes(render(chosen)), "path": None},
                "rejected": {"bytes": png_bytes(render(rejected)), "path": None},
                "instances": instances,
            }
        )
    return Dataset.from_list(rows, features=instance_pair_features())


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
