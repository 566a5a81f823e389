# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from trl_diffusion.boxes import flip_boxes
from trl_diffusion.data.formats import open_image
from trl_diffusion.data.transforms import TrainingImage, normalize_pixels, prepare_image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prepare(image: Image.Image, boxes, resolution: int, seed: int = 0, **kwargs) -> TrainingImage:
    boxes = torch.tensor(boxes).reshape(-1, 4)
    return prepare_image(image, boxes, (resolution, resolution), generator(seed), **kwargs)


def painted(width: int, height: int, box: list[int], orientation: int = 1) -> Image.Image:
    """A white rectangle on black, saved and opened again, with an EXIF orientation if it is not 1."""
    image = Image.new("RGB", (width, height))
    image.paste("white", tuple(box))
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return open_image(buffer.getvalue())


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def white_box(pixel_values: torch.Tensor) -> list[int]:
    """Bounding box of the white pixels."""
    rows, columns = (pixel_values > 0).all(dim=0).nonzero().unbind(dim=1)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def intersection_over_union(a: list[float], b: list[float]) -> float:
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    intersection = max(sides[0], 0) * max(sides[1], 0)
    return intersection / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - intersection)


def assert_box_holds_the_paint(result: TrainingImage):
    """The white region is filled, lies in the box to half a pixel, and covers at least 0.9 of it."""
    resolution = result.pixel_values.shape[-1]
    box, white = (result.boxes[0] * resolution).tolist(), white_box(result.pixel_values)
    assert (result.pixel_values > 0).all(dim=0).sum() == (white[2] - white[0]) * (white[3] - white[1])
    assert white[0] >= box[0] - 0.5 and white[1] >= box[1] - 0.5
    assert white[2] <= box[2] + 0.5 and white[3] <= box[3] + 0.5
    assert intersection_over_union(box, white) >= 0.9


SIZES = {"landscape": (200, 128), "portrait": (130, 300), "square": (128, 128), "enlarged": (90, 64)}
BOXES = {
    "landscape": [60, 20, 110, 90],
    "portrait": [20, 110, 80, 190],
    "square": [8, 30, 60, 120],
    "enlarged": [25, 10, 50, 50],
}


@pytest.mark.parametrize("shape", SIZES)
def test_box_holds_the_paint(shape):
    """After resize and centre crop, the box still encloses the rectangle that it enclosed."""
    assert_box_holds_the_paint(prepare(painted(*SIZES[shape], BOXES[shape]), BOXES[shape], 128))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_box_holds_the_paint_of_a_turned_image(orientation):
    """Boxes in stored pixels follow each of the eight EXIF orientations."""
    image = painted(200, 128, BOXES["landscape"], orientation)
    assert image.getexif().get(0x0112, 1) == orientation
    result = prepare(image, BOXES["landscape"], 128)
    assert_box_holds_the_paint(result)
    assert result.original_size == ((128, 200) if orientation <= 4 else (200, 128))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_of_a_turned_image(orientation):
    """The tensor shows the image as PIL's `exif_transpose` does."""
    image = noise_image(24, 16)
    image.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(image)
    left, top = (upright.width - 16) // 2, (upright.height - 16) // 2
    expected = as_tensor(upright.crop((left, top, left + 16, top + 16)))
    torch.testing.assert_close(prepare(image, [], 16).pixel_values, expected)


@pytest.mark.parametrize("shape", ["landscape", "portrait", "enlarged"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_box_holds_the_paint_of_random_crops_and_flips(orientation, shape):
    """Under random crops and flips of a turned image the box goes along, in both directions."""
    box, sides = BOXES[shape], set()
    for seed in range(12):
        image = painted(*SIZES[shape], box, orientation)
        result = prepare(image, box, 128, seed, center_crop=False, random_flip=True)
        if (result.boxes[0, 2:] - result.boxes[0, :2]).min() > 0.2:  # enough of it is left to measure
            assert_box_holds_the_paint(result)
            sides.add(result.crop_top_left)
    assert len(sides) > 3


def test_flip_moves_the_paint_and_the_box():
    """A rectangle on the left is on the right in the flipped half of the draws, and so is its box."""
    centers = []
    for seed in range(16):
        result = prepare(painted(128, 128, [8, 30, 60, 120]), [8, 30, 60, 120], 128, seed, random_flip=True)
        assert_box_holds_the_paint(result)
        centers.append(round((result.boxes[0, [0, 2]].mean() * 128).item()))
    assert set(centers) == {34, 94}


def test_half_of_the_images_are_flipped():
    """Of 200 draws 100 are flipped, to five standard deviations; without `random_flip` none is."""
    image = painted(8, 8, [0, 0, 4, 8])
    draws = [prepare(image, [], 8, seed, random_flip=True).pixel_values[0, 0, 0] < 0 for seed in range(200)]
    assert abs(sum(draws) - 100) < 5 * (200 * 0.25) ** 0.5
    assert not any(prepare(image, [], 8, seed).pixel_values[0, 0, 0] < 0 for seed in range(50))


def test_center_crop_by_hand():
    """
    60 x 40 at resolution 20 is resized to 30 x 20 and loses 5 columns on either side. [6, 8, 30, 32] becomes [3, 4, 15, 16],
    then [-2 cut to 0, 4, 10, 16] of 20.
    """
    result = prepare(noise_image(60, 40), [6, 8, 30, 32], 20)
    assert result.pixel_values.shape == (3, 20, 20)
    assert result.original_size == (40, 60)
    assert result.crop_top_left == (0, 5)
    torch.testing.assert_close(result.boxes, torch.tensor([[0.0, 0.2, 0.5, 0.8]]))


@pytest.mark.parametrize(("size", "crop_top_left"), [((30, 20), (0, 5)), ((31, 20), (0, 5)), ((20, 41), (10, 0))])
def test_center_crop_cuts_the_middle(size, crop_top_left):
    """Without any resizing, the tensor is the middle of the image, in [-1, 1]."""
    image = noise_image(*size)
    result = prepare(image, [], 20)
    assert result.crop_top_left == crop_top_left
    top, left = crop_top_left
    torch.testing.assert_close(result.pixel_values, as_tensor(image)[:, top : top + 20, left : left + 20])
    assert result.pixel_values.dtype == torch.float32


@pytest.mark.parametrize("size", [(24, 20), (20, 24)])
@pytest.mark.parametrize("random_flip", [False, True])
def test_crop_top_left_is_where_the_crop_was_made(random_flip, size):
    """Every offset of a random crop occurs, and the tensor is the (flipped) image from the reported offset on."""
    image = noise_image(*size)
    pictures = [as_tensor(image), as_tensor(image).flip(-1)]
    seen = set()
    for seed in range(80):
        result = prepare(image, [], 20, seed, center_crop=False, random_flip=random_flip)
        top, left = result.crop_top_left
        crops = [picture[:, top : top + 20, left : left + 20] for picture in pictures]
        matches = [torch.allclose(result.pixel_values, crop, atol=1e-6) for crop in crops]
        assert sum(matches) == 1
        seen.add((max(top, left), matches.index(True)))
    assert seen == {(offset, flip) for offset in range(5) for flip in range(1 + random_flip)}


def test_flipped_image_with_flipped_boxes():
    """Mirroring a stored image and its box mirrors the tensor and the unit box."""
    image, box = noise_image(60, 40), [6, 8, 30, 32]
    result = prepare(image, box, 20)
    mirrored = prepare(ImageOps.mirror(image), [30, 8, 54, 32], 20)
    torch.testing.assert_close(mirrored.pixel_values, result.pixel_values.flip(-1), atol=2 / 255, rtol=0)
    torch.testing.assert_close(mirrored.boxes, flip_boxes(result.boxes))


@pytest.mark.parametrize(("size", "box"), [((300, 100), [0, 10, 90, 90]), ((100, 300), [10, 210, 90, 300])])
def test_box_that_is_cut_away(size, box):
    """A rectangle that the crop cuts away leaves no paint and a box of area 0."""
    result = prepare(painted(*size, box), box, 64)
    assert (result.pixel_values < 0).all()
    assert (result.boxes[0, 2:] - result.boxes[0, :2]).prod() == 0


@pytest.mark.parametrize("size", [(7, 5), (333, 217), (217, 333), (1000, 31), (49, 80), (16, 16)])
def test_any_size_gives_the_resolution(size):
    """Images of every size, smaller or larger, come out at the resolution (49 / 49 * 16 is 15.99), and the box of all of it covers all."""
    result = prepare(noise_image(*size), [0, 0, *size], 16)
    assert result.pixel_values.shape == (3, 16, 16)
    assert result.pixel_values.abs().max() <= 1
    assert result.original_size == (size[1], size[0])
    torch.testing.assert_close(result.boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_mode_gives_three_channels(mode):
    """Grey, palette, transparent and print images become RGB."""
    image = Image.new(mode, (20, 16)) if mode == "I;16" else noise_image(20, 16).convert(mode)
    assert prepare(image, [], 16).pixel_values.shape == (3, 16, 16)


def test_image_of_the_caller_is_left_alone():
    """The image and the boxes that were passed in are not changed."""
    image, boxes = noise_image(24, 16), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    before = image.copy()
    prepare_image(image, boxes, (8, 8), generator(), center_crop=False, random_flip=True)
    assert image.tobytes() == before.tobytes()
    assert boxes.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_same_generator_same_result():
    """Crop and flip are decided by the generator alone."""
    image = noise_image(40, 16)
    draws = [prepare(image, [], 16, seed, center_crop=False, random_flip=True) for seed in (3, 3, 4)]
    assert torch.equal(draws[0].pixel_values, draws[1].pixel_values)
    assert not torch.equal(draws[0].pixel_values, draws[2].pixel_values)


def test_bytes_become_what_diffusers_makes_of_them():
    """All 256 values, bit for bit; floating point numbers stay as they are."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    normalized = normalize_pixels(pixels)
    assert normalized.dtype == torch.float32
    assert torch.equal(normalized, VaeImageProcessor().preprocess(image)[0])
    for values in (normalized, normalized.half(), normalized.double()):
        assert normalize_pixels(values) is values


def test_a_training_image_is_bytes_in_the_layout_of_a_batch():
    """uint8, channels first and contiguous, whatever was cropped, turned or flipped."""
    for orientation in (1, 6):
        image = painted(40, 24, [4, 4, 20, 20], orientation)
        pixels = prepare(image, [], 16, random_flip=True).pixels
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16) and pixels.is_contiguous()
