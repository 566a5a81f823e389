# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Segmentation masks in the place of boxes, on the latent grid."""

import numpy as np
import pytest
import torch

from trl_diffusion.masks import instance_masks, instance_regions, pack_masks, unpacked


OVERLAPS = ["mean", "covering"]
GRIDS = [((8, 8), 8), ((5, 9), 4), ((3, 7), 16), ((4, 4), 1)]  # cells, and the pixels of a side of each
ODD_GRIDS = [((3, 7), 6), ((5, 3), 3)]  # as no VAE has them: boxes are rounded to 1/4096 of a cell


def random_boxes(number: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes `(number, 4)` whose edges are those of pixels, none of them empty."""
    x = np.sort([rng.choice(width + 1, 2, replace=False) for _ in range(number)], axis=1)
    y = np.sort([rng.choice(height + 1, 2, replace=False) for _ in range(number)], axis=1)
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)


def rectangles(boxes: np.ndarray, height: int, width: int) -> torch.Tensor:
    """The boxes `(N, 4)` as masks `(N, H, W)`."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def instances(number: int, grid: tuple[int, int], pixels: int, seed: int) -> tuple:
    """Two images: unit boxes, which instances are judged and in conflict, and the same boxes as masks."""
    (height, width), rng = (side * pixels for side in grid), np.random.default_rng(seed)
    boxes = [random_boxes(number, height, width, rng) for _ in range(2)]
    unit = torch.from_numpy(np.stack(boxes)).float() / torch.tensor([width, height, width, height])
    judged, conflicts = (torch.from_numpy(rng.random((2, number)) < share) for share in (0.8, 0.6))
    return unit, judged, conflicts, torch.stack([rectangles(of_image, height, width) for of_image in boxes])


def with_masks(boxes: torch.Tensor, masks: torch.Tensor, has_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of area 0 where an instance has a mask, and empty masks where it has none."""
    return boxes * ~has_mask[..., None], pack_masks(masks & has_mask[..., None, None])


@pytest.mark.parametrize("has_mask", [[True] * 4, [True, False, True, False], [False] * 4])
@pytest.mark.parametrize("w_neg", [0.0, -1.0])
@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize(("grid", "pixels"), GRIDS)
def test_a_mask_of_a_rectangle_weighs_as_its_box(grid, pixels, mask_overlap, w_neg, has_mask):
    """Boxes, their rectangles as masks, and both kinds in one row give one mask."""
    boxes, judged, conflicts, masks = instances(4, grid, pixels, seed=pixels)
    other_boxes, packed = with_masks(boxes, masks, torch.tensor([has_mask] * 2))
    settings = judged, conflicts, *grid, w_neg, mask_overlap
    torch.testing.assert_close(
        instance_masks(other_boxes, *settings, packed), instance_masks(boxes, *settings), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("has_mask", [[True] * 4, [True, False, True, False]])
@pytest.mark.parametrize(("grid", "pixels"), GRIDS)
def test_the_region_of_a_rectangle_is_that_of_its_box(grid, pixels, has_mask):
    """The regions of instances and of the background are the same for boxes and for their rectangles as masks."""
    boxes, judged, _, masks = instances(4, grid, pixels, seed=pixels)
    other_boxes, packed = with_masks(boxes, masks, torch.tensor([has_mask] * 2))
    torch.testing.assert_close(
        instance_regions(other_boxes, judged, *grid, packed),
        instance_regions(boxes, judged, *grid),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("w_neg", [0.0, 0.3, -1.0])
@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize(("grid", "pixels"), GRIDS + ODD_GRIDS)
def test_any_masks_equal_the_weights_of_the_pixels(grid, pixels, mask_overlap, w_neg):
    """The mask on the grid is the mean over the pixels of each cell of the weights of the instances, and then normalised."""
    height, width = (side * pixels for side in grid)
    rng = np.random.default_rng(pixels)
    masks = rng.random((3, height, width)) < 0.4
    judged, conflicts = np.array([True, True, False]), np.array([True, False, True])
    expected = np.ones((height, width))
    for y in range(height):
        for x in range(width):
            weights = [
                w_neg if inside and conflict else 1.0
                for inside, is_judged, conflict in zip(masks[:, y, x], judged, conflicts)
                if is_judged and (inside or mask_overlap == "mean")
            ]
            expected[y, x] = np.mean(weights) if weights else 1.0
    expected = expected.reshape(grid[0], pixels, grid[1], pixels).mean(axis=(1, 3))
    expected = expected / np.abs(expected).mean()

    packed = pack_masks(torch.from_numpy(masks)[None])
    boxes, flags = torch.zeros(1, 3, 4), (torch.from_numpy(judged)[None], torch.from_numpy(conflicts)[None])
    result = instance_masks(boxes, *flags, *grid, w_neg, mask_overlap, packed)[0]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("grid", "pixels"), GRIDS + ODD_GRIDS)
def test_regions_of_any_masks_are_shares_of_pixels(grid, pixels):
    """A region is the share of the pixels of each cell in its mask, the background the share of those in none that counts."""
    height, width = (side * pixels for side in grid)
    masks = torch.from_numpy(np.random.default_rng(0).random((1, 3, height, width)) < 0.3)
    judged = torch.tensor([[True, False, True]])
    expected = torch.cat([masks & judged[..., None, None], ~(masks[:, :1] | masks[:, 2:])], dim=1).double()
    expected = expected.reshape(1, 4, grid[0], pixels, grid[1], pixels).mean(dim=(3, 5))
    result = instance_regions(torch.zeros(1, 3, 4), judged, *grid, pack_masks(masks))
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)


def test_boxes_between_pixels_stay_exact_beside_a_mask():
    """A box over 3/8 of a cell of two pixels, in conflict, and a mask of the other pixel: 5/8 of the first cell weighs 1."""
    boxes = torch.tensor([[[0.0, 0.0, 3 / 16, 1.0], [0.0] * 4]])
    masks = torch.tensor([[False, False, True, False]]).expand(1, 2, 2, 4) & torch.tensor([False, True])[:, None, None]
    flags = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    result = instance_masks(boxes, *flags, 1, 2, 0.0, "covering", pack_masks(masks))
    torch.testing.assert_close(result[0, 0], torch.tensor([5 / 8, 1.0]) / (13 / 16))


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_a_conflict_over_all_pixels_gives_zeros(mask_overlap):
    """A conflict whose mask is the whole image, with w_neg 0, teaches nothing, also where pixels do not divide the cells in two."""
    for grid, pixels in GRIDS + ODD_GRIDS:
        whole = torch.ones(1, 1, grid[0] * pixels, grid[1] * pixels, dtype=torch.bool)
        flag = torch.ones(1, 1, dtype=torch.bool)
        assert (
            instance_masks(torch.zeros(1, 1, 4), flag, flag, *grid, 0.0, mask_overlap, pack_masks(whole)).eq(0).all()
        )


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_images_with_fewer_masks_than_instances(mask_overlap):
    """Masks belong to the first instances; what has neither a box nor a mask covers nothing, but counts in the mean."""
    left = torch.zeros(1, 1, 8, 16, dtype=torch.bool)
    left[..., :8] = True
    judged, conflicts = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    result = instance_masks(torch.zeros(1, 2, 4), judged, conflicts, 1, 2, 0.0, mask_overlap, pack_masks(left))
    expected = {"mean": [2 / 3, 4 / 3], "covering": [0.0, 2.0]}[mask_overlap]
    torch.testing.assert_close(result.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 30])
def test_packing_loses_nothing(width):
    """Unpacked masks are those that were packed, in an eighth of the bytes, also where a row is no whole number of them."""
    masks = torch.from_numpy(np.random.default_rng(width).random((2, 3, 5, width)) < 0.5)
    packed = pack_masks(masks)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 5, -(-width // 8))
    assert torch.equal(unpacked(packed, 5, width), masks)


def test_masks_of_another_shape_are_refused():
    """Masks of an upright image do not fit the grid of a square one."""
    flag = torch.ones(1, 1, dtype=torch.bool)
    masks = pack_masks(torch.ones(1, 1, 64, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match="The masks have 64 rows of 4 bytes, .* of 8 x 8 cells"):
        instance_masks(torch.zeros(1, 1, 4), flag, flag, 8, 8, masks=masks)
