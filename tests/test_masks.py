# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from trl_diffusion.boxes import crop_boxes, flip_boxes, normalize_boxes, orient_boxes
from trl_diffusion.masks import instance_masks, instance_regions, masked_area, normalize_masks


WHOLE = [0.0, 0.0, 1.0, 1.0]
LEFT = [0.0, 0.0, 0.5, 1.0]
TOP = [0.0, 0.0, 1.0, 0.5]
NOWHERE = [0.0, 0.0, 0.0, 0.0]
OVERLAPS = ["mean", "covering"]


def mask(boxes, conflicts, height, width, w_neg=0.0, mask_overlap="mean", judged=None) -> torch.Tensor:
    """The mask of one image; all its instances are judged unless told otherwise."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    conflicts = torch.tensor([conflicts], dtype=torch.bool)
    judged = torch.ones_like(conflicts) if judged is None else torch.tensor([judged], dtype=torch.bool)
    return instance_masks(boxes, judged, conflicts, height, width, w_neg, mask_overlap)[0]


def random_instances(num: int, height: int, width: int, seed: int):
    """Boxes with edges on pixels of an image, some of its instances in conflict and some tied."""
    rng = np.random.default_rng(seed)
    x = np.sort(rng.choice(width + 1, (num, 2)), axis=1)
    y = np.sort(rng.choice(height + 1, (num, 2)), axis=1)
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    return boxes, rng.random(num) < 0.8, rng.random(num) < 0.6


def pixel_mask(boxes, judged, conflicts, height, width, w_neg, mask_overlap) -> np.ndarray:
    """The paper's mask before normalisation, pixel by pixel, in float64."""
    result = np.ones((height, width))
    for row in range(height):
        for column in range(width):
            weights = []
            for (left, top, right, bottom), is_judged, is_conflict in zip(boxes, judged, conflicts):
                inside = left <= column < right and top <= row < bottom
                if is_judged and (inside or mask_overlap == "mean"):
                    weights.append(w_neg if inside and is_conflict else 1.0)
            if weights:
                result[row, column] = np.mean(weights)
    return result


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize(
    ("w_neg", "inside", "outside"),
    [
        (0.0, 0.0, 2.0),  # 0 and 1, mean 1/2
        (0.5, 2 / 3, 4 / 3),  # 1/2 and 1, mean 3/4
        (-1.0, -1.0, 1.0),  # -1 and 1, mean of the absolute values 1
        (-0.5, -2 / 3, 4 / 3),  # -1/2 and 1, mean of the absolute values 3/4
        (1.0, 1.0, 1.0),
    ],
)
def test_one_conflicting_box_by_hand(w_neg, inside, outside, mask_overlap):
    """One conflicting box over the left half weighs w_neg there and 1 elsewhere, over their mean absolute value."""
    expected = torch.tensor([inside, inside, outside, outside]).expand(2, 4)
    torch.testing.assert_close(mask([LEFT], [True], 2, 4, w_neg, mask_overlap), expected)


@pytest.mark.parametrize("w_neg", [0.0, 0.5, -0.5, -1.0])
@pytest.mark.parametrize("num_instances", [1, 2, 3, 5])
def test_mean_divides_by_all_instances(num_instances, w_neg):
    """With N instances of which one conflicts, its box weighs (N - 1 + w_neg) / N of what the rest weighs."""
    boxes, conflicts = [LEFT] * num_instances, [True] + [False] * (num_instances - 1)
    inside, outside = mask(boxes, conflicts, 2, 4, w_neg)[0, [0, 3]].tolist()
    assert inside / outside == pytest.approx((num_instances - 1 + w_neg) / num_instances, abs=1e-6)


def test_overlapping_conflicts_average():
    """
    Two conflicting boxes, left and top half, w_neg 0, N 2: both cover the top left cell (0 + 0) / 2, one the two beside
    it (0 + 1) / 2, none the last. The mean is (0 + 1/2 + 1/2 + 1) / 4 = 1/2, so the mask is 0, 1, 1, 2.
    """
    expected = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    torch.testing.assert_close(mask([LEFT, TOP], [True, True], 2, 2), expected)


def test_covering_averages_over_the_instances_that_cover():
    """
    Left half in conflict, left quarter not, w_neg 0: the first quarter averages to 1/2, the second holds the conflict alone
    and weighs 0, the rest is covered by none and weighs 1. The mean is 2.5 / 4, so the mask is 0.8, 0, 1.6, 1.6.
    """
    boxes = [LEFT, [0.0, 0.0, 0.25, 1.0]]
    expected = torch.tensor([[0.8, 0.0, 1.6, 1.6]])
    torch.testing.assert_close(mask(boxes, [True, False], 1, 4, mask_overlap="covering"), expected)


def test_covering_is_averaged_inside_a_cell():
    """
    A conflict over the left quarter and another instance everywhere, two cells, w_neg 0: half of the first cell weighs 1/2 and
    half of it 1, together 3/4; the second weighs 1. The mean is 7/8, so the mask is 6/7, 8/7.
    """
    boxes = [[0.0, 0.0, 0.25, 1.0], WHOLE]
    expected = torch.tensor([[6 / 7, 8 / 7]])
    torch.testing.assert_close(mask(boxes, [True, False], 1, 2, mask_overlap="covering"), expected)


@pytest.mark.parametrize(("mask_overlap", "rest"), [("mean", [1.0, 2.0]), ("covering", [0.0, 4.0])])
def test_the_overlaps_differ_where_one_instance_covers(mask_overlap, rest):
    """Where one of two conflicts covers a cell, "mean" weighs it (0 + 1) / 2 and "covering" weighs it 0."""
    result = mask([LEFT, TOP], [True, True], 2, 2, mask_overlap=mask_overlap)
    assert result.flatten().tolist() == [0.0, rest[0], rest[0], rest[1]]


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("w_neg", [0.0, 0.3, -1.0])
@pytest.mark.parametrize("grid", [(8, 8), (5, 9), (6, 4), (1, 3)])
@pytest.mark.parametrize("num_instances", [1, 4])
def test_coverage_equals_area_resizing_of_the_pixel_mask(num_instances, grid, w_neg, mask_overlap):
    """The mask on the grid is the pixel mask averaged over the pixels of each cell, and then normalised."""
    (rows, columns), pixels = grid, 8
    size = (rows * pixels, columns * pixels)
    boxes, judged, conflicts = random_instances(num_instances, *size, seed=10 * rows + num_instances)

    expected = pixel_mask(boxes, judged, conflicts, *size, w_neg, mask_overlap)
    expected = expected.reshape(rows, pixels, columns, pixels).mean(axis=(1, 3))
    expected = expected / np.abs(expected).mean()

    unit_boxes = normalize_boxes(torch.tensor(boxes), size[1], size[0])
    result = mask(unit_boxes, conflicts.tolist(), rows, columns, w_neg, mask_overlap, judged.tolist())
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_boxes_off_the_pixel_grid_equal_a_fine_pixel_mask(mask_overlap):
    """Boxes at arbitrary positions agree with a mask of 128 pixels a cell to half a pixel of that mask's edge."""
    rows, columns, pixels = 3, 2, 128
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(3, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    y = (torch.arange(rows * pixels) + 0.5)[None, :, None] / (rows * pixels)
    x = (torch.arange(columns * pixels) + 0.5)[None, None] / (columns * pixels)
    x_min, y_min, x_max, y_max = boxes[:, :, None, None].unbind(1)
    inside = ((x_min <= x) & (x < x_max) & (y_min <= y) & (y < y_max)).float()
    weights = 1 - inside * torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    if mask_overlap == "mean":
        expected = weights.mean(dim=0)
    else:
        expected = torch.where(inside.sum(0) > 0, (weights * inside).sum(0) / inside.sum(0).clamp(min=1), 1.0)
    expected = expected.reshape(rows, pixels, columns, pixels).mean(dim=(1, 3))
    result = mask(boxes, [True, False, True], rows, columns, mask_overlap=mask_overlap)
    torch.testing.assert_close(result, expected / expected.mean(), atol=0.02, rtol=0)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("boxes", [[WHOLE], [WHOLE, LEFT, TOP]])
def test_instances_without_conflict_change_nothing(boxes, mask_overlap):
    """Instances that agree with the image's label give a mask of exactly ones, wherever their boxes are."""
    assert mask(boxes, [False] * len(boxes), 5, 7, mask_overlap=mask_overlap).eq(1).all()


def test_place_of_an_instance_without_conflict_is_irrelevant_for_the_mean():
    """Under "mean", an instance that agrees counts in N alone: over the whole image or cut away is the same."""
    everywhere = mask([LEFT, WHOLE], [True, False], 4, 4)
    nowhere = mask([LEFT, NOWHERE], [True, False], 4, 4)
    assert torch.equal(everywhere, nowhere)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("seed", range(3))
def test_w_neg_1_gives_ones(seed, mask_overlap):
    """`w_neg=1` is plain Diffusion-DPO: a mask of exactly ones."""
    boxes, judged, conflicts = random_instances(5, 72, 40, seed)
    unit_boxes = normalize_boxes(torch.tensor(boxes), 40, 72)
    assert mask(unit_boxes, conflicts.tolist(), 9, 5, 1.0, mask_overlap, judged.tolist()).eq(1).all()


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("seed", range(3))
def test_order_of_instances_does_not_matter(seed, mask_overlap):
    """Permuting the instances permutes nothing in the mask."""
    boxes, judged, conflicts = random_instances(5, 64, 64, seed)
    order = np.random.default_rng(seed).permutation(5)
    masks = [
        mask(boxes[by] / 64, conflicts[by].tolist(), 8, 8, -0.5, mask_overlap, judged[by].tolist())
        for by in (np.arange(5), order)
    ]
    torch.testing.assert_close(*masks)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("seed", range(3))
def test_flipped_boxes_give_the_flipped_mask(seed, mask_overlap):
    """Mirroring the boxes mirrors the mask."""
    boxes, judged, conflicts = random_instances(5, 48, 80, seed)
    boxes = normalize_boxes(torch.tensor(boxes), 80, 48)
    masks = [
        mask(by, conflicts.tolist(), 6, 10, 0.2, mask_overlap, judged.tolist()) for by in (boxes, flip_boxes(boxes))
    ]
    assert not torch.allclose(masks[0], masks[1])
    torch.testing.assert_close(masks[1], masks[0].flip(-1))


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("w_neg", [0.0, 0.5, -0.5, -1.0, -3.0])
def test_mean_absolute_value_is_1_on_the_grid(w_neg, mask_overlap):
    """The mean of |M| over the grid is 1 for boxes that end inside of cells, so both images' losses keep one scale."""
    boxes = [[0.13, 0.21, 0.77, 0.58], [0.4, 0.05, 0.61, 0.93]]
    result = mask(boxes, [True, False], 7, 5, w_neg, mask_overlap)
    assert result.abs().mean().item() == pytest.approx(1, abs=1e-6)
    assert result.std() > 0.05


def test_negative_w_neg_is_normalised_by_the_mean_absolute_value():
    """
    Left quarter in conflict, w_neg -3: weights -3, 1, 1, 1. Their mean is 0, that of their absolute values 6/4: the mask is
    -2, 2/3, 2/3, 2/3.
    """
    expected = torch.tensor([[-2.0, 2 / 3, 2 / 3, 2 / 3]])
    torch.testing.assert_close(mask([[0.0, 0.0, 0.25, 1.0]], [True], 1, 4, -3.0), expected)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("conflict", [False, True])
def test_ties_and_padding_count_nowhere(conflict, mask_overlap):
    """An instance that is not judged changes neither a weight nor N, whatever its box and its conflict flag."""
    alone = mask([LEFT], [True], 4, 4, 0.5, mask_overlap)
    boxes, judged = [LEFT, WHOLE, TOP, NOWHERE], [True, False, False, False]
    assert torch.equal(mask(boxes, [True] + [conflict] * 3, 4, 4, 0.5, mask_overlap, judged), alone)


def test_a_box_that_was_cut_away_still_counts():
    """Under "mean", an instance whose box has area 0 counts in N: (2 - 1 + 0) / 2 = 1/2 inside, mask 2/3 and 4/3."""
    expected = torch.tensor([2 / 3, 2 / 3, 4 / 3, 4 / 3]).expand(2, 4)
    for conflict in (False, True):
        torch.testing.assert_close(mask([LEFT, NOWHERE], [True, conflict], 2, 4), expected)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_no_judged_instance_gives_ones(mask_overlap):
    """Without instances, or with ties alone, the mask is all ones."""
    assert mask([], [], 3, 5, mask_overlap=mask_overlap).tolist() == [[1.0] * 5] * 3
    ties = mask([LEFT, WHOLE], [True, True], 3, 5, mask_overlap=mask_overlap, judged=[False, False])
    assert ties.tolist() == [[1.0] * 5] * 3


GRIDS = [(1, 1), (8, 8), (7, 5), (3, 100), (96, 128), (127, 129)]


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("num_instances", [1, 3, 7])
@pytest.mark.parametrize("grid", GRIDS)
def test_conflict_over_the_whole_image_gives_zeros(grid, num_instances, mask_overlap):
    """With w_neg 0 and every instance in conflict over the whole image, the mask is exactly zero and teaches nothing."""
    assert mask([WHOLE] * num_instances, [True] * num_instances, *grid, mask_overlap=mask_overlap).eq(0).all()


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(333, 217), (1001, 999), (577, 1024)])
def test_conflict_over_the_whole_crop_gives_zeros(size, grid, mask_overlap):
    """A box whose edges are those of the crop covers it wholly, whatever rounding its way through the boxes' code left."""
    (width, height), side = size, min(size)
    for left, top in [(0, 0), (width - side, height - side), ((width - side) // 3, (height - side) // 3)]:
        pixels = torch.tensor([left, top, left + side, top + side])
        box = flip_boxes(flip_boxes(orient_boxes(orient_boxes(normalize_boxes(pixels, width, height), 6), 8)))
        window = (left / width, top / height, (left + side) / width, (top + side) / height)
        assert mask(crop_boxes(box, window), [True], *grid, mask_overlap=mask_overlap).eq(0).all()


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_two_conflicts_that_tile_the_image_give_zeros(mask_overlap):
    """Left and right third against the rest: covered by one conflict each, "covering" is zero and "mean" is one."""
    boxes = [[0.0, 0.0, 1 / 3, 1.0], [1 / 3, 0.0, 1.0, 1.0]]
    result = mask(boxes, [True, True], 5, 7, mask_overlap=mask_overlap)
    torch.testing.assert_close(result, torch.full((5, 7), 1.0 if mask_overlap == "mean" else 0.0))


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
@pytest.mark.parametrize("w_neg", [0.0, 0.5, -1.0])
@pytest.mark.parametrize(
    ("boxes", "judged"),
    [
        ([], []),
        ([LEFT, TOP], [False, False]),
        ([WHOLE], [True]),
        ([WHOLE, WHOLE], [True, True]),
        ([NOWHERE], [True]),
        ([[1.0, 1.0, 1.0, 1.0]], [True]),
        ([[0.5, 0.5, 0.5 + 1 / 4096, 0.5 + 1 / 4096]], [True]),
        ([[1 / 512, 0.0, 1.0, 1.0]], [True]),
    ],
)
def test_masks_are_finite(boxes, judged, w_neg, mask_overlap):
    """No set of instances gives NaN or infinity, and the mean of |M| is 1, or 0 where the mask is zero everywhere."""
    result = mask(boxes, [True] * len(boxes), 9, 13, w_neg, mask_overlap, judged)
    assert result.isfinite().all()
    assert round(result.abs().mean().item(), 5) in (0, 1)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_one_pixel_box_lowers_its_own_cell(mask_overlap):
    """One conflicting pixel of a cell of 8 x 8 pixels takes 1/64 off that cell and nothing off the others."""
    pixel = normalize_boxes(torch.tensor([17, 9, 18, 10]), 64, 64)
    result = mask(pixel, [True], 8, 8, mask_overlap=mask_overlap)
    mean = (64 - 1 / 64) / 64
    expected = torch.full((8, 8), 1 / mean)
    expected[1, 2] = (1 - 1 / 64) / mean
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_images_of_a_batch_do_not_mix(mask_overlap):
    """Each image's mask in a batch is what it is alone."""
    boxes = torch.tensor([[LEFT, TOP], [WHOLE, [0.1, 0.2, 0.3, 0.4]], [NOWHERE, NOWHERE]])
    judged = torch.tensor([[True, True], [False, True], [False, False]])
    conflicts = torch.tensor([[True, False], [True, True], [False, False]])
    masks = instance_masks(boxes, judged, conflicts, 6, 4, 0.1, mask_overlap)
    assert masks.shape == (3, 6, 4)
    assert masks.dtype == torch.float32
    for index in range(3):
        alone = instance_masks(*(x[index : index + 1] for x in (boxes, judged, conflicts)), 6, 4, 0.1, mask_overlap)
        torch.testing.assert_close(masks[index], alone[0])


def test_normalize_masks_by_hand():
    """Each mask is divided by its own mean absolute value, and zeros stay zeros."""
    masks = torch.tensor([[[1.0, 3.0]], [[-1.0, 1.0]], [[0.0, 0.0]]])
    assert normalize_masks(masks).tolist() == [[[0.5, 1.5]], [[-1.0, 1.0]], [[0.0, 0.0]]]


def test_unknown_overlap_is_refused():
    """A `mask_overlap` that does not exist is a ValueError that names both that do."""
    with pytest.raises(ValueError, match="`mask_overlap` must be 'mean' or 'covering', got 'median'"):
        mask([LEFT], [True], 4, 4, mask_overlap="median")


@pytest.mark.parametrize(
    ("boxes", "w_neg", "share"),
    [
        ([], 0.0, 0.0),
        ([LEFT], 0.0, 0.5),
        ([LEFT], -1.0, 0.5),
        ([WHOLE], 0.0, 1.0),
        ([WHOLE], -1.0, 1.0),
        ([LEFT], 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("mask_overlap", OVERLAPS)
def test_masked_area_is_the_share_that_weighs_less(boxes, w_neg, share, mask_overlap):
    """The share of cells below the heaviest; all of them where the mask is zero or negative everywhere."""
    masks = mask(boxes, [True] * len(boxes), 6, 4, w_neg, mask_overlap)[None]
    assert masked_area(masks).item() == share


def test_regions_of_instances_and_background():
    """Each region is its box's share of each cell, and what no judged instance covers is the background's, overlaps counted once."""
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]]])
    judged = torch.tensor([[True, True, False]])
    first, second, tie, background = instance_regions(boxes, judged, 8, 8)[0]
    assert (first.sum(), second.sum(), tie.sum()) == (16, 24, 0)
    assert background.sum() == 64 - 16 - 24 + 4
    assert torch.equal(background, 1 - torch.maximum(first, second))  # whole cells


def test_regions_of_parts_of_cells():
    """A cell of which instances cover parts belongs to them and to the background by area, also where they overlap."""
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0]]])
    assert instance_regions(boxes, torch.ones(1, 2, dtype=torch.bool), 1, 1).flatten().tolist() == [0.5, 0.5, 0.25]
    nothing = instance_regions(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), 2, 3)
    assert torch.equal(nothing, torch.ones(2, 1, 2, 3))
