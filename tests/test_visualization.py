# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion.visualization import BOX_COLORS, draw_boxes, image_grid, mask_overlay


NO_BOXES = torch.zeros(0, 4)


def picture(color: str = "red", width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def overlay(mask: torch.Tensor, boxes=NO_BOXES, labels=(), preferences=(), size: int = 32) -> np.ndarray:
    """The overlay over a light, slightly coloured image, as (H, W, 3) integers."""
    pixel_values = torch.tensor([0.6, 0.2, 0.4])[:, None, None].expand(3, size, size)
    return np.array(mask_overlay(pixel_values, mask, boxes, list(labels), list(preferences))).astype(int)


def cells(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Colours of the cells (rows, columns, 3), which must each have a single colour."""
    height, width, _ = image.shape
    blocks = image.reshape(rows, height // rows, columns, width // columns, 3).swapaxes(1, 2)
    assert (blocks == blocks[:, :, :1, :1]).all()
    return blocks[:, :, 0, 0]


@pytest.mark.parametrize(("row_labels", "height"), [(None, 248), (["a", "b", "c"], 320)])
def test_grid_size(row_labels, height):
    """
    2 columns of 64 are 8 + 2 * (64 + 8) = 152 wide; 3 rows are 24 + 8 + 3 * (64 + 8) = 248 high, and 3 * 24 higher with labels
    below the rows.
    """
    grid = image_grid([[picture(), picture()]] * 3, ["base", "trained"], row_labels, size=64)
    assert grid.size == (152, height)


def test_grid_places():
    """Each image is centred in its place."""
    rows = [[picture("red"), picture("blue")], [picture("lime", 64, 32), picture("black", 32, 64)]]
    grid = image_grid(rows, ["a", "b"], size=64)
    assert grid.getpixel((8, 32)) == grid.getpixel((71, 95)) == (255, 0, 0)
    assert grid.getpixel((80, 32)) == grid.getpixel((143, 95)) == (0, 0, 255)
    # 64 x 32 leaves 16 rows free above and below, 32 x 64 as many columns on either side
    assert [grid.getpixel((40, 104 + y)) for y in (15, 16, 47, 48)] == [
        (255,) * 3,
        (0, 255, 0),
        (0, 255, 0),
        (255,) * 3,
    ]
    assert [grid.getpixel((80 + x, 136)) for x in (15, 16, 47, 48)] == [(255,) * 3, (0,) * 3, (0,) * 3, (255,) * 3]


def test_small_images_are_enlarged_without_smoothing():
    """Two pixels become two areas of their own colours, with nothing in between."""
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    grid = np.array(image_grid([[image]], ["a"], size=64))[32:96, 8:72]
    colors = {tuple(color) for color in grid.reshape(-1, 3).tolist()}
    assert colors == {(255, 0, 0), (0, 0, 255), (255, 255, 255)}


@pytest.mark.parametrize("label", ["ok", "a label that is much wider than its column of the grid", "W" * 300])
def test_labels_fit(label):
    """Labels are drawn above their column and inside the grid, and end in dots if they are truncated."""
    grid = np.array(image_grid([[picture(), picture()]], [label, label], [label], size=64).convert("L"))
    header, footer = grid[:32], grid[96:]
    for left in (8, 80):
        assert header[:, left : left + 64].min() < 128
    for gap in (slice(0, 8), slice(72, 80), slice(144, None)):
        assert header[:, gap].min() == 255
    assert footer.min() < 128
    assert footer[:, 144:].min() == 255
    assert footer[-1].min() == 255


def test_mask_of_ones_leaves_the_image_alone():
    """If all weights are equal, the picture is the enlarged image: 0.6, 0.2, 0.4 are 204, 153 and 178."""
    image = overlay(torch.ones(8, 8))
    assert image.shape == (256, 256, 3)
    assert (image == [204, 153, 178]).all()


def test_cells_are_darkened_the_less_they_weigh():
    """Exactly the cells below the largest weight are darker, and lower weights are darker."""
    mask = torch.full((4, 4), 2.0)
    mask[1, 2], mask[3, 0], mask[0, 3] = 1.0, 0.0, 1.9
    colors = cells(overlay(mask), 4, 4)
    brightness = colors.sum(axis=-1)
    assert ((brightness < 204 + 153 + 178) == (mask < 2).numpy()).all()
    assert (colors[mask.numpy() == 2] == [204, 153, 178]).all()
    assert brightness[3, 0] < brightness[1, 2] < brightness[0, 3]
    # 192 / 255 of black for weight 0: a quarter of the image is left
    np.testing.assert_allclose(colors[3, 0], np.array([204, 153, 178]) * 63 / 255, atol=1)


def test_negative_cells_are_red():
    """Only cells with negative weights turn red: more red than before, less green and blue."""
    mask = torch.ones(4, 4)
    mask[2, 1], mask[0, 0] = -1.0, 0.0
    colors = cells(overlay(mask), 4, 4)
    red = (colors[..., 0] > 204) & (colors[..., 1] < 153) & (colors[..., 2] < 178)
    assert red.tolist() == (mask < 0).tolist()


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_masks_without_a_positive_weight(value):
    """A mask of zeros is dark everywhere, and a mask of negative weights is red everywhere."""
    colors = cells(overlay(torch.full((4, 4), value)), 4, 4)
    assert (colors[..., 1] < 153 / 2).all()
    assert (colors[..., 0] > 204).all() == (value < 0)


@pytest.mark.parametrize("preference", BOX_COLORS)
def test_boxes_are_outlined_in_the_colour_of_their_preference(preference):
    """The edge of a box has the colour of its preference, and nothing changes outside of the box."""
    image = overlay(torch.ones(8, 8), torch.tensor([[0.25, 0.5, 0.75, 1.0]]), ["cat"], [preference])
    changed = (image != [204, 153, 178]).any(axis=-1)
    rows, columns = changed.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (128, 255, 64, 191)
    for edge in (image[128, 64:192], image[255, 64:192], image[128:256, 64], image[128:256, 191]):
        assert (edge == BOX_COLORS[preference]).all()
    assert not changed[200:250, 100:180].any()


def test_boxes_of_area_0_are_not_drawn():
    """A box outside the crop is not drawn."""
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.2, 1.0, 0.8], [0.1, 0.0, 0.9, 0.0]])
    image = overlay(torch.ones(8, 8), boxes, ["a", "b", "c"], ["chosen", "rejected", "tie"])
    assert (image == [204, 153, 178]).all()


@pytest.mark.parametrize(("size", "expected"), [(32, 256), (64, 256), (128, 256), (256, 256), (512, 512)])
def test_overlay_is_large_enough_to_see(size, expected):
    """Small images are enlarged by a whole number to 256 pixels, large ones keep their size."""
    assert overlay(torch.ones(8, 8), size=size).shape == (expected, expected, 3)


def test_labels_of_boxes_stay_in_the_image_and_do_not_cover_each_other():
    """Three equal boxes in the right corner have three labels: white text in the box's colour, one below the other."""
    image = Image.new("RGB", (256, 256), "black")
    preferences = list(BOX_COLORS)
    draw_boxes(image, torch.tensor([[0.9, 0.0, 1.0, 0.1]] * 3), ["a label wider than its box"] * 3, preferences)
    pixels = np.array(image)
    rows = []
    for preference in preferences:
        filled = (pixels[:, :200] == BOX_COLORS[preference]).all(axis=-1).any(axis=1).nonzero()[0]
        rows.append((filled.min(), filled.max()))
    assert rows[0][1] <= rows[1][0] and rows[1][1] <= rows[2][0]


def test_a_label_of_any_length_or_alphabet_is_drawn():
    """Labels of one letter, of 500, of several lines and of none are drawn, and the image keeps its size."""
    for label in ("a", "W" * 500, "two\nlines", "", "雪\u202e🦅"):
        image = Image.new("RGB", (64, 48))
        draw_boxes(image, torch.tensor([[0.2, 0.2, 0.9, 0.9]]), [label], ["tie"])
        assert image.size == (64, 48) and np.array(image).any()


@pytest.mark.parametrize("preference", BOX_COLORS)
def test_the_outline_of_a_mask_is_drawn_in_the_place_of_its_box(preference):
    """The outermost pixels of a mask have the colour of its preference, and nothing else changes but its label's place."""
    disc = (np.arange(64)[:, None] - 40) ** 2 + (np.arange(64) - 40) ** 2 < 20**2
    image = Image.new("RGB", (256, 256), "white")
    draw_boxes(image, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), [""], [preference], [disc])
    colored = (np.array(image) == BOX_COLORS[preference]).all(axis=-1)
    large = disc.repeat(4, axis=0).repeat(4, axis=1)
    inner = np.pad(large, 2)
    core = np.logical_and.reduce([inner[y : y + 256, x : x + 256] for y in range(5) for x in range(5)])
    assert not colored[core & (np.arange(256)[:, None] > 120)].any()
    assert colored[large & ~core].mean() > 0.95  # but for the label
    assert not colored[120:][~large[120:]].any()


def test_masks_and_boxes_are_drawn_together():
    """Of three instances the first has a mask at the border, the second an empty one and no box, the third a box alone."""
    left = np.zeros((32, 32), bool)
    left[:, :8] = True
    image = Image.new("RGB", (256, 256), "white")
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]])
    draw_boxes(image, boxes, ["", "", ""], ["chosen", "tie", "rejected"], [left, np.zeros((32, 32), bool)])
    pixels = np.array(image)
    for edge in (pixels[100:, 0], pixels[100:, 63], pixels[255, :64]):
        assert (edge == BOX_COLORS["chosen"]).all()
    assert (pixels[128:, 255] == BOX_COLORS["rejected"]).all()
    assert not (pixels == BOX_COLORS["tie"]).all(axis=-1).any()
