# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""JPEG files that are much larger than needed, decoded at a fraction of their size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.images import open_image, open_reduced
from trl_diffusion.data.transforms import TrainingImage, prepare_image


SIZE = (16, 16)  # of the training image; the stored ones are a little more than 8 and 16 times as large


def picture(width: int, height: int) -> Image.Image:
    """Smooth shades of moderate colours, and noise in single pixels, as a photograph has."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 192, (height // 8 + 1, width // 8 + 1, 1))
    coarse = Image.fromarray((grey + rng.integers(0, 64, (*grey.shape[:2], 3))).astype(np.uint8))
    shades = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((shades + rng.integers(-16, 17, (height, width, 1))).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG", orientation: int = 1, **settings) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif, **settings)
    return buffer.getvalue()


def prepare(image: Image.Image, stored_size: tuple[int, int] | None = None, **settings) -> TrainingImage:
    boxes = torch.tensor([[10.0, 20.0, 100.0, 70.0]])
    return prepare_image(image, boxes, SIZE, torch.Generator().manual_seed(3), stored_size=stored_size, **settings)


KINDS = {
    "plain": (encode(picture(171, 145), quality=90), 2),
    "16 times": (encode(picture(290, 261), quality=90), 4),
    "progressive": (encode(picture(171, 145), quality=90, progressive=True), 2),
    "without subsampling": (encode(picture(171, 145), quality=90, subsampling=0), 2),
    "grey": (encode(picture(171, 145).convert("L"), quality=90), 2),
    "CMYK": (encode(picture(171, 145).convert("CMYK"), quality=90), 2),
    **{f"orientation {turn}": (encode(picture(171, 145), quality=90, orientation=turn), 2) for turn in range(2, 9)},
    "orientation 6, 16 times": (encode(picture(290, 261), quality=90, orientation=6), 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_stays_within_rounding(kind):
    """At least four times the sides that are needed are decoded: on average within 0.7 of 255, nowhere more than 8 apart."""
    data, fraction = KINDS[kind]
    stored = open_image(data)
    image, stored_size = open_reduced(data, SIZE)
    assert stored_size == stored.size
    assert image.size == tuple(-(-side // fraction) for side in stored.size)
    assert min(image.size) >= 4 * SIZE[0]
    for settings in ({}, {"center_crop": False, "random_flip": True}):
        full, reduced = prepare(stored, **settings), prepare(image, stored_size, **settings)
        difference = (full.pixels.int() - reduced.pixels.int()).abs()
        assert difference.float().mean() < 0.7 and difference.max() <= 8
        assert torch.equal(full.boxes, reduced.boxes)
        assert full[2:] == reduced[2:], "original size and crop are those of the stored image"


@pytest.mark.parametrize("data", [encode(picture(127, 180)), encode(picture(171, 145), "PNG")], ids=["small", "png"])
def test_everything_else_is_decoded_in_full(data):
    """Sides of less than eight times the need, and other formats: pixel for pixel as before."""
    image, stored_size = open_reduced(data, SIZE)
    assert image.size == stored_size == open_image(data).size
    assert torch.equal(prepare(image, stored_size).pixels, prepare(open_image(data)).pixels)


def test_an_image_of_the_user_keeps_its_size():
    """An image that was opened but not loaded yet is not reduced: it is the user's, and the next epoch's."""
    image = Image.open(io.BytesIO(KINDS["plain"][0]))
    assert open_reduced(image, SIZE) == (image, (171, 145))
    assert image.size == (171, 145)


def test_a_broken_file_is_the_same_mistake():
    """A file that is cut off is refused with the same words, reduced or not."""
    data = KINDS["plain"][0]
    for broken in (data[: len(data) // 2], data[:30], b"", b"no image"):
        messages = []
        for read in (open_image, lambda value: open_reduced(value, SIZE)):
            with pytest.raises(ValueError) as error:
                read(broken)
            messages.append(str(error.value).split(" at 0x")[0])
        assert messages[0] == messages[1]


@pytest.mark.parametrize("value", ["bytes", "path", "column"])
def test_a_collator_reduces(value, tmp_path, monkeypatch):
    """The collator decodes a fraction, and checks and moves boxes in pixels of the stored image."""
    data, _ = KINDS["orientation 6, 16 times"]
    (tmp_path / "image.jpg").write_bytes(data)
    values = {"bytes": data, "path": str(tmp_path / "image.jpg"), "column": {"bytes": data, "path": None}}
    instance = {"label": "x", "chosen_box": [100, 50, 289, 260], "rejected_box": [0, 0, 1, 1], "preference": "tie"}
    row = {"id": "x", "prompt": "x", "chosen": values[value], "rejected": picture(20, 20), "instances": [instance]}
    sizes, load = [], Image.Image.transpose
    monkeypatch.setattr(
        Image.Image, "transpose", lambda image, *args: (sizes.append(image.size), load(image, *args))[1]
    )
    batch = InstancePairCollator(16)([row])
    assert sizes == [(73, 66)]
    assert batch["chosen_original_sizes"].tolist() == [[290, 261]]
    # (x, y) to (261 - y, x) and then to 16 / 261 of it: the crop starts one row of 18 below the top
    expected = torch.tensor([1, 100, 211, 289]) / torch.tensor([261, 290, 261, 290])
    expected = (expected * torch.tensor([16, 18, 16, 18]) - torch.tensor([0, 1, 0, 1])) / 16
    torch.testing.assert_close(batch["chosen_boxes"][0, 0], expected.clamp(0, 1))
