# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The weight masks of IAPO (Instance-Aware Preference Optimization, CVPR 2026) on the latent grid.

A mask is piecewise constant, with steps at the edges of boxes. So its mean over a latent cell is computed exactly from the boxes.
This equals resizing the mask by area from infinitely small pixels, without creating a mask of the size of the image.
"""

import torch


def instance_masks(
    boxes: torch.Tensor,
    judged: torch.Tensor,
    conflicts: torch.Tensor,
    height: int,
    width: int,
    w_neg: float = 0.0,
    mask_overlap: str = "mean",
) -> torch.Tensor:
    """
    Computes the weight mask of each image from its instances (instance-aware mask of IAPO).

    An instance that contradicts the label of the image (`rho_n = 1`) has the weight `w_neg` inside its box and 1 outside. All
    other instances have the weight 1 everywhere. The weights of the instances are combined at each position, averaged over each
    latent cell, and divided by the mean of their absolute value over the grid (the mean itself for `w_neg >= 0`). A mask that
    is zero everywhere stays zero.

    Args:
        boxes (`torch.Tensor` of shape `(B, N, 4)`):
            Unit boxes. A box of area 0 (outside the crop) covers nothing, but its instance still counts.
        judged (`torch.Tensor` of shape `(B, N)`, bool):
            Which instances count: `False` for padding and ties.
        conflicts (`torch.Tensor` of shape `(B, N)`, bool):
            Which instances contradict the label of the image. Ignored if `judged` is `False`.
        height (`int`):
            Height of the latent grid.
        width (`int`):
            Width of the latent grid.
        w_neg (`float`, *optional*, defaults to `0.0`):
            Weight inside the box of a conflicting instance, at most 1. Negative values reverse the preference there.
        mask_overlap (`str`, *optional*, defaults to `"mean"`):
            `"mean"` averages over all judged instances of the image, as in the paper; `"covering"` averages only over the
            instances that cover the position.

    Returns:
        `torch.Tensor` of shape `(B, height, width)`: float32 masks.

    Raises:
        `ValueError`: If `mask_overlap` is neither `"mean"` nor `"covering"`.
    """
    boxes, judged = boxes.float(), judged.bool()
    conflicts = judged & conflicts.bool()
    if mask_overlap not in ("mean", "covering"):
        raise ValueError(f"`mask_overlap` must be 'mean' or 'covering', got {mask_overlap!r}.")
    combine = _mean_over_instances if mask_overlap == "mean" else _mean_over_covering_instances
    with torch.autocast(boxes.device.type, enabled=False):  # masks are float32
        return normalize_masks(combine(boxes, judged, conflicts, height, width, w_neg))


def instance_regions(boxes: torch.Tensor, judged: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Computes which share of each latent cell each instance covers, and which share no instance covers: the background.

    Args:
        boxes (`torch.Tensor` of shape `(B, N, 4)`):
            Unit boxes.
        judged (`torch.Tensor` of shape `(B, N)`, bool):
            Which instances count: `False` for padding and ties, whose region belongs to the background.
        height (`int`):
            Height of the latent grid.
        width (`int`):
            Width of the latent grid.

    Returns:
        `torch.Tensor` of shape `(B, N + 1, height, width)`: float32 in [0, 1], the background last. What does not count covers
        nothing.
    """
    boxes, judged = boxes.float(), judged.float()
    with torch.autocast(boxes.device.type, enabled=False):
        x_min, y_min, x_max, y_max = _in_cells(boxes, height, width)
        covered_y, covered_x = _coverage(y_min, y_max, height), _coverage(x_min, x_max, width)
        instances = torch.einsum("bn,bnh,bnw->bnhw", judged, covered_y, covered_x)
        inside_y, pieces_y = _pieces(y_min, y_max, height)
        inside_x, pieces_x = _pieces(x_min, x_max, width)
        free = (torch.einsum("bn,bnq,bnp->bqp", judged, inside_y, inside_x) == 0).float()
        background = pieces_y.transpose(1, 2) @ free @ pieces_x
        return torch.cat([instances, background[:, None]], dim=1)


def normalize_masks(masks: torch.Tensor) -> torch.Tensor:
    """
    Divides each mask by the mean of its absolute value, so that the losses of both images of a pair have the same scale.

    Args:
        masks (`torch.Tensor` of shape `(B, h, w)`):
            Masks before normalisation.

    Returns:
        `torch.Tensor` of shape `(B, h, w)`: masks with a mean absolute value of 1. A mask of zeros stays zero.
    """
    scale = torch.linalg.vector_norm(masks, ord=1, dim=(1, 2), keepdim=True) / masks[0].numel()
    return masks * torch.where(scale > 1e-6, 1 / scale, 0.0)  # a mask of zeros may have a rounding error


def masked_area(masks: torch.Tensor) -> torch.Tensor:
    """
    Share of the positions with a lower weight than the highest of their mask, or with no weight.

    Args:
        masks (`torch.Tensor` of shape `(B, h, w)`):
            Masks, normalised or not.

    Returns:
        `torch.Tensor` of shape `(B,)`: shares in [0, 1]; 1 if the whole mask is zero or negative.
    """
    heaviest = masks.amax(dim=(1, 2), keepdim=True)
    return ((masks < 0.999 * heaviest) | (masks <= 0)).float().mean(dim=(1, 2))


def _mean_over_instances(boxes, judged, conflicts, height, width, w_neg):
    # M = (1/N) sum_n M_n with M_n = 1 + (w_neg - 1) rho_n [inside b_n]: linear in the boxes' coverage of the cells
    x_min, y_min, x_max, y_max = _in_cells(boxes, height, width)
    covered_y, covered_x = _coverage(y_min, y_max, height), _coverage(x_min, x_max, width)  # (B, N, h), (B, N, w)
    weights = (w_neg - 1) * conflicts / judged.sum(dim=1, keepdim=True).clamp(min=1)  # (B, N)
    return torch.baddbmm(boxes.new_ones(()), covered_y.transpose(1, 2) * weights[:, None], covered_x)


def _mean_over_covering_instances(boxes, judged, conflicts, height, width, w_neg):
    # This is not linear in the coverage of the boxes. It is linear in the coverage of the pieces into which the edges of all
    # boxes cut the image, because the same instances cover a whole piece.
    x_min, y_min, x_max, y_max = _in_cells(boxes, height, width)
    inside_y, covered_y = _pieces(y_min, y_max, height)  # (B, N, Q), (B, Q, h)
    inside_x, covered_x = _pieces(x_min, x_max, width)  # (B, N, P), (B, P, w)
    covering = torch.einsum("bn,bnq,bnp->bqp", judged.float(), inside_y, inside_x)
    conflicting = torch.einsum("bn,bnq,bnp->bqp", conflicts.float(), inside_y, inside_x)
    weights = 1 + (w_neg - 1) * conflicting / covering.clamp(min=1)
    return covered_y.transpose(1, 2) @ weights @ covered_x


def _coverage(low: torch.Tensor, high: torch.Tensor, num_cells: int) -> torch.Tensor:
    """The share of each cell between `low` and `high`, which are in cells: `(B, N)` -> `(B, N, cells)`."""
    cells = torch.arange(num_cells, device=low.device)
    overlap = torch.minimum(high[..., None], cells + 1) - torch.maximum(low[..., None], cells)
    return overlap.clamp(min=0)


def _pieces(low: torch.Tensor, high: torch.Tensor, num_cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cuts the range of the cells at every `low` and `high` of a row `(B, N)`. Returns which intervals contain which pieces,
    `(B, N, pieces)`, and the share of each cell that a piece covers, `(B, pieces, cells)`.
    """
    ends = low.new_zeros(len(low), 1), low.new_full((len(low), 1), num_cells)  # made on the device, as all here
    cuts = torch.cat([*ends, low, high], dim=1).sort(dim=1).values
    middle = ((cuts[:, 1:] + cuts[:, :-1]) / 2)[:, None]
    inside = (low[..., None] < middle) & (middle < high[..., None])
    return inside.float(), _coverage(cuts[:, :-1], cuts[:, 1:], num_cells)


def _in_cells(boxes: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, ...]:
    # Rounded to 1/4096 of a cell, so that a box of the whole image covers it completely despite earlier rounding errors.
    # Otherwise an uncovered rest of 1e-7 would get the whole weight of the mask by normalisation.
    sizes = torch.stack([boxes.new_full((), width), boxes.new_full((), height)]).repeat(2)
    return ((boxes.clamp(0, 1) * sizes * 4096).round() / 4096).unbind(dim=-1)
