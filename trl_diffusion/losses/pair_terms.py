# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is compared in a pair: both images under their masks, or region by region."""

from typing import NamedTuple

import torch

from ..masks import normalize_masks
from ..noising import per_sample_errors
from .pairs import PairErrors


class PairTerms(NamedTuple):
    """
    The `R` terms of each pair. A term compares a region of the chosen image with one of the rejected image.

    Attributes:
        masks (`torch.Tensor` of shape `(2B, R, h, w)`):
            Weights of the positions, with a mean absolute value of 1 or zero everywhere; first those of the chosen images.
        is_swapped (`torch.Tensor` of shape `(B, R)`, bool):
            Where the rejected image is the better one.
        exists (`torch.Tensor` of shape `(B, R)`, bool):
            Which terms a pair has.
    """

    masks: torch.Tensor
    is_swapped: torch.Tensor
    exists: torch.Tensor

    def ordered(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From values of chosen, then rejected images `(2B, R, ...)`: those of the better and those of the worse side."""
        chosen, rejected = values.chunk(2)
        is_swapped = self.is_swapped.reshape(*self.is_swapped.shape, *[1] * (values.dim() - 2))
        return torch.where(is_swapped, rejected, chosen), torch.where(is_swapped, chosen, rejected)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the terms that a pair has: from `(B, R)` to `(B,)`, 0 for a pair without any."""
        kept = torch.where(self.exists, values, 0.0)
        return kept.sum(dim=1) / self.exists.sum(dim=1).clamp(min=1)


def image_terms(masks: torch.Tensor) -> PairTerms:
    """
    One term for each pair: its images under their masks.

    Args:
        masks (`torch.Tensor` of shape `(2B, h, w)`):
            Masks of the chosen, then of the rejected images, see [`masks.instance_masks`].

    Returns:
        [`losses.PairTerms`], with `R = 1`.
    """
    is_swapped = torch.zeros(len(masks) // 2, 1, dtype=torch.bool, device=masks.device)
    return PairTerms(masks[:, None], is_swapped, torch.ones_like(is_swapped))


def instance_terms(regions: torch.Tensor, conflicts: torch.Tensor) -> PairTerms:
    """
    One term for each instance, with its own preference, and one for the background, with the preference of the pair (ours, after
    the groups of R-GDPO, arXiv:2603.15616). A region that is empty in one of the two images has no term.

    Args:
        regions (`torch.Tensor` of shape `(2B, N + 1, h, w)`):
            Regions of the chosen, then of the rejected images, see [`masks.instance_regions`].
        conflicts (`torch.Tensor` of shape `(B, N)`, bool):
            Which instances are better in the rejected image.

    Returns:
        [`losses.PairTerms`], with `R = N + 1`.
    """
    masks = normalize_masks(regions.flatten(0, 1)).unflatten(0, regions.shape[:2])
    in_chosen, in_rejected = (masks != 0).flatten(2).any(dim=2).chunk(2)
    background = in_chosen.new_zeros(len(in_chosen), 1)
    return PairTerms(masks, torch.cat([conflicts.bool(), background], dim=1), in_chosen & in_rejected)


def pair_errors(
    model_pred: torch.Tensor,
    ref_pred: torch.Tensor | None,
    target: torch.Tensor,
    terms: PairTerms,
    with_drift: bool = True,
) -> PairErrors:
    """
    The errors of each term, `d = mean(M . (eps - e)^2)`; where a term is swapped, chosen means rejected.

    Args:
        model_pred (`torch.Tensor` of shape `(2B, C, h, w)`):
            The policy's prediction for the chosen, then for the rejected images.
        ref_pred (`torch.Tensor` of shape `(2B, C, h, w)`, *optional*):
            The reference's prediction; `None` without a reference.
        target (`torch.Tensor` of shape `(2B, C, h, w)`):
            What both should have predicted.
        terms ([`losses.PairTerms`]):
            The terms.
        with_drift (`bool`, *optional*, defaults to `True`):
            Whether to compute the drift, which only [`losses.dspo_loss`] reads.

    Returns:
        [`losses.PairErrors`], each of shape `(B, R)`.
    """
    errors = terms.ordered(_term_errors(model_pred, target, terms.masks))
    if ref_pred is None:
        return PairErrors(*errors)
    ref_errors = terms.ordered(_term_errors(ref_pred, target, terms.masks))
    if not with_drift:
        return PairErrors(*errors, *ref_errors)
    drift, _ = terms.ordered(_term_errors(model_pred, ref_pred, terms.masks))
    return PairErrors(*errors, *ref_errors, drift)


def _term_errors(model_pred: torch.Tensor, target: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Masked errors of each image and term, `(2B, R)`; one term at a time, so that one is exactly what it is alone."""
    return torch.stack([per_sample_errors(model_pred, target, mask) for mask in masks.unbind(1)], dim=1)
