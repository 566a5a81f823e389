# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A third small world: three shapes that overlap, and an oracle that looks past the shapes in front.

A crowd is 32x32 pixels and holds three shapes of the kinds and colours of `world.py`, no two of one colour: A on the left, in
front; B on the right, behind A; C below, behind both. A prompt names them from front to back: "a red circle, a blue square
and a green triangle". Each is whole or bitten, as in `world.py`, and no prompt says which. The boxes of the shapes overlap. There
several instances of a pair, which may contradict each other, share a position, and each way to combine them (the mean over all,
the mean over those that cover the position, a term for each) gives it another weight.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .world import (
    BACKGROUND,
    COLORS,
    KINDS,
    SIZE,
    Finding,
    Place,
    Shape,
    check_size,
    coverage,
    evaluation_prompts,
    look_past_bite,
    pair_dataset,
    product_of,
    sample_box,
    templates,
)


if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("A", "B", "C")
NAMED = rf"a ({'|'.join(COLORS)}) ({'|'.join(KINDS)})"
PROMPT = re.compile(f"{NAMED}, {NAMED} and {NAMED}")
KNOWN = np.array([*COLORS.values(), BACKGROUND], dtype=np.float32)

# From front to back
PLACES = tuple(
    Place(columns=columns, center=center, side=(14.0, 15.5), jitter=(1.5, 1.5))
    for columns, center in (((0, 22), (10.5, 11.0)), ((10, 32), (21.5, 11.0)), ((5, 27), (16.0, 21.0)))
)
BITE_SEEN = 0.8  # share of a bite that the shapes in front leave in view, at least

CLEAN_QUALITY = 0.94  # a whole shape in view has 0.96 or more, one with a bite in view hardly ever more than this
ROUGH_QUALITY = 0.6  # below this no shape can be recognised: a bite in the visible half of a shape may cost 0.35
MATCH_QUALITY = 0.7  # the same, once the bite is ignored


@dataclass(frozen=True)
class Crowd:
    """Three shapes from front to back: A (left), B (right), C (below, in the middle)."""

    shapes: tuple[Shape, Shape, Shape]

    @property
    def prompt(self) -> str:
        a, b, c = (f"a {shape.color} {shape.kind}" for shape in self.shapes)
        return f"{a}, {b} and {c}"


def parse_prompt(prompt: str) -> tuple[tuple[str, str], ...]:
    """
    Read what a prompt names.

    Args:
        prompt (`str`):
            Such as `"a red circle, a blue square and a green triangle"`.

    Returns:
        `tuple`: `(color, kind)` of A, B and C.

    Raises:
        `ValueError`: If the prompt does not have that form, or names a colour twice.
    """
    found = PROMPT.fullmatch(prompt)
    words = found.groups() if found else ()
    if len(set(words[::2])) < len(LABELS):
        raise ValueError(
            f"Not a prompt of the crowds: {prompt!r}. They read like 'a red circle, a blue square and a green triangle', with "
            "three different colours."
        )
    return tuple(zip(words[::2], words[1::2], strict=True))


# ----- drawing -----


def render(crowd: Crowd) -> Image.Image:
    """Draw a crowd from back to front, as a `SIZE`x`SIZE` RGB image with smooth edges."""
    pixels = np.tile(np.array(BACKGROUND, dtype=float), (SIZE, SIZE, 1))
    for shape in reversed(crowd.shapes):
        pixels += coverage(shape)[..., None] * (np.array(COLORS[shape.color]) - pixels)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def sample_crowd(
    rng: np.random.Generator, prompt: str | None = None, defective: tuple[bool, bool, bool] | None = None
) -> Crowd:
    """
    Sample a random crowd.

    Args:
        rng (`np.random.Generator`):
            Source of all randomness.
        prompt (`str`, *optional*):
            What the crowd shows. If left out, kinds are uniform, and so are the choices of three different colours.
        defective (`tuple[bool, bool, bool]`, *optional*):
            Whether A, B and C are defective. If left out, each is defective with a probability of one half.

    Returns:
        `Crowd`: A crowd, with this `prompt` if it is given.
    """
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
    """A shape in a place. If it has a bite, then where this can be seen: `hidden` is what the shapes in front cover."""
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


# ----- the oracle -----


def shares_of_colors(image: Image.Image) -> np.ndarray:
    """
    Tell how much of each pixel has which colour.

    A pixel at the edge of a shape is a mixture of two of the four colours and the background. Of all pairs of these five, the
    one with the nearest mixture is taken.

    Args:
        image (`PIL.Image.Image`):
            `SIZE`x`SIZE` pixels.

    Returns:
        `np.ndarray`: shares in [0, 1], `(colours, SIZE, SIZE)`.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).reshape(-1, 3)
    first, second = np.array(list(combinations(range(len(KNOWN)), 2))).T
    ways, starts = KNOWN[second] - KNOWN[first], KNOWN[first]  # (pairs, 3)
    steps = (ways @ pixels.T - (ways * starts).sum(1)[:, None]) / (ways**2).sum(1)[:, None]
    steps = np.clip(steps, 0, 1)  # (pairs, pixels): 0 at the first colour of the pair, 1 at the second
    distances = ((starts[:, None] + steps[..., None] * ways[:, None] - pixels) ** 2).sum(-1)
    pair, pixel = distances.argmin(axis=0), np.arange(len(pixels))
    shares = np.zeros((len(KNOWN), len(pixels)), dtype=np.float32)
    shares[first[pair], pixel] = 1 - steps[pair, pixel]
    shares[second[pair], pixel] = steps[pair, pixel]
    return shares[: len(COLORS)].reshape(-1, SIZE, SIZE)


@dataclass(frozen=True)
class Fit:
    """The whole shape of one kind that agrees best with an image: how well, which template, and which colour."""

    quality: float
    template: int
    color: int


def best_fits(shares: np.ndarray, place: Place, seen: np.ndarray) -> list[Fit]:
    """
    Find for each kind the whole shape that agrees best with what is seen of a place.

    The measure is the intersection over union, generalised from sets to shares: with `d` the shares of a colour and `m` a
    template's coverage, both where it is seen, it is `<d, m> / (|d|^2 + |m|^2 - <d, m>)`.

    Args:
        shares (`np.ndarray` of shape `(colours, pixels)`):
            The shares of the colours in the pixels of the place.
        place (`Place`):
            Where these pixels are.
        seen (`np.ndarray` of shape `(pixels,)`):
            1 where to look, 0 elsewhere.

    Returns:
        `list[Fit]`: One for each of `KINDS`.
    """
    masks, squares, _, _ = templates(place)
    drawn = shares * seen
    overlap = product_of(masks, np.ascontiguousarray(drawn.T))  # (templates, colours)
    union = (drawn**2).sum(axis=1) + product_of(squares, seen)[:, None] - overlap
    quality = overlap / np.maximum(union, 1e-6)  # 0 if nothing of a template is seen
    fits = []
    for rows in rows_of_kinds(place):
        row, color = np.unravel_index(quality[rows].argmax(), quality[rows].shape)
        fits.append(Fit(float(quality[rows][row, color]), rows.start + int(row), int(color)))
    return fits


@lru_cache
def rows_of_kinds(place: Place) -> list[slice]:
    """The templates of each of `KINDS`: they are sorted by kind."""
    ends = np.cumsum([0, *(sum(kind == one for kind, _ in templates(place)[-1]) for one in KINDS)])
    return [slice(int(start), int(end)) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def inspect_crowd(image: Image.Image, prompt: str) -> list[Finding]:
    """
    Judge an image, rendered or generated, against its prompt, from front to back. The pixels in which a shape in front stands
    do not count for the shapes behind it.

    Args:
        image (`PIL.Image.Image`):
            `SIZE`x`SIZE` pixels.
        prompt (`str`):
            A prompt of this world.

    Returns:
        `list[Finding]`: What is seen of A, B and C. A box is that of the whole shape, with what is hidden of it.

    Raises:
        `ValueError`: If the image has another size, or the prompt does not have this world's form.
    """
    check_size(image)
    shares, seen = shares_of_colors(image), np.ones((SIZE, SIZE), dtype=np.float32)
    findings = []
    for place, named in zip(PLACES, parse_prompt(prompt), strict=True):
        columns = slice(*place.columns)
        finding, kind = inspect_place(
            shares[..., columns].reshape(len(COLORS), -1), place, seen[:, columns].ravel(), named
        )
        findings.append(finding)
        if finding.box is not None:
            x_min, y_min, x_max, y_max = finding.box
            wider = (x_min - 0.5, y_min - 0.5, x_max + 0.5, y_max + 0.5)  # the fit may be a quarter of a pixel off
            seen *= coverage(Shape(kind, "red", wider, False)) == 0
    return findings


def inspect_place(
    shares: np.ndarray, place: Place, seen: np.ndarray, named: tuple[str, str]
) -> tuple[Finding, str | None]:
    """
    Judge what is seen of one place.

    Args:
        shares (`np.ndarray` of shape `(colours, pixels)`), place (`Place`), seen (`np.ndarray` of shape `(pixels,)`):
            As in [`best_fits`].
        named (`tuple[str, str]`):
            The colour and the kind that should be there.

    Returns:
        `tuple`: the finding, and the kind of the shape, `None` if no shape can be recognised.
    """
    masks, _, _, drawn = templates(place)
    fits = best_fits(shares, place, seen)
    fit = max(fits, key=lambda fit: fit.quality)
    quality, clean = fit.quality, fit.quality >= CLEAN_QUALITY
    if ROUGH_QUALITY <= quality and not clean:
        # A bitten shape that is partly hidden may look like a whole one of another kind. So each kind has a fit beside a bite.
        again = []
        for i, first in enumerate(fits):
            there = np.where(seen == 1, shares[first.color], masks[first.template])  # what is hidden lacks nothing
            past_bite = look_past_bite(there, masks[first.template], place.side, place.columns)
            again.append(best_fits(shares, place, past_bite * seen)[i])
        fit = max(again, key=lambda fit: fit.quality)
    if quality < ROUGH_QUALITY or fit.quality < MATCH_QUALITY:
        return Finding(match=False, clean=False, quality=quality, box=None), None
    kind, box = drawn[fit.template]
    return Finding((list(COLORS)[fit.color], kind) == named, clean, quality, box), kind


def score(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """
    Score images of crowds.

    Args:
        images (`list[PIL.Image.Image]`):
            `SIZE`x`SIZE` pixels each.
        prompts (`list[str]`):
            Their prompts.

    Returns:
        `dict[str, float]`: `clean_a`, `clean_b`, `clean_c`: the share of the images in which this shape is clean; `clean`: the
        mean of B and C, which do not decide the label of a pair; `match`: the share of all shapes that match the prompt; `n`:
        the number of images.
    """
    findings = [inspect_crowd(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    clean = np.mean([[finding.clean for finding in found] for found in findings], axis=0)
    match = np.mean([[finding.match for finding in found] for found in findings])
    shares = {f"clean_{label.lower()}": float(share) for label, share in zip(LABELS, clean, strict=True)}
    return shares | {"clean": float(clean[1:].mean()), "match": float(match), "n": len(findings)}


# ----- the data -----


def crowd_prompts(num_prompts: int, seed: int) -> list[str]:
    """
    Sample prompts of this world.

    Args:
        num_prompts (`int`):
            Number of prompts.
        seed (`int`):
            The same seed gives the same prompts.

    Returns:
        `list[str]`: The prompts.
    """
    return evaluation_prompts(num_prompts, seed, sample_crowd)


def sample_preferences(
    rng: np.random.Generator, num_pairs: int, conflict_rate: float, tie_rate: float
) -> list[list[str]]:
    """The preference of A, B and C in each pair, at rates that are exact up to rounding."""
    num_others = (len(LABELS) - 1) * num_pairs
    ties = round(tie_rate * num_others)
    conflicts = round(conflict_rate * (num_others - ties))
    others = ["tie"] * ties + ["rejected"] * conflicts + ["chosen"] * (num_others - ties - conflicts)
    return [["chosen", *row] for row in rng.permutation(others).reshape(num_pairs, -1).tolist()]


def crowd_dataset(num_pairs: int, seed: int, conflict_rate: float = 0.46, tie_rate: float = 0.2) -> "Dataset":
    """
    Make preference pairs in which the label of the images and the labels of the instances disagree at a known rate.

    Both images of a pair show the same prompt. Shape A decides which image is chosen: it is clean in the chosen image and
    defective in the rejected one. Each of B and C is a tie (both clean or both defective), or it is clean in one of the images
    only: in the conflicts, in the *rejected* one.

    Args:
        num_pairs (`int`):
            Number of rows.
        seed (`int`):
            The same seed gives the same rows.
        conflict_rate (`float`, *optional*, defaults to `0.46`):
            Share of the B and C that contradict the label, among those that are no ties. The default is the share of the
            instance pairs of Pick-a-Pic v2 that contradict their label.
        tie_rate (`float`, *optional*, defaults to `0.2`):
            Share of the B and C that are ties.

    Returns:
        `datasets.Dataset`: Columns `id`, `prompt`, `chosen`, `rejected` (PNG) and `instances`, A, B, then C, with the boxes of
        the whole shapes, hidden or not, as `[x_min, y_min, x_max, y_max]` in pixels.
    """
    rng = np.random.default_rng(seed)
    preferences = sample_preferences(rng, num_pairs, conflict_rate, tie_rate)
    return pair_dataset(f"crowd-{seed}", preferences, rng, sample_crowd, render)
