# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What keeps the training of pairs from breaking the images: of SDPO, the rejected image's gradient held back."""

import torch

from .pair_terms import PairTerms


def safeguard_scale(model_pred: torch.Tensor, target: torch.Tensor, terms: PairTerms, mu: float) -> torch.Tensor:
    """
    How far the gradient of the rejected error is scaled down in Diffusion-SDPO (arXiv:2511.03317), so that a step on the
    outputs lowers the chosen error by at least the share `mu` of what it would alone:

        lambda = clip( (1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1 )    where <g_w, g_l> > 0, else 1

    `g_w` and `g_l` are the gradients of the two errors with respect to the model's outputs, `g = 2 M (e - eps) / n`. There is one
    lambda for each term, which depends on no other pair. The published code has one for each micro-batch.

    Args:
        model_pred (`torch.Tensor` of shape `(2B, C, h, w)`):
            The policy's prediction for the chosen, then for the rejected images.
        target (`torch.Tensor` of shape `(2B, C, h, w)`):
            What it should have predicted.
        terms ([`losses.PairTerms`]):
            The terms.
        mu (`float`):
            Between 0 and 1. With 1, the rejected error pulls only where it does not act against the chosen one.

    Returns:
        `torch.Tensor` of shape `(B, R)`: float32 in [0, 1], without gradient.
    """
    with torch.no_grad():
        residuals = model_pred.float() - target.float()
        products = []
        for term in range(terms.masks.shape[1]):  # one at a time, as in the errors
            chosen, rejected = (terms.masks[:, term, None] * residuals).chunk(2)
            products.append(
                torch.stack(
                    [(a * b).flatten(1).sum(dim=1) for a, b in ((chosen,) * 2, (rejected,) * 2, (chosen, rejected))]
                )
            )
        chosen_norms, rejected_norms, inner = torch.stack(products, dim=2)  # (3, B, R); the factors 2 / n cancel
        norms = torch.where(terms.is_swapped, rejected_norms, chosen_norms)
        scale = ((1 - mu) * norms / torch.where(inner > 0, inner, 1.0)).clamp(0, 1)
        return torch.where(inner > 0, scale, 1.0)


def scaled_gradient(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    The same values with a scaled gradient.

    Args:
        values (`torch.Tensor`):
            Values, such as the errors of the rejected images.
        scale (`torch.Tensor` of the same shape):
            Factors of the gradient, at most 1.

    Returns:
        `torch.Tensor` of the same shape.
    """
    return values.detach() + scale * (values - values.detach())
