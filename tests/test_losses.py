# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from trl_diffusion.losses import complex_po_loss, diffusion_dpo_loss, reflected_target, strengthened_target


def errors(seed: int = 0, num: int = 6) -> torch.Tensor:
    """Chosen, rejected, reference chosen, reference rejected."""
    return torch.rand(4, num, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    """
    beta 4, errors 0.3 and 0.5, references 0.4 and 0.4: rewards -2 * (-0.1) = 0.2 and -2 * 0.1 = -0.2, margin 0.4, loss
    -log sigma(0.4) = log(1 + e^-0.4) = 0.5130153.
    """
    losses, chosen_rewards, rejected_rewards = diffusion_dpo_loss(
        *(torch.tensor([x]) for x in (0.3, 0.5, 0.4, 0.4)), beta=4.0
    )
    assert chosen_rewards.item() == pytest.approx(0.2, abs=1e-6)
    assert rejected_rewards.item() == pytest.approx(-0.2, abs=1e-6)
    assert losses.item() == pytest.approx(0.5130153, abs=1e-6)


def test_each_error_enters_where_it_belongs():
    """The four errors have the signs -, +, +, - in the margin: 2 * (-1 + 20 + 300 - 4000) at beta 4."""
    values = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 20.0, 300.0, 4000.0))
    losses, chosen_rewards, rejected_rewards = diffusion_dpo_loss(*values, beta=4.0)
    assert chosen_rewards.item() == -2 * (1 - 300)
    assert rejected_rewards.item() == -2 * (20 - 4000)
    assert losses.item() == 2 * (4000 - 20 + 1 - 300)  # -log sigma(x) = -x far below 0


def test_swapping_chosen_and_rejected_negates_the_margin():
    """Exchanging the images of a pair exchanges the rewards: the margin m becomes -m, and the losses differ by m."""
    chosen, rejected, ref_chosen, ref_rejected = errors()
    losses, *rewards = diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=10.0)
    swapped_losses, *swapped_rewards = diffusion_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=10.0)
    assert torch.equal(rewards[0], swapped_rewards[1])
    assert torch.equal(rewards[1], swapped_rewards[0])
    # -log sigma(-m) = -log sigma(m) + m
    torch.testing.assert_close(swapped_losses, losses + rewards[0] - rewards[1])


@pytest.mark.parametrize("beta", [1.0, 2000.0, 5000.0])
def test_policy_equal_to_reference_gives_ln_2(beta):
    """Before the first step the loss is ln 2 and all rewards are exactly zero, whatever beta."""
    chosen, rejected, _, _ = errors()
    losses, chosen_rewards, rejected_rewards = diffusion_dpo_loss(chosen, rejected, chosen, rejected, beta)
    torch.testing.assert_close(losses, torch.full((6,), math.log(2)))
    assert chosen_rewards.eq(0).all()
    assert rejected_rewards.eq(0).all()


def test_gradient_by_hand():
    """dL/d(chosen error) = 0.5 beta sigma(-margin) and dL/d(rejected error) is its negative, so descent lowers the first."""
    chosen, rejected, ref_chosen, ref_rejected = errors().double()
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, chosen_rewards, rejected_rewards = diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=3.0)
    losses.sum().backward()
    expected = 1.5 * torch.sigmoid(rejected_rewards - chosen_rewards)
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)
    assert (expected > 0).all()


def test_lower_chosen_error_lowers_the_loss():
    """The loss falls when the chosen image is predicted better and rises when the rejected one is."""
    chosen, rejected, ref_chosen, ref_rejected = errors()
    loss = diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=10.0)[0]
    assert (diffusion_dpo_loss(chosen - 0.1, rejected, ref_chosen, ref_rejected, beta=10.0)[0] < loss).all()
    assert (diffusion_dpo_loss(chosen, rejected - 0.1, ref_chosen, ref_rejected, beta=10.0)[0] > loss).all()


@pytest.mark.parametrize("factor", [2, 8, 1024])
def test_beta_scales_the_rewards(factor):
    """Rewards are proportional to beta (exactly, for powers of two), and the loss is -log sigma of their difference."""
    small, large = (diffusion_dpo_loss(*errors(), beta=beta) for beta in (0.5, 0.5 * factor))
    assert torch.equal(large[1], factor * small[1])
    assert torch.equal(large[2], factor * small[2])
    torch.testing.assert_close(large[0], torch.log1p(torch.exp(large[2] - large[1])))


def test_large_margins_stay_finite():
    """At margins of +-1e4 the loss is 0 and 1e4, and its gradient is finite."""
    values = torch.tensor([[0.0, 4.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    losses = diffusion_dpo_loss(*values, beta=5000.0)[0]
    losses.sum().backward()
    assert losses.tolist() == [0.0, 10000.0]
    assert values.grad.tolist() == [[0.0, 2500.0], [0.0, -2500.0], [0.0, -2500.0], [0.0, 2500.0]]


# ---- Complex preference optimisation ----


def cpo(e, e_ref, z_w, z_l, stabilized, beta=100.0, weight=1.0, omega=1.0):
    """Losses as functions of the prediction, in float64."""

    def errors(prediction, target):
        return (target - prediction).square().flatten(1).mean(dim=1)

    target = reflected_target(e_ref, z_l, weight).to(e.dtype) if stabilized else z_l
    weights = torch.full((len(e),), omega, dtype=e.dtype)
    return complex_po_loss(
        errors(e, z_w), errors(e, target), errors(e_ref, z_w), errors(e_ref, target), beta, weights, stabilized
    )


def predictions(seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    """e_ref, z_w, z_l: targets around the reference, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    e_ref = torch.randn(3, 4, 5, 6, generator=generator)
    return [
        tensor.to(dtype)
        for tensor in (e_ref, *(e_ref + 0.3 * torch.randn(3, 4, 5, 6, generator=generator) for _ in "wl"))
    ]


def test_cpo_gradients_agree_where_the_policy_is_the_reference():
    """At theta = ref and with weight 1, stabilised and unstabilised loss have one gradient, beta (z_l - z_w) / 2D."""
    e_ref, z_w, z_l = predictions()
    gradients = []
    for stabilized in (True, False):
        e = e_ref.clone().requires_grad_()
        losses, *_ = cpo(e, e_ref, z_w, z_l, stabilized)
        assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-12)
        gradients.append(torch.autograd.grad(losses.sum(), e)[0])
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[0].abs().max()
    torch.testing.assert_close(gradients[1], 100.0 * (z_l - z_w) / (2 * e_ref[0].numel()), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_the_stabilised_minimiser(weight):
    """It is e_ref + ((z_w - e_ref) + w (e_ref - z_l)) / 2: no gradient there, and more loss in any direction."""
    e_ref, z_w, z_l = predictions(1)
    minimiser = (e_ref + ((z_w - e_ref) + weight * (e_ref - z_l)) / 2).requires_grad_()
    losses, *_ = cpo(minimiser, e_ref, z_w, z_l, True, weight=weight)
    assert torch.autograd.grad(losses.sum(), minimiser)[0].abs().max() < 1e-6
    for seed in range(20):
        direction = torch.randn(minimiser.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        nearby, *_ = cpo(minimiser + 0.1 * direction, e_ref, z_w, z_l, True, weight=weight)
        assert (nearby > losses).all()


def test_the_unstabilised_loss_has_no_minimum():
    """Away from z_l it falls for ever, where the stabilised one has turned to rise."""
    e_ref, z_w, z_l = predictions(2)
    away = z_w - z_l
    ends = {
        stabilized: [cpo(e_ref + k * away, e_ref, z_w, z_l, stabilized)[0].sum().item() for k in (0, 0.5, 2, 8, 32)]
        for stabilized in (True, False)
    }
    assert ends[False] == sorted(ends[False], reverse=True) and ends[False][-1] < 1e-6
    assert ends[True][1] < ends[True][0] < ends[True][2] < ends[True][3] < ends[True][4]


def test_swapping_the_targets_negates_the_unstabilised_margin():
    """A_pos for A_neg: the margin changes its sign and nothing else; the stabilised one does something else."""
    e_ref, z_w, z_l = predictions(3)
    e = e_ref + 0.1 * predictions(4)[0]
    _, chosen, rejected = cpo(e, e_ref, z_w, z_l, False)
    _, swapped_chosen, swapped_rejected = cpo(e, e_ref, z_l, z_w, False)
    torch.testing.assert_close(swapped_chosen - swapped_rejected, rejected - chosen, atol=1e-12, rtol=0)
    _, chosen, rejected = cpo(e, e_ref, z_w, z_l, True)
    _, swapped_chosen, swapped_rejected = cpo(e, e_ref, z_l, z_w, True)
    assert ((swapped_chosen - swapped_rejected) - (rejected - chosen)).abs().min() > 0.1


@pytest.mark.parametrize("stabilized", [True, False])
def test_no_gradient_reaches_the_targets(stabilized):
    """The reflection carries none to the reference or to z_l, nor do the rewards; the trainer's targets have none to carry."""
    e_ref, z_w, z_l = (tensor.requires_grad_() for tensor in predictions(5))
    assert not reflected_target(e_ref, z_l, 1.0).requires_grad
    e = e_ref.detach().clone().requires_grad_()
    losses, chosen, rejected = cpo(e, e_ref.detach(), z_w.detach(), z_l, stabilized)
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    if stabilized:
        to_policy, to_target = torch.autograd.grad(losses.sum(), [e, z_l], allow_unused=True)
        assert to_policy.abs().max() > 0 and to_target is None


@pytest.mark.parametrize("stabilized", [True, False])
def test_the_cpo_loss_is_the_published_formula(stabilized):
    """-log sigma(-0.5 beta omega [(|z_w - e|^2 - |z_w - e_ref|^2) -+ (...)]), number by number."""
    values = [torch.tensor([number]) for number in (0.5, 0.7, 0.9, 0.4)]  # policy on both, reference on both
    sign = 1 if stabilized else -1
    margin = -0.5 * 10.0 * 0.3 * ((0.5 - 0.9) + sign * (0.7 - 0.4))
    losses, chosen, rejected = complex_po_loss(*values, 10.0, torch.tensor([0.3]), stabilized)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-6)
    assert (chosen - rejected).item() == pytest.approx(margin, abs=1e-6)
    assert chosen.item() == pytest.approx(0.6, abs=1e-6)  # closer to z_w than the reference: positive


def test_strength_extends_the_step_from_the_plain_prediction():
    """0 is the plain prediction, 1 the conditioned one, 2 as far again."""
    plain, conditioned, _ = predictions(6, torch.float32)
    torch.testing.assert_close(strengthened_target(conditioned, plain, 0.0), plain)
    torch.testing.assert_close(strengthened_target(conditioned, plain, 1.0), conditioned)
    torch.testing.assert_close(strengthened_target(conditioned, plain, 2.0), 2 * conditioned - plain)
    assert strengthened_target(conditioned.bfloat16(), plain.bfloat16(), 1.5).dtype == torch.float32
    assert reflected_target(plain.bfloat16(), conditioned.bfloat16(), 1.0).dtype == torch.float32
