# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Boxes, labels, preferences, prompts and ids of strangers, in rows as they come from a stream."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import (
    CONTROL,
    IMAGES,
    NASTY_NUMBERS,
    NASTY_TEXTS,
    anything,
    boxes,
    few,
    instances,
    lawful,
    many,
    preferences,
    texts,
)
from trl_diffusion import Criteria
from trl_diffusion.boxes import crop_boxes, denormalize_boxes, flip_boxes, normalize_boxes, orient_boxes
from trl_diffusion.data.check import as_text, check_dataset
from trl_diffusion.data.collators import AttributeCollator, InstancePairCollator
from trl_diffusion.data.formats import (
    check_attributes,
    check_box,
    check_instances,
    check_preference,
    prepare_dataset,
    row_id,
    row_prompt,
)
from trl_diffusion.masks import instance_masks


PAIR = ("prompt", "chosen", "rejected")
PAINTING = Criteria.load("painting")
GOOD = {"label": "dog", "chosen_box": [0, 0, 4, 4], "rejected_box": [1, 1, 8, 8], "preference": "rejected"}
IDS = [attribute.id for attribute in PAINTING.attributes]


def row(**changes) -> dict:
    return {"id": "r1", "prompt": "a dog", "chosen": IMAGES["png"], "rejected": IMAGES["jpeg"]} | changes


def trained(found: dict) -> None:
    """What the training does with a batch gives finite numbers."""
    assert torch.isfinite(found["chosen_boxes"]).all() and torch.isfinite(found["rejected_boxes"]).all()
    for overlap in ("mean", "covering"):
        masks = instance_masks(found["chosen_boxes"], found["judged"], found["conflicts"], 4, 4, 0.0, overlap)
        assert torch.isfinite(masks).all()


def collated(found: dict) -> None:
    batch = lawful(lambda: InstancePairCollator(8)([found]))
    if isinstance(batch, dict):
        trained(batch)


def any_instances(value) -> None:
    collated(row(instances=value))
    lawful(lambda: check_instances(row(instances=value)), "'r1'")
    stream = IterableDataset.from_generator(lambda: iter([row(instances=value)]))
    printable(lawful(lambda: check_dataset(stream, PAIR, PAIR[1:], 8)))


def printable(report) -> None:
    """A report has no control characters; a message is looked at by `lawful`."""
    for line in as_text(report) if isinstance(report, dict) else ():
        assert not CONTROL.search(line)


@few(80)
@given(instances)
@example([GOOD | {"label": ["dog"]}])  # a label that is no key of a dictionary stopped the check
@example([GOOD | {"chosen_box": [0, 0, 10**400, 8]}])  # an integer that is no float
@example([GOOD | {"chosen_box": [0, 0, 2**63, 2**64]}])
@example([GOOD | {"label": "\x1b[2J"}])
def test_any_instances(value):
    """Instances become boxes and masks, or the row and the place in it are named."""
    any_instances(value)


@pytest.mark.slow
@many(2000)
@given(instances)
def test_many_instances(value):
    """Instances become boxes and masks, or the row and the place in it are named."""
    any_instances(value)


@few(150)
@given(boxes, st.sampled_from([0, 1, 8, 30_000, math.inf]))
@example([0, 0, 10**400, 1], math.inf)
@example([0, 0, 1e39, 1], math.inf)
def test_any_box(box, side):
    """A box that passes has finite unit boxes, whatever is done with them."""
    found = lawful(lambda: check_box(box, side, side))
    if isinstance(found, list) and math.isfinite(side):
        unit = normalize_boxes(torch.tensor([found]), side, side)
        for turn in range(10):
            moved = crop_boxes(flip_boxes(orient_boxes(unit, turn)), (0.25, 0.25, 0.75, 0.75))
            assert ((moved >= 0) & (moved <= 1)).all()
            assert (moved[:, :2] <= moved[:, 2:]).all()
            assert torch.isfinite(denormalize_boxes(moved, side, side)).all()


@few(100)
@given(preferences)
@example("x\x1b[2J" * 10_000)
def test_any_preference(value):
    """A preference is one of three words, or is refused."""
    lawful(lambda: check_preference(value))


def test_ten_thousand_boxes():
    """A thousand instances of a row are masks within seconds; of more, the row is named: they would take gigabytes."""
    collated(row(instances=[GOOD] * 1000))
    assert "'r1' are 10,000; a row has at most 1,000" in lawful(
        lambda: InstancePairCollator(8)([row(instances=[GOOD] * 10_000)])
    )
    message = lawful(
        lambda: prepare_dataset(
            Dataset.from_list([row(instances=[GOOD]), row(instances=[GOOD] * 1001)]), "train_dataset", PAIR, PAIR[1:]
        )
    )
    assert "It is row 1 of `train_dataset`" in message


any_row = st.fixed_dictionaries(
    {},
    optional={
        "id": anything,
        "prompt": anything,
        "chosen": st.one_of(st.just(IMAGES["png"]), anything),
        "rejected": st.one_of(st.just(IMAGES["jpeg"]), anything),
        "image": st.one_of(st.just(IMAGES["png"]), anything),
        "instances": instances,
        "positive_attributes": st.one_of(st.lists(st.one_of(st.sampled_from(IDS), anything), max_size=5), anything),
        "negative_attributes": st.one_of(st.lists(st.one_of(st.sampled_from(IDS), anything), max_size=5), anything),
    },
)


def any_rows(rows: list) -> None:
    lawful(lambda: InstancePairCollator(8)(rows))
    lawful(lambda: AttributeCollator(8, criteria=PAINTING)(rows))
    for columns, images, criteria in ((PAIR, PAIR[1:], None), (("prompt", "image"), ("image",), PAINTING)):
        first = dict.fromkeys(["id", *columns])
        stream = IterableDataset.from_generator(lambda: iter([first, *rows]))  # noqa: B023
        printable(lawful(lambda: check_dataset(stream, columns, images, 8, criteria, True)))  # noqa: B023


@few(80)
@given(st.lists(any_row, min_size=1, max_size=3))
@example([{}])  # the rows of a stream need not have the columns of its first one
@example([{"id": b"1"}])
@example([row(positive_attributes=[IDS[0]] * 200_000, negative_attributes=[])])  # took hours
@example([row(image=IMAGES["png"], positive_attributes=["x" * 10**6], negative_attributes=[])])  # took minutes
def test_any_rows(rows):
    """Rows of a stream whose columns have no types, some of which are missing."""
    any_rows(rows)


@pytest.mark.slow
@many(1000)
@given(st.lists(any_row, min_size=1, max_size=3))
def test_many_rows(rows):
    """Rows of a stream whose columns have no types, some of which are missing."""
    any_rows(rows)


@few(150)
@given(texts)
@example("a" * 10**6)
@example("\ud800" * 10**5)
def test_any_prompt_and_id(text):
    """Every text is a prompt and an id, but for surrogates, and is the same afterwards."""
    for found in (lawful(lambda: row_prompt(row(prompt=text)), "'r1'"), lawful(lambda: row_id(row(id=text)))):
        assert found == text or any("\ud800" <= each <= "\udfff" for each in text)


@few(100)
@given(anything)
@example("x" * 10**6)
@example("soft\x1b[2J")
def test_any_attribute(value):
    """What is no attribute is refused, and the nearest one is named within a second."""
    lawful(lambda: PAINTING.find(value), seconds=5)
    lawful(lambda: check_attributes(row(positive_attributes=[value], negative_attributes=None), PAINTING), seconds=5)


@pytest.mark.parametrize("number", [*NASTY_NUMBERS, 10**5000], ids=range(len(NASTY_NUMBERS) + 1))
def test_nasty_numbers_as_coordinates(number):
    """Every odd number at every place of a box."""
    for place in range(4):
        box = [0, 0, 8, 8]
        box[place] = number
        collated(row(instances=[GOOD | {"chosen_box": box}]))


@pytest.mark.parametrize("text", NASTY_TEXTS, ids=range(len(NASTY_TEXTS)))
def test_nasty_texts_in_every_place(text):
    """Every odd text as id, prompt, label, preference and attribute: no message has its control characters."""
    collated(row(id=text, prompt=text, instances=[GOOD | {"label": text, "preference": text}]))
    any_rows([row(id=text, prompt=text, image=text, positive_attributes=[text], negative_attributes=[text])])
