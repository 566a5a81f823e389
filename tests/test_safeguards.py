# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The SDPO safeguard against gradients by autograd, and its limits."""

import pytest
import torch

from tests.test_pair_losses import PAIRS, SHAPE, grouped, masks, predictions
from trl_diffusion.losses import image_terms, pair_errors, safeguard_scale, scaled_gradient


TERMS = {"image": lambda: image_terms(masks(-0.5)), "grouped": grouped}


def output_gradients(model_pred, target, terms, pair: int, term: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By autograd: the gradients of both errors of a term, with respect to the outputs for the better and the worse image."""
    model_pred = model_pred.clone().requires_grad_()
    errors = pair_errors(model_pred, None, target, terms)
    gradients = [torch.autograd.grad(d[pair, term], model_pred, retain_graph=True)[0] for d in errors[:2]]
    better, worse = (PAIRS + pair, pair) if terms.is_swapped[pair, term] else (pair, PAIRS + pair)
    assert gradients[0][better].abs().max() > 0 and gradients[0][worse].eq(0).all()
    return gradients[0][better], gradients[1][worse]


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("mu", [0.0, 0.2, 0.6, 1.0])
def test_the_scale_is_that_of_autograd_s_gradients(mu, kind):
    """lambda = clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1) where <g_w, g_l> > 0, else 1, with gradients by autograd."""
    model_pred, _, target = predictions(7, torch.float32)
    model_pred[PAIRS] = target[PAIRS] + 2 * (model_pred[0] - target[0])  # the first pair's errors point the same way
    terms, seen = TERMS[kind](), set()
    scale = safeguard_scale(model_pred, target, terms, mu)
    for pair in range(PAIRS):
        for term in range(scale.shape[1]):
            if not terms.exists[pair, term]:
                continue
            better, worse = output_gradients(model_pred, target, terms, pair, term)
            inner = (better * worse).sum().item()
            expected = min(1.0, max(0.0, (1 - mu) * better.square().sum().item() / inner)) if inner > 0 else 1.0
            assert scale[pair, term].item() == pytest.approx(expected, rel=1e-4)
            # What it is for: a step against g_w - lambda g_l lowers the chosen error by at least mu of what g_w alone would
            kept = (better * (better - scale[pair, term] * worse)).sum() / better.square().sum()
            assert kept >= mu - 1e-4
            seen.add(expected == 1.0)
    assert seen == {True, False}, "a case of each kind"


def test_orthogonal_and_opposite_gradients_are_left_alone():
    """Where the rejected error does not act against the chosen one, lambda is 1, whatever mu; also at errors of 0."""
    target = torch.zeros(6, 1, 1, 2)
    model_pred = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 5.0], [-5.0, 1.0], [3.0, 0.0]])[:, None, None]
    scale = safeguard_scale(model_pred, target, image_terms(torch.ones(6, 1, 2)), 1.0)
    assert scale.tolist() == [[1.0], [1.0], [1.0]]
    parallel = torch.tensor([[1.0, 0.0], [4.0, 3.0]])[:, None, None]  # 0.75 * 1 / 4
    assert safeguard_scale(parallel, target[:2], image_terms(torch.ones(2, 1, 2)), 0.25).item() == 0.1875


def test_the_safeguard_changes_gradients_and_no_value():
    """Errors are as before, the gradient is lambda times as large, and with lambda 1 it is that of before."""
    values = torch.rand(4, 2, requires_grad=True)
    scale = torch.tensor([[0.0, 0.25], [1.0, 0.5], [1.0, 1.0], [0.1, 0.9]])
    scaled = scaled_gradient(values, scale)
    assert torch.equal(scaled, values)
    assert torch.equal(torch.autograd.grad(scaled.sum(), values)[0], scale)


def test_one_lambda_for_each_pair():
    """A pair's lambda does not change with the other pairs of its batch, where the published code has one for all."""
    model_pred, _, target = predictions(7, torch.float32)
    model_pred[PAIRS] = target[PAIRS] + 2 * (model_pred[0] - target[0])
    terms = image_terms(torch.ones(2 * PAIRS, *SHAPE[1:]))
    whole = safeguard_scale(model_pred, target, terms, 0.2)
    assert whole.unique().numel() > 1
    for pair in range(PAIRS):
        rows = [pair, PAIRS + pair]
        alone = safeguard_scale(model_pred[rows], target[rows], image_terms(terms.masks[rows, 0]), 0.2)
        torch.testing.assert_close(alone[0], whole[pair])
