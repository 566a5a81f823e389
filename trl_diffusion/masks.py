# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The weight masks of IAPO (Instance-Aware Preference Optimization, CVPR 2026) on the latent grid.

A mask is piecewise constant, with steps at the edges of boxes. So its mean over a latent cell is computed exactly from the boxes.
This equals resizing the mask by area from infinitely small pixels, without creating a mask of the size of the image. Where an
instance has a segmentation mask in the place of its box, the steps are at the edges of the pixels.
"""

import torch
import torch.nn.functional as F


def instance_masks(
    boxes: torch.Tensor,
    judged: torch.Tensor,
    conflicts: torch.Tensor,
    height: int,
    width: int,
    w_neg: float = 0.0,
    mask_overlap: str = "mean",
    masks: torch.Tensor | None = None,
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
        masks (`torch.Tensor` of shape `(B, M, H, ceil(W / 8))`, *optional*):
            Segmentation masks of the first `M` instances, packed by [`masks.pack_masks`], on the `H` x `W` pixels of the training
            image. An instance with a mask has a box of area 0, and one with a box an empty mask.

    Returns:
        `torch.Tensor` of shape `(B, height, width)`: float32 masks.

    Raises:
        `ValueError`: If `mask_overlap` is neither `"mean"` nor `"covering"`, or if `masks` are those of another shape of image.
    """
    boxes, judged = boxes.float(), judged.bool()
    conflicts = judged & conflicts.bool()
    if mask_overlap not in ("mean", "covering"):
        raise ValueError(f"`mask_overlap` must be 'mean' or 'covering', got {mask_overlap!r}.")
    combine = _mean_over_instances if mask_overlap == "mean" else _mean_over_covering_instances
    with torch.autocast(boxes.device.type, enabled=False):  # masks are float32
        return normalize_masks(combine(boxes, judged, conflicts, height, width, w_neg, unpacked(masks, height, width)))


def instance_regions(
    boxes: torch.Tensor, judged: torch.Tensor, height: int, width: int, masks: torch.Tensor | None = None
) -> torch.Tensor:
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
        masks (`torch.Tensor` of shape `(B, M, H, ceil(W / 8))`, *optional*):
            Segmentation masks, as [`masks.instance_masks`] takes them.

    Returns:
        `torch.Tensor` of shape `(B, N + 1, height, width)`: float32 in [0, 1], the background last. What does not count covers
        nothing.

    Raises:
        `ValueError`: If `masks` are those of another shape of image.
    """
    boxes, judged = boxes.float(), judged.float()
    with torch.autocast(boxes.device.type, enabled=False):
        masks = unpacked(masks, height, width)
        x_min, y_min, x_max, y_max = _in_cells(boxes, height, width)
        covered_y, covered_x = _coverage(y_min, y_max, height), _coverage(x_min, x_max, width)
        instances = torch.einsum("bn,bnh,bnw->bnhw", judged, covered_y, covered_x)
        for place in range(0 if masks is None else masks.shape[1]):
            instances[:, place] += judged[:, place, None, None] * _cell_means(masks[:, place].float(), height, width)
        pieces = _Pieces(boxes, height, width, masks)
        background = pieces.mean((pieces.sum(judged) == 0).float())
        return torch.cat([instances, background[:, None]], dim=1)


def pack_masks(masks: torch.Tensor) -> torch.Tensor:
    """
    Packs segmentation masks into one bit a pixel.

    Args:
        masks (`torch.Tensor` of shape `(..., W)`, bool):
            The masks.

    Returns:
        `torch.Tensor` of shape `(..., ceil(W / 8))`: uint8. The first pixel is the highest bit, as in `numpy.packbits`.
    """
    bits = F.pad(masks.to(torch.uint8), (0, -masks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)).sum(dim=-1, dtype=torch.uint8)


def unpacked(masks: torch.Tensor | None, height: int, width: int) -> torch.Tensor | None:
    """
    Unpacks the masks of [`masks.pack_masks`] that belong to a latent grid.

    Args:
        masks (`torch.Tensor` of shape `(..., H, ceil(W / 8))`, *optional*):
            The packed masks. `None` stays `None`.
        height (`int`), width (`int`):
            Size of the latent grid, which has the shape of the image: `W / width = H / height`.

    Returns:
        `torch.Tensor` of shape `(..., H, W)`, bool, or `None`.

    Raises:
        `ValueError`: If the masks are those of another shape of image.
    """
    if masks is None:
        return None
    rows, packed = masks.shape[-2:]
    columns = rows * width // height
    if packed != -(-columns // 8):
        raise ValueError(
            f"The masks have {rows} rows of {packed} bytes, which is not the shape of a latent grid of {height} x {width} cells."
        )
    bits = masks[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return (bits & 1).bool().flatten(-2)[..., :columns]


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


def _mean_over_instances(boxes, judged, conflicts, height, width, w_neg, masks):
    # M = (1/N) sum_n M_n with M_n = 1 + (w_neg - 1) rho_n [inside b_n]: linear in the coverage of the cells
    x_min, y_min, x_max, y_max = _in_cells(boxes, height, width)
    covered_y, covered_x = _coverage(y_min, y_max, height), _coverage(x_min, x_max, width)  # (B, N, h), (B, N, w)
    weights = (w_neg - 1) * conflicts / judged.sum(dim=1, keepdim=True).clamp(min=1)  # (B, N)
    mean = torch.baddbmm(boxes.new_ones(()), covered_y.transpose(1, 2) * weights[:, None], covered_x)
    if masks is None:
        return mean
    return mean + _cell_means(_added_up(weights, masks), height, width)


def _mean_over_covering_instances(boxes, judged, conflicts, height, width, w_neg, masks):
    # This is not linear in the coverage of the instances. It is linear in the coverage of the pieces into which the edges of all
    # boxes (and pixels, where there are masks) cut the image, because the same instances cover a whole piece.
    pieces = _Pieces(boxes, height, width, masks)
    covering, conflicting = pieces.sum(judged.float()), pieces.sum(conflicts.float())
    return pieces.mean(1 + (w_neg - 1) * conflicting / covering.clamp(min=1))


class _Pieces:
    """The pieces `(B, Q, P)` into which the edges of all boxes, and of the pixels of masks, cut an image."""

    def __init__(self, boxes: torch.Tensor, height: int, width: int, masks: torch.Tensor | None):
        x_min, y_min, x_max, y_max = _in_cells(boxes, height, width)
        rows, columns = (1, 1) if masks is None else masks.shape[-2:]
        self.inside_y, self.covered_y, self.row = _pieces(y_min, y_max, height, rows)  # (B, N, Q), (B, Q, h), (B, Q)
        self.inside_x, self.covered_x, self.column = _pieces(x_min, x_max, width, columns)
        self.masks = masks

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights `(B, N)` of the instances that cover each piece, added up."""
        total = torch.einsum("bn,bnq,bnp->bqp", weights, self.inside_y, self.inside_x)
        if self.masks is None:
            return total
        image = torch.arange(len(weights), device=weights.device)[:, None, None]
        return total + _added_up(weights, self.masks)[image, self.row[:, :, None], self.column[:, None]]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over each cell of the values `(B, Q, P)` of the pieces: `(B, h, w)`."""
        return self.covered_y.transpose(1, 2) @ values @ self.covered_x


def _added_up(weights: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The weights `(B, N)` of the instances that cover each pixel, added up: `(B, H, W)`. The first of them have masks `(B, M, H, W)`."""
    total = weights.new_zeros(len(masks), *masks.shape[2:])
    for weight, mask in zip(weights.unbind(dim=1), masks.unbind(dim=1), strict=False):
        total += weight[:, None, None] * mask
    return total


def _cell_means(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Means over the cells of values of pixels: `(B, H, W)` -> `(B, height, width)`."""
    edges_y, edges_x = _edges(pixels, pixels.shape[1], height), _edges(pixels, pixels.shape[2], width)
    return _coverage(edges_y[:-1], edges_y[1:], height).T @ pixels @ _coverage(edges_x[:-1], edges_x[1:], width)


def _edges(like: torch.Tensor, num_pixels: int, num_cells: int) -> torch.Tensor:
    """Where the pixels begin and end, in cells: `(pixels + 1,)`."""
    return torch.arange(num_pixels + 1, dtype=like.dtype, device=like.device) * num_cells / num_pixels


def _coverage(low: torch.Tensor, high: torch.Tensor, num_cells: int) -> torch.Tensor:
    """The share of each cell between `low` and `high`, which are in cells: `(B, N)` -> `(B, N, cells)`."""
    cells = torch.arange(num_cells, device=low.device)
    overlap = torch.minimum(high[..., None], cells + 1) - torch.maximum(low[..., None], cells)
    return overlap.clamp(min=0)


def _pieces(
    low: torch.Tensor, high: torch.Tensor, num_cells: int, num_pixels: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cuts the range of the cells at every `low` and `high` of a row `(B, N)`, and at the edges of pixels. Returns which intervals contain
    which pieces, `(B, N, pieces)`, the share of each cell that a piece covers, `(B, pieces, cells)`, and in which pixel it lies,
    `(B, pieces)`.
    """
    edges = _edges(low, num_pixels, num_cells).expand(len(low), -1)  # made on the device, as all here
    cuts = torch.cat([edges, low, high], dim=1).sort(dim=1).values
    middle = (cuts[:, 1:] + cuts[:, :-1]) / 2
    inside = (low[..., None] < middle[:, None]) & (middle[:, None] < high[..., None])
    pixel = (middle * num_pixels / num_cells).long().clamp(max=num_pixels - 1)
    return inside.float(), _coverage(cuts[:, :-1], cuts[:, 1:], num_cells), pixel


def _in_cells(boxes: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, ...]:
    # Rounded to 1/4096 of a cell, so that a box of the whole image covers it completely despite earlier rounding errors.
    # Otherwise an uncovered rest of 1e-7 would get the whole weight of the mask by normalisation.
    sizes = torch.stack([boxes.new_full((), width), boxes.new_full((), height)]).repeat(2)
    return ((boxes.clamp(0, 1) * sizes * 4096).round() / 4096).unbind(dim=-1)
