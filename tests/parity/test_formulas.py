# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The whole way from predictions to the loss, against the published formulas written out once more."""

import pytest
import torch
import torch.nn.functional as F

from trl_diffusion.losses import diffusion_dpo_loss
from trl_diffusion.masks import instance_masks
from trl_diffusion.noising import per_sample_errors


PAIRS, SHAPE = 4, (4, 8, 8)


def predictions(seed: int = 0):
    """
    Targets and the predictions of policy and reference, `(2B, C, h, w)`: chosen, then rejected. All values are multiples
    of 1/16 below 8 in size, so squares and sums are exact in float32 and no order of summation matters.
    """
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(-16, 17, (2 * PAIRS, *SHAPE), generator=generator) / 16
    ref_pred = target + torch.randint(-4, 5, target.shape, generator=generator) / 16
    model_pred = ref_pred + torch.randint(-1, 2, target.shape, generator=generator) / 16
    return model_pred, ref_pred, target


def masks(w_neg: float, mask_overlap: str = "mean") -> torch.Tensor:
    """Masks of the chosen and the rejected images, two instances a pair, one in conflict."""
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.2, 0.3, 0.9, 0.8]], [[0.5, 0.0, 1.0, 1.0], [0.1, 0.1, 0.4, 0.6]]])
    boxes = boxes.repeat_interleave(PAIRS, dim=0)
    judged = torch.ones(2 * PAIRS, 2, dtype=torch.bool)
    conflicts = torch.tensor([[True, False]]).expand(2 * PAIRS, 2)
    return instance_masks(boxes, judged, conflicts, *SHAPE[1:], w_neg, mask_overlap)


def ours(model_pred, ref_pred, target, beta: float, masks: torch.Tensor | None = None) -> torch.Tensor:
    chosen_errors, rejected_errors = per_sample_errors(model_pred, target, masks).chunk(2)
    ref_chosen_errors, ref_rejected_errors = per_sample_errors(ref_pred, target, masks).chunk(2)
    return diffusion_dpo_loss(chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors, beta)[0]


def difference(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error on the chosen minus that on the rejected image, `(B,)`."""
    winner, loser = F.mse_loss(pred, target, reduction="none").mean(dim=(1, 2, 3)).split(PAIRS)
    return winner - loser


def published_dpo(model_pred, ref_pred, target, beta: float) -> torch.Tensor:
    """The training formula published with Diffusion-DPO: half of beta scales the difference."""
    scale_term = -0.5 * beta
    inside_term = scale_term * (difference(model_pred, target) - difference(ref_pred, target))
    return -F.logsigmoid(inside_term)


def diffusers_sd_script(model_pred, ref_pred, target, beta: float) -> torch.Tensor:
    """The formula of diffusers' Stable Diffusion DPO script: all of beta scales the difference."""
    return -F.logsigmoid(-beta * (difference(model_pred, target) - difference(ref_pred, target)))


def iapo_by_loops(model_pred, ref_pred, target, masks, beta: float) -> torch.Tensor:
    """The paper's loss pair by pair, its sums written out, in float64."""
    losses = []
    for pair in range(PAIRS):
        d = {}
        for image, index in (("w", pair), ("l", PAIRS + pair)):
            for model, pred in (("theta", model_pred), ("ref", ref_pred)):
                weighted = [
                    masks[index].double() * (target[index, channel].double() - pred[index, channel].double()) ** 2
                    for channel in range(SHAPE[0])
                ]
                d[image, model] = sum(square.sum() for square in weighted) / (SHAPE[0] * SHAPE[1] * SHAPE[2])
        margin = (d["w", "theta"] - d["w", "ref"]) - (d["l", "theta"] - d["l", "ref"])
        losses.append(-torch.log(torch.sigmoid(-0.5 * beta * margin)))
    return torch.stack(losses)


@pytest.mark.parametrize("beta", [500.0, 2000.0, 5000.0])
@pytest.mark.parametrize("mask_overlap", ["mean", "covering"])
def test_w_neg_1_equals_diffusion_dpo(mask_overlap, beta):
    """Under the masks of `w_neg=1` the loss is the published Diffusion-DPO loss."""
    values = predictions()
    expected = published_dpo(*values, beta)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(*values, beta, masks(1.0, mask_overlap)), expected, atol=1e-6, rtol=1e-6)


def test_w_neg_1_has_the_gradient_of_diffusion_dpo():
    """The gradient that reaches the model's prediction is that of the published formula."""
    model_pred, ref_pred, target = predictions()
    model_pred.requires_grad_()
    (gradient,) = torch.autograd.grad(ours(model_pred, ref_pred, target, 2000.0, masks(1.0)).mean(), model_pred)
    (expected,) = torch.autograd.grad(published_dpo(model_pred, ref_pred, target, 2000.0).mean(), model_pred)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


def test_without_masks_equals_diffusion_dpo():
    """Leaving the masks out is Diffusion-DPO too."""
    values = predictions()
    torch.testing.assert_close(ours(*values, 2000.0), published_dpo(*values, 2000.0), atol=1e-6, rtol=1e-6)


def test_beta_is_twice_that_of_the_diffusers_sd_script():
    """beta 5000 here and in the papers is beta 2500 in diffusers' Stable Diffusion script, and not beta 5000 there."""
    values = predictions()
    loss = ours(*values, 5000.0, masks(1.0))
    torch.testing.assert_close(loss, diffusers_sd_script(*values, 2500.0), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(loss, diffusers_sd_script(*values, 5000.0), rtol=0.1)


@pytest.mark.parametrize("w_neg", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("mask_overlap", ["mean", "covering"])
def test_masked_loss_equals_the_paper_s_sums(mask_overlap, w_neg):
    """With any `w_neg` the loss is the paper's, summed position by position in float64."""
    values, weights = predictions(), masks(w_neg, mask_overlap)
    loss = ours(*values, 500.0, weights)
    # Masks are no multiples of 1/16: float32 rounding of errors of about 0.1 is magnified by beta
    torch.testing.assert_close(loss.double(), iapo_by_loops(*values, weights, 500.0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(loss, ours(*values, 500.0), atol=1e-2)
