# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io
import math

import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests import tiny
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import prepare_dataset


def row(id: str = "row-0", **changes) -> dict:
    return {"id": id, "prompt": "a cat", "chosen": tiny.image(0), "rejected": tiny.image(1)} | changes


def instance(**changes) -> dict:
    boxes = {"chosen_box": [10, 8, 30, 24], "rejected_box": [4, 0, 36, 32]}
    return {"label": "cat", "preference": "rejected"} | boxes | changes


def half(width: int = 12, height: int = 8) -> Image.Image:
    """Black, its left third white: tells by its columns whether it was flipped and where it was cropped."""
    image = Image.new("RGB", (width, height))
    image.paste("white", (0, 0, width // 3, height))
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())
    return buffer.getvalue()


def broken_png() -> bytes:
    """A PNG of several chunks whose second chunk of pixels has lost its name: PIL raises a SyntaxError for it."""
    data = png(tiny.image(0, 200, 200))
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    return data[:second] + bytes(4) + data[second + 4 :]


def test_batch_by_hand():
    """
    40 x 32 images at resolution 32 lose 4 columns on either side: [10, 8, 30, 24] becomes [6, 8, 26, 24] / 32 and
    [4, 0, 36, 32] becomes the whole image.
    """
    batch = InstancePairCollator(32)([row(instances=[instance()])])
    assert batch["chosen_pixel_values"].shape == batch["rejected_pixel_values"].shape == (1, 3, 32, 32)
    assert batch["chosen_pixel_values"].dtype == torch.uint8 and batch["chosen_pixel_values"].is_contiguous()
    torch.testing.assert_close(batch["chosen_boxes"], torch.tensor([[[6 / 32, 8 / 32, 26 / 32, 24 / 32]]]))
    torch.testing.assert_close(batch["rejected_boxes"], torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    assert batch["chosen_original_sizes"].tolist() == batch["rejected_original_sizes"].tolist() == [[32, 40]]
    assert batch["chosen_crop_top_lefts"].tolist() == batch["rejected_crop_top_lefts"].tolist() == [[0, 4]]
    assert batch["id"] == ["row-0"]
    assert batch["prompt"] == ["a cat"]
    crop = torch.tensor(list(tiny.image(0).crop((4, 0, 36, 32)).tobytes())).reshape(32, 32, 3).permute(2, 0, 1)
    assert torch.equal(batch["chosen_pixel_values"][0], crop.byte())


def test_padding():
    """Rows with fewer instances are padded with boxes of zeros that are neither judged nor in conflict."""
    rows = [
        row("0", instances=[instance(), instance(preference="chosen"), instance(preference="tie")]),
        row("1"),
        row("2", instances=[]),
        row("3", instances=[instance()]),
    ]
    batch = InstancePairCollator(32)(rows)
    assert batch["judged"].tolist() == [[True, True, False], [False] * 3, [False] * 3, [True, False, False]]
    assert batch["conflicts"].tolist() == [[True, False, False], [False] * 3, [False] * 3, [True, False, False]]
    assert batch["judged"].dtype == batch["conflicts"].dtype == torch.bool
    for column in ("chosen", "rejected"):
        boxes = batch[f"{column}_boxes"]
        assert boxes.shape == (4, 3, 4)
        assert boxes.any(dim=-1).tolist() == [[True] * 3, [False] * 3, [False] * 3, [True, False, False]]


def test_same_row_same_augmentation_in_every_batch():
    """A row's crops and flips depend on its id alone: not on its neighbours, its place, or torch's global generator."""
    collator = InstancePairCollator(8, center_crop=False, random_flip=True)
    rows = [row(str(index), instances=[instance()]) for index in range(6)]
    together = collator(rows)
    for index in (0, 3, 5):
        torch.manual_seed(index)
        for batch, place in ((collator([rows[index]]), 0), (collator([rows[5], rows[index]]), 1)):
            for key, value in together.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(batch[key][place], value[index]), key
    assert len({tuple(crop) for crop in together["chosen_crop_top_lefts"].tolist()}) > 1


def test_augmentation_leaves_the_global_generator_alone():
    """Collating draws nothing from torch's global generator."""
    state = torch.get_rng_state()
    InstancePairCollator(8, center_crop=False, random_flip=True)([row()])
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_changes_the_augmentation():
    """Another seed draws other crops."""
    rows = [row(str(index), chosen=half()) for index in range(16)]
    crops = [InstancePairCollator(8, False, seed=seed)(rows)["chosen_crop_top_lefts"].tolist() for seed in (0, 1)]
    assert crops[0] != crops[1]


def test_each_image_of_a_pair_has_its_own_flip():
    """All four combinations of flips occur, each about once in four pairs: of 160, 40 +- 5 standard deviations."""
    rows = [row(str(index), chosen=half(8), rejected=half(8)) for index in range(160)]
    batch = InstancePairCollator(8, random_flip=True)(rows)
    flipped = [(batch[f"{column}_pixel_values"][:, 0, 0, 0] < 128).tolist() for column in ("chosen", "rejected")]
    pairs = list(zip(*flipped))
    for combination in [(False, False), (False, True), (True, False), (True, True)]:
        assert abs(pairs.count(combination) - 40) < 5 * (160 * 0.25 * 0.75) ** 0.5


def test_each_image_of_a_pair_has_its_own_crop():
    """The crops of chosen and rejected are independent: all 25 pairs of the 5 offsets occur, and each moves its own image."""
    rows = [row(str(index), chosen=half(), rejected=half()) for index in range(250)]
    batch = InstancePairCollator(8, center_crop=False)(rows)
    lefts = []
    for column in ("chosen", "rejected"):
        lefts.append(batch[f"{column}_crop_top_lefts"][:, 1].tolist())
        white_columns = (batch[f"{column}_pixel_values"][:, 0, 0] >= 128).sum(dim=1)
        assert white_columns.tolist() == [max(0, 4 - left) for left in lefts[-1]]
    assert len(set(zip(*lefts))) == 25


def test_boxes_follow_the_flip_of_their_own_image():
    """Each box covers the white third of its own image, wherever its own flip put it."""
    box = [0, 0, 4, 12]
    instances = [instance(chosen_box=box, rejected_box=box)]
    rows = [row(str(index), chosen=half(12, 12), rejected=half(12, 12), instances=instances) for index in range(20)]
    batch = InstancePairCollator(12, random_flip=True)(rows)
    for column in ("chosen", "rejected"):
        for pixel_values, (x_min, _, x_max, _) in zip(
            batch[f"{column}_pixel_values"], batch[f"{column}_boxes"][:, 0].tolist()
        ):
            white = (pixel_values[0, 0] >= 128).nonzero().flatten().tolist()
            assert white == list(range(round(12 * x_min), round(12 * x_max)))
            assert len(white) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_exif_orientation_survives_a_dataset(stream):
    """An image stored on its side in a dataset comes upright, and its box, in stored pixels, with it."""
    image = Image.new("RGB", (24, 16))
    image.paste("white", (4, 0, 12, 6))
    image.getexif()[0x0112] = 6
    rows = [row(chosen={"bytes": png(image), "path": None}, instances=[instance(chosen_box=[4, 0, 12, 6])])]
    dataset = Dataset.from_list(rows, features=tiny.pairs(1).features)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    columns = ("prompt", "chosen", "rejected")
    batch = InstancePairCollator(16)(list(prepare_dataset(dataset, "train_dataset", columns, columns[1:])))
    # Orientation 6 turns right: (x, y) to (16 - y, x). The box is [10, 4, 16, 12] of 16 x 24; 4 rows go at the top.
    assert batch["chosen_original_sizes"].tolist() == [[24, 16]]
    torch.testing.assert_close(batch["chosen_boxes"][0, 0] * 16, torch.tensor([10.0, 0.0, 16.0, 8.0]))
    white = (batch["chosen_pixel_values"][0, 0] >= 128).nonzero()
    assert white.min(dim=0).values.tolist() == [0, 10]
    assert white.max(dim=0).values.tolist() == [7, 15]


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "value",
    [
        b"not an image",
        {"bytes": b"\x89PNG\r\n\x1a\n", "path": None},
        {"bytes": png(tiny.image(0))[:-200], "path": None},
        broken_png(),
        {"bytes": None, "path": "no/such/file.png"},
        "no/such/file.png",
        None,
    ],
    ids=["garbage", "header", "truncated", "broken", "missing", "missing path", "none"],
)
def test_unreadable_image(value, column):
    """An image that cannot be read is a ValueError that names its row's id, its column and the way out."""
    with pytest.raises(ValueError, match=f"column `{column}` of the row with id 'row-7' cannot be read") as error:
        InstancePairCollator(16)([row(), row("row-7", **{column: value})])
    assert "dataset.filter" in str(error.value)


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([1, 2, 3], "four numbers"),
        ([1, 2, 3, 4, 5], "four numbers"),
        (None, "four numbers"),
        ([30, 2, 3, 4], "inverted or empty"),
        ([0, 0, 80, 64], "40 pixels wide and 32 high"),
        ([0.0, 0.0, math.nan, 4.0], "finite"),
    ],
)
def test_bad_box(box, reason, column):
    """A bad box is a ValueError that names its row, instance and column, and what is wrong with it."""
    rows = [row(), row("row-7", instances=[instance(), instance(**{f"{column}_box": box})])]
    with pytest.raises(ValueError, match=rf"`instances\[1\].{column}_box` of the row with id 'row-7'") as error:
        InstancePairCollator(16)(rows)
    assert reason in str(error.value)


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_boxes_are_checked_against_their_own_image(column):
    """Each box is checked against the size of its own image, as stored: a portrait beside a landscape."""
    rows = [row(chosen=tiny.image(0, 60, 20), rejected=tiny.image(1, 20, 60))]
    good = instance(chosen_box=[0, 0, 60, 20], rejected_box=[0, 0, 20, 60])
    InstancePairCollator(16)([rows[0] | {"instances": [good]}])
    swapped = good | {f"{column}_box": good["rejected_box" if column == "chosen" else "chosen_box"]}
    with pytest.raises(ValueError, match=f"{column}_box"):
        InstancePairCollator(16)([rows[0] | {"instances": [swapped]}])


@pytest.mark.parametrize("preference", ["better", 3, -1, None])
def test_bad_preference(preference):
    """An unknown preference is a ValueError that names its row, its instance and the names that there are."""
    rows = [row(), row("row-7", instances=[instance(preference=preference)])]
    with pytest.raises(ValueError, match=r"`instances\[0\].preference` of the row with id 'row-7'") as error:
        InstancePairCollator(16)(rows)
    assert "`chosen`, `rejected`, `tie`" in str(error.value)


@pytest.mark.parametrize("prompt", [None, 3, ["a cat"]])
def test_bad_prompt(prompt):
    """A prompt that is no string is a ValueError that names its row."""
    with pytest.raises(ValueError, match="`prompt` of the row with id 'row-7' must be a string"):
        InstancePairCollator(16)([row(), row("row-7", prompt=prompt)])
