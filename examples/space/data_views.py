# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The second tab: instance pairs with boxes, verdicts and masks; the tree of attributes, and paintings with theirs."""

from typing import Any, NamedTuple

import torch
from PIL import Image

from trl_diffusion import Criteria
from trl_diffusion.cards.pictures import enlarged
from trl_diffusion.criteria import Attribute
from trl_diffusion.criteria_picture import criteria_picture
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import (
    ATTRIBUTE_COLUMNS,
    check_attributes,
    check_preference,
    prepare_dataset,
    read_image,
)
from trl_diffusion.data.pictures import upright_image
from trl_diffusion.data.sources import load_source
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.world import SIZE, preference_dataset
from trl_diffusion.visualization import instance_pictures, mask_overlay, outlines


NUM_PAIRS, NUM_PAINTINGS = 12, 48
SHOWN = 512  # pixels to which tiny images are enlarged
LATENT_CELL = {True: 4, False: 8}  # pixels of a latent cell: of the embedded models, of all others
PAIR_COLUMNS = ("prompt", "chosen", "rejected", "instances")
VERDICTS = {"chosen": "better in the chosen image", "rejected": "better in the rejected image", "tie": "equally good"}


# ----- pairs -----


class Pairs(NamedTuple):
    """
    Rows of a dataset of instance pairs.

    Args:
        rows (`list[dict]`):
            The rows.
        resolution (`int`):
            Width and height in pixels at which they are shown, as in training.
        cell (`int`):
            Width and height in pixels of a latent cell, in which masks are computed.
    """

    rows: list[dict[str, Any]]
    resolution: int
    cell: int


def load_pairs(name: str | None) -> Pairs:
    """
    Loads the first pairs of a dataset.

    Args:
        name (`str` or `None`):
            A Hub id, folder or file with the columns of `InstanceDPOTrainer`; `None` for the embedded scenes.

    Returns:
        [`Pairs`]

    Raises:
        `ValueError`: If there is no such dataset, or columns are missing.
    """
    if name is None:
        return Pairs(list(preference_dataset(NUM_PAIRS, seed=0)), SIZE, LATENT_CELL[True])
    rows = prepare_dataset(first_split(name), name, PAIR_COLUMNS, ("chosen", "rejected"))
    return Pairs(list(rows.take(NUM_PAIRS)), 512, LATENT_CELL[False])


def first_split(name: str):
    """The split `train` of a dataset, or its first one, as a stream."""
    splits = load_source(name, streaming=True)
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def pair_thumbnails(pairs: Pairs) -> list[Image.Image]:
    """A picture of each pair, chosen beside rejected."""
    collate = InstancePairCollator(pairs.resolution)
    thumbnails = []
    for row in pairs.rows:
        images = [plain_image(collate([row])[f"{column}_pixel_values"][0]) for column in ("chosen", "rejected")]
        thumbnails.append(beside(*map(shown_large, images)))
    return thumbnails


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two images of one height beside each other, with a gap."""
    gap = left.width // 32
    picture = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width + gap, 0))
    return picture


def plain_image(pixel_values: torch.Tensor) -> Image.Image:
    """The image of uint8 pixels `(3, H, W)`."""
    return Image.fromarray(pixel_values.permute(1, 2, 0).numpy())


def pair_pictures(pairs: Pairs, index: int, show: str, w_neg: float, mask_overlap: str) -> list[Image.Image]:
    """
    Draws the two images of a pair as they are trained on.

    Args:
        pairs ([`Pairs`]):
            The pairs.
        index (`int`):
            Which of them.
        show (`str`):
            `"images"`, `"boxes"` for the boxes with their verdicts, or `"masks"` for the weights in the loss too.
        w_neg (`float`), mask_overlap (`str`):
            Settings of the masks, see [`InstanceDPOConfig`].

    Returns:
        `list[PIL.Image.Image]`: the chosen image and the rejected one.
    """
    row = pairs.rows[index]
    batch = InstancePairCollator(pairs.resolution)([row])
    if show == "masks":
        return instance_pictures(batch, row, pairs.cell, w_neg, mask_overlap)
    instances = (row["instances"] or []) if show == "boxes" else []
    labels = [instance["label"] for instance in instances]
    preferences = [check_preference(instance["preference"]) for instance in instances]
    return [
        mask_overlay(
            batch[f"{column}_pixel_values"][0],
            torch.ones(1, 1),  # every position weighs the same
            batch[f"{column}_boxes"][0][: len(instances)],
            labels,
            preferences,
            outlines(batch, column)[: len(instances)],
        )
        for column in ("chosen", "rejected")
    ]


def verdicts(row: dict[str, Any], w_neg: float) -> list[list[str]]:
    """
    The verdicts of a pair as a table.

    Args:
        row (`dict`):
            The pair.
        w_neg (`float`):
            Weight of the loss inside an instance that contradicts the label.

    Returns:
        `list[list[str]]`: a row for each instance: its label, the verdict, whether the verdict agrees with the label of the pair,
        and the instance's own weight before it is combined with the others.
    """
    table = []
    for instance in row["instances"] or []:
        preference = check_preference(instance["preference"])
        agrees = {"chosen": "agrees", "rejected": "contradicts", "tie": "is not counted"}[preference]
        weight = {"chosen": "1", "rejected": f"{w_neg:g}", "tie": "none"}[preference]
        table.append([instance["label"], VERDICTS[preference], agrees, weight])
    return table


# ----- paintings -----


class Paintings(NamedTuple):
    """
    Rows of a dataset of images with attributes, and their tree.

    Args:
        rows (`list[dict]`):
            The rows, each with its upright image and the ids of its attributes.
        criteria ([`Criteria`]):
            The tree.
    """

    rows: list[dict[str, Any]]
    criteria: Criteria


def load_paintings(name: str | None, criteria: str) -> Paintings:
    """
    Loads the first images of a dataset, and the tree of their attributes.

    Args:
        name (`str` or `None`):
            A Hub id, folder or file with the columns of `ComplexPOTrainer`; `None` for the embedded paintings.
        criteria (`str`):
            The tree, a file or the name of a shipped tree.

    Returns:
        [`Paintings`]

    Raises:
        `ValueError`: If there is no such dataset or tree, or columns are missing.
    """
    tree = Criteria.load(criteria)
    if name is None:
        rows = painting_dataset(NUM_PAINTINGS, seed=0)
    else:
        rows = prepare_dataset(first_split(name), name, ("prompt", "image", *ATTRIBUTE_COLUMNS), ("image",))
        rows = rows.take(NUM_PAINTINGS)
    return Paintings([read_painting(row, tree) for row in rows], tree)


def read_painting(row: dict[str, Any], criteria: Criteria) -> dict[str, Any]:
    """The image of a row as a viewer shows it, and the ids of its attributes."""
    attributes = dict(zip(ATTRIBUTE_COLUMNS, check_attributes(row, criteria), strict=True))
    return {"image": upright_image(read_image(row, "image")), **attributes}


def below(criteria: Criteria, path: tuple[str, ...]) -> tuple[Attribute, ...]:
    """The attributes at a place in the tree, in the order of the file; `()` is the root."""
    return tuple(leaf for leaf in criteria.attributes if (*leaf.path, leaf.id)[: len(path)] == path)


def children(criteria: Criteria, path: tuple[str, ...]) -> list[str]:
    """The ids right below a place in the tree; none below an attribute."""
    deeper = [(*leaf.path, leaf.id)[len(path) :] for leaf in below(criteria, path)]
    return list(dict.fromkeys(ids[0] for ids in deeper if ids))


def describe(criteria: Criteria, path: tuple[str, ...]) -> str:
    """A place in the tree in Markdown: the way to it, and the number of attributes below, or the definition of the attribute."""
    way = " › ".join(name.replace("_", " ") for name in (criteria.name, *path))
    found = below(criteria, path)
    if not children(criteria, path):
        return f"**{way}**\n\n{found[0].definition}"
    return f"**{way}**\n\n{len(found)} attributes, each with a positive and a negative form."


def branch_picture(criteria: Criteria, path: tuple[str, ...]) -> Image.Image:
    """Draws the part of the tree below a place."""
    return criteria_picture(Criteria(criteria.name, criteria.levels, below(criteria, path)))


def paintings_with(
    paintings: Paintings, path: tuple[str, ...], form: str, number: int = 8
) -> list[tuple[Image.Image, str]]:
    """
    Finds paintings that have an attribute from a part of the tree.

    Args:
        paintings ([`Paintings`]):
            The paintings.
        path (`tuple[str, ...]`):
            A place in the tree.
        form (`str`):
            `"positive"` or `"negative"`.
        number (`int`, *optional*, defaults to `8`):
            How many at most.

    Returns:
        `list[tuple[PIL.Image.Image, str]]`: each with the forms of its attributes from there, those that have most first.
    """
    wanted = {leaf.id: getattr(leaf, form) for leaf in below(paintings.criteria, path)}
    found = []
    for row in paintings.rows:
        forms = [wanted[name] for name in row[f"{form}_attributes"] if name in wanted]
        if forms:
            found.append((len(forms), row["image"], ", ".join(forms)))
    found.sort(key=lambda item: -item[0])
    return [(shown_large(image), caption) for _, image, caption in found[:number]]


def shown_large(image: Image.Image) -> Image.Image:
    """An image with visible pixels if it is tiny."""
    return enlarged(image, SHOWN) if max(image.size) < 256 else image
