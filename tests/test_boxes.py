# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from PIL import Image, ImageOps

from trl_diffusion.boxes import crop_boxes, denormalize_boxes, flip_boxes, normalize_boxes, orient_boxes


WIDTH, HEIGHT = 30, 20
BOX = [3, 2, 11, 8]  # off-centre and not square, so that no orientation maps it onto itself


def painted(box: list[int], orientation: int = 1) -> Image.Image:
    image = Image.new("L", (WIDTH, HEIGHT))
    image.paste(255, tuple(box))
    image.getexif()[0x0112] = orientation
    return image


def unit(box: list[float], width: int = WIDTH, height: int = HEIGHT) -> torch.Tensor:
    return normalize_boxes(torch.tensor(box), width, height)


def random_boxes(num: int, seed: int = 0) -> torch.Tensor:
    corners = torch.rand(num, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    return corners.flatten(1)


def test_normalize():
    """Pixels are divided by the width along x and by the height along y: [3, 2, 11, 8] of 30 x 20."""
    torch.testing.assert_close(unit(BOX), torch.tensor([0.1, 0.1, 11 / 30, 0.4]))


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
def test_denormalize_inverts_normalize(shape):
    """Boxes go to the unit square and back unchanged, whatever the leading dimensions."""
    boxes = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 20
    torch.testing.assert_close(denormalize_boxes(normalize_boxes(boxes, 30, 20), 30, 20), boxes)


def test_integer_boxes_become_float32():
    """Boxes given as integers are not divided as integers."""
    boxes = normalize_boxes(torch.tensor([[1, 1, 2, 2]]), 4, 4)
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[0.25, 0.25, 0.5, 0.5]]


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_orient_follows_exif_transpose(orientation):
    """A box moves like its pixels under PIL's `exif_transpose`; unknown tags change nothing."""
    upright = ImageOps.exif_transpose(painted(BOX, orientation))
    boxes = denormalize_boxes(orient_boxes(unit(BOX), orientation), *upright.size)
    assert boxes.round().int().tolist() == list(upright.getbbox())


def test_every_orientation_is_different():
    """The eight orientations move the box to eight places."""
    places = {tuple(round(x, 4) for x in orient_boxes(unit(BOX), orientation).tolist()) for orientation in range(1, 9)}
    assert len(places) == 8


def test_flip_follows_the_mirrored_image():
    """A flipped box encloses the same pixels in the mirrored image."""
    boxes = denormalize_boxes(flip_boxes(unit(BOX)), WIDTH, HEIGHT)
    assert boxes.round().int().tolist() == list(ImageOps.mirror(painted(BOX)).getbbox())


def test_flip_twice_is_the_identity():
    """Two flips cancel, and a flipped box is still ordered."""
    boxes = random_boxes(20)
    flipped = flip_boxes(boxes)
    assert (flipped[:, 2:] >= flipped[:, :2]).all()
    torch.testing.assert_close(flip_boxes(flipped), boxes)


@pytest.mark.parametrize("window", [(0, 0, 20, 20), (5, 0, 25, 20), (2, 1, 12, 9)])
def test_crop_follows_the_cropped_image(window):
    """A cropped box encloses the same pixels in the cropped image."""
    left, top, right, bottom = window
    boxes = crop_boxes(unit(BOX), (left / WIDTH, top / HEIGHT, right / WIDTH, bottom / HEIGHT))
    boxes = denormalize_boxes(boxes, right - left, bottom - top)
    assert boxes.round().int().tolist() == list(painted(BOX).crop(window).getbbox())


def test_crop_by_hand():
    """[0.2, 0.2, 0.6, 0.9] in the window [0.4, 0, 0.9, 0.8] is [0 (clipped), 0.25, 0.4, 1 (clipped)]."""
    boxes = crop_boxes(torch.tensor([[0.2, 0.2, 0.6, 0.9]]), (0.4, 0.0, 0.9, 0.8))
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0.25, 0.4, 1.0]]))


def test_crop_to_the_whole_image_changes_nothing():
    """The window of the whole image is the identity."""
    boxes = random_boxes(20)
    torch.testing.assert_close(crop_boxes(boxes, (0.0, 0.0, 1.0, 1.0)), boxes)


def test_crop_can_be_undone_inside_the_window():
    """A box inside the window comes back by scaling with the window's extent and adding its origin."""
    window = (0.25, 0.125, 0.75, 0.875)
    boxes = torch.tensor([[0.3, 0.2, 0.7, 0.8], [0.25, 0.125, 0.75, 0.875]])
    cropped = crop_boxes(boxes, window)
    restored = cropped * torch.tensor([0.5, 0.75, 0.5, 0.75]) + torch.tensor([0.25, 0.125, 0.25, 0.125])
    torch.testing.assert_close(restored, boxes)


@pytest.mark.parametrize(
    "box", [[0.0, 0.2, 0.3, 0.8], [0.8, 0.2, 1.0, 0.8], [0.4, 0.0, 0.6, 0.1], [0.4, 0.9, 0.6, 1.0]]
)
def test_a_box_outside_of_the_window_has_area_0(box):
    """A box outside the crop, on any side, has area 0 and lies inside the crop."""
    x_min, y_min, x_max, y_max = crop_boxes(torch.tensor(box), (0.35, 0.15, 0.75, 0.85)).tolist()
    assert (x_max - x_min) * (y_max - y_min) == 0
    assert 0 <= x_min <= x_max <= 1
    assert 0 <= y_min <= y_max <= 1


def test_cropping_the_flipped_image_equals_flipping_the_crop():
    """Crop and flip commute when the window is mirrored with the image."""
    boxes = random_boxes(20)
    flipped_then_cropped = crop_boxes(flip_boxes(boxes), (0.5, 0.25, 0.875, 1.0))
    cropped_then_flipped = flip_boxes(crop_boxes(boxes, (0.125, 0.25, 0.5, 1.0)))
    torch.testing.assert_close(flipped_then_cropped, cropped_then_flipped)
