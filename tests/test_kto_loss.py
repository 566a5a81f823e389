# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math
from pathlib import Path

import pytest
import torch

from tests.gpu.flops import COUNTED
from trl_diffusion.losses import diffusion_dpo_loss, diffusion_kto_loss, diffusion_kto_rewards


LOSS_TYPES = ("kto", "log_sigmoid", "risk_seeking")


def batch(num: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors, errors of the reference, labels of both kinds; float64, so that finite differences are exact enough."""
    generator = torch.Generator().manual_seed(0)
    errors, ref_errors = torch.rand(2, num, generator=generator, dtype=torch.float64)
    return errors, ref_errors, torch.arange(num) % 3 > 0


def by_hand(error, ref_error, desirable, kl, beta, loss_type, weights) -> float:
    """The loss of one sample in plain Python: the utility of s (beta g / 2 - kl), taken from what it can be at most."""
    gain = beta / 2 * (ref_error - error) - kl
    gain = gain if desirable else -gain
    utility = {
        "kto": 1 / (1 + math.exp(-gain)) - 1,
        "log_sigmoid": math.log(1 / (1 + math.exp(-gain))),
        "risk_seeking": -math.log(1 / (1 + math.exp(gain))),
    }[loss_type]
    return -weights[0 if desirable else 1] * utility


def loss(errors, ref_errors, desirable, kl, beta=6.0, loss_type="kto", weights=(1.0, 1.0)) -> torch.Tensor:
    rewards = diffusion_kto_rewards(errors, ref_errors, beta)
    return diffusion_kto_loss(rewards, desirable, torch.as_tensor(kl, dtype=errors.dtype), loss_type, *weights)


def test_numbers():
    """
    beta 4, errors 0.3 and 0.5, references 0.4: rewards -2 * -0.1 = 0.2 and -0.2. With a KL of 0.1, the desirable first has
    sigma(0.1) = 0.5249792 and the loss 0.4750208; the undesirable second has sigma(0.3) = 0.5744425, the loss 0.4255575.
    """
    errors, ref_errors = torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.4])
    rewards = diffusion_kto_rewards(errors, ref_errors, beta=4.0)
    losses = diffusion_kto_loss(rewards, torch.tensor([True, False]), torch.tensor(0.1))
    assert rewards.tolist() == pytest.approx([0.2, -0.2], abs=1e-6)
    assert losses.tolist() == pytest.approx([0.4750208, 0.4255575], abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_equals_the_formula_written_again(loss_type, kl):
    """Each sample's loss is that of the formula in plain Python, with the weight of its label."""
    errors, ref_errors, desirable = batch()
    losses = loss(errors, ref_errors, desirable, kl, loss_type=loss_type, weights=(1.5, 0.5))
    rows = zip(errors.tolist(), ref_errors.tolist(), desirable.tolist(), strict=True)
    assert losses.tolist() == pytest.approx([by_hand(*row, kl, 6.0, loss_type, (1.5, 0.5)) for row in rows], abs=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_equals_finite_differences(loss_type):
    """The gradient with respect to the policy's errors is that of small differences of the formula in plain Python."""
    errors, ref_errors, desirable = batch()
    errors.requires_grad_()
    loss(errors, ref_errors, desirable, 0.3, loss_type=loss_type, weights=(1.5, 0.5)).sum().backward()
    for index, gradient in enumerate(errors.grad.tolist()):
        row = errors[index].item(), ref_errors[index].item(), desirable[index].item()
        shifted = [by_hand(row[0] + step, *row[1:], 0.3, 6.0, loss_type, (1.5, 0.5)) for step in (1e-6, -1e-6)]
        assert gradient == pytest.approx((shifted[0] - shifted[1]) / 2e-6, rel=1e-6)
        assert (gradient > 0) == row[2]  # a smaller error on what is desirable, a larger one on what is not


def test_slope_by_hand():
    """The derivative of "kto" is w sigma(x) sigma(-x) beta / 2, up for desirable and down for undesirable images."""
    errors, ref_errors, desirable = batch()
    errors.requires_grad_()
    loss(errors, ref_errors, desirable, 0.3).sum().backward()
    gains = 3 * (ref_errors - errors.detach()) - 0.3
    slope = 3 * torch.sigmoid(gains) * torch.sigmoid(-gains)
    torch.testing.assert_close(errors.grad, torch.where(desirable, slope, -slope))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_kl_never_gets_a_gradient(loss_type):
    """A KL that is computed from the policy's errors changes the loss, but the gradient is that of a number."""
    errors, ref_errors, desirable = batch()
    gradients = []
    for is_number in (True, False):
        policy = errors.clone().requires_grad_()
        kl = diffusion_kto_rewards(policy, ref_errors, 6.0).mean().abs()
        loss(policy, ref_errors, desirable, kl.item() if is_number else kl, loss_type=loss_type).sum().backward()
        gradients.append(policy.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone(label):
    """A batch of one label has the losses that its samples have in a batch of both."""
    errors, ref_errors, desirable = batch()
    alone = loss(errors[desirable == label], ref_errors[desirable == label], desirable[desirable == label], 0.2)
    assert torch.equal(alone, loss(errors, ref_errors, desirable, 0.2)[desirable == label])


def test_swapped_labels_negate_the_gain():
    """sigma(x) + sigma(-x) = 1: with "kto", the losses of a label and of the other add up to 1."""
    errors, ref_errors, desirable = batch()
    both = loss(errors, ref_errors, desirable, 0.2) + loss(errors, ref_errors, ~desirable, 0.2)
    torch.testing.assert_close(both, torch.ones_like(both))


def test_is_the_loss_of_a_pair_against_its_mean():
    """With `kl` the reward of a pair's other image, "log_sigmoid" of the chosen one is the Diffusion-DPO loss of the pair."""
    chosen, rejected, ref_chosen, ref_rejected = torch.rand(4, 1, generator=torch.Generator().manual_seed(1))
    expected = diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=6.0)[0]
    kl = diffusion_kto_rewards(rejected, ref_rejected, 6.0)[0]
    torch.testing.assert_close(loss(chosen, ref_chosen, torch.tensor([True]), kl, loss_type="log_sigmoid"), expected)


def test_scale_of_the_published_script():
    """Its 1000 times the difference of mean squared errors is `beta=2000` here."""
    errors, ref_errors, _ = batch()
    torch.testing.assert_close(diffusion_kto_rewards(errors, ref_errors, 2000.0), 1000.0 * (ref_errors - errors))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_is_finite_far_from_the_reference(loss_type):
    """Rewards of any size have finite losses and gradients in float32."""
    rewards = torch.tensor([-1e6, -100.0, 0.0, 100.0, 1e6], requires_grad=True)
    for desirable in (True, False):
        losses = diffusion_kto_loss(rewards, torch.full((5,), desirable), torch.tensor(0.0), loss_type)
        (gradient,) = torch.autograd.grad(losses.sum(), rewards)
        assert losses.isfinite().all() and gradient.isfinite().all()


def test_what_accumulation_costs_is_what_the_page_says():
    """
    A step is a forward of the reference, forward and backward of the policy, and with accumulation a forward more. Activation
    checkpointing makes the policy's forward twice.
    """
    counts = COUNTED["sd15"]
    forward = counts["forward"]
    ratios = [
        1 + forward / ((1 + is_checkpointed) * forward + counts[trained])
        for is_checkpointed in (0, 1)
        for trained in ("full", "lora")
    ]
    page = (Path(__file__).parents[1] / "docs/source/diffusion_kto_trainer.md").read_text(encoding="utf-8")
    told = "costs {:.2f} times as much for all weights and {:.2f} times as much for a LoRA of rank 64; "
    told += "with activation checkpointing, the default, {:.2f} and {:.2f} times."
    assert told.format(*ratios) in " ".join(page.split())
