# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import math

import pytest
import torch

from trl_diffusion.losses import diffusion_dpo_loss


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


def test_samples_are_separate():
    """Losses and rewards are one per sample, each what it is alone."""
    batch = errors()
    together = torch.stack(diffusion_dpo_loss(*batch, beta=10.0))
    assert together.shape == (3, 6)
    alone = [torch.stack(diffusion_dpo_loss(*batch[:, i : i + 1], beta=10.0)) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


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


def test_rewards_carry_no_gradient():
    """Only the losses are differentiable."""
    losses, chosen_rewards, rejected_rewards = diffusion_dpo_loss(*errors().requires_grad_(), beta=10.0)
    assert losses.requires_grad
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad


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
