# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The losses of image pairs, from errors of samples to losses and rewards of samples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class PairErrors(NamedTuple):
    """
    The errors that a loss of pairs is computed from: masked mean squared errors `d`, one for each pair `(B,)`, or one for each
    pair and region `(B, R)`.

    Attributes:
        chosen (`torch.Tensor` of shape `(B,)` or `(B, R)`):
            `d^w` of the policy on the chosen images, float32.
        rejected (`torch.Tensor` of shape `(B,)` or `(B, R)`):
            `d^l` of the policy on the rejected images.
        ref_chosen (`torch.Tensor` of shape `(B,)` or `(B, R)`, *optional*):
            `d^w_ref` of the reference on the chosen images; `None` where a loss has no reference.
        ref_rejected (`torch.Tensor` of shape `(B,)` or `(B, R)`, *optional*):
            `d^l_ref` of the reference on the rejected images.
        drift (`torch.Tensor` of shape `(B,)` or `(B, R)`, *optional*):
            `|e^w - e^w_ref|^2`, the masked mean squared distance of the two predictions for the chosen images; `None` where a
            loss does not read it.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None
    drift: torch.Tensor | None = None

    def rewards(self, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`-0.5 beta (d - d_ref)` of the chosen and of the rejected images. Their difference is the margin `u`."""
        return -0.5 * beta * (self.chosen - self.ref_chosen), -0.5 * beta * (self.rejected - self.ref_rejected)


class PairSettings(NamedTuple):
    """
    What the losses of pairs depend on besides the errors.

    Attributes:
        beta (`float`):
            How strongly the policy is kept near the reference. Half of it multiplies the errors. In MaPO, the weight of the
            comparison.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of the labels that are taken to be wrong.
        num_timesteps (`int`, *optional*, defaults to `1000`):
            Number of timesteps of the model's process, which MaPO reads.
    """

    beta: float
    label_smoothing: float = 0.0
    num_timesteps: int = 1000


PairLosses = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # losses, rewards of the chosen and of the rejected images


def diffusion_dpo_loss(
    chosen_errors: torch.Tensor,
    rejected_errors: torch.Tensor,
    ref_chosen_errors: torch.Tensor,
    ref_rejected_errors: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The Diffusion-DPO loss (arXiv:2311.12908, equation 14), or the IAPO loss if the errors are weighted by instance masks.

        L = -log sigma( -0.5 beta [ (d^w - d^w_ref) - (d^l - d^l_ref) ] )

    where `d` is the mean squared error of a sample, `w` the chosen and `l` the rejected image.

    In this library, `beta` is defined as in the papers and in the published training scripts of Diffusion-DPO, InPO and SmPO:
    half of it multiplies the difference of mean squared errors. The `beta` of diffusers' DPO script for Stable Diffusion is half
    of this one (2500 there is 5000 here), that of its script for SDXL is the same.

    Args:
        chosen_errors (`torch.Tensor` of shape `(B,)`):
            Errors of the policy on the chosen images, float32.
        rejected_errors (`torch.Tensor` of shape `(B,)`):
            Errors of the policy on the rejected images, float32.
        ref_chosen_errors (`torch.Tensor` of shape `(B,)`):
            Errors of the reference on the chosen images, float32.
        ref_rejected_errors (`torch.Tensor` of shape `(B,)`):
            Errors of the reference on the rejected images, float32.
        beta (`float`):
            How strongly the policy is kept near the reference.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(B,)`: the losses, the rewards of the chosen
        images `-0.5 beta (d^w - d^w_ref)`, and the rewards of the rejected images. The rewards have no gradient.
    """
    errors = PairErrors(chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors)
    return sigmoid_loss(errors, PairSettings(beta))


def sigmoid_loss(errors: PairErrors, settings: PairSettings) -> PairLosses:
    """
    [`losses.diffusion_dpo_loss`] with smoothed labels: of the labels, the share `a = label_smoothing` is taken to be wrong.

        L = -(1 - a) log sigma(u) - a log sigma(-u)

    Args:
        errors ([`losses.PairErrors`]):
            The errors, with those of the reference.
        settings ([`losses.PairSettings`]):
            `beta` and `label_smoothing` are read.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of the shape of the errors: the losses, and the rewards of the
        chosen and of the rejected images. The rewards have no gradient.
    """
    chosen_rewards, rejected_rewards = errors.rewards(settings.beta)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - settings.label_smoothing) * F.logsigmoid(margins)
    losses = losses - settings.label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(errors: PairErrors, settings: PairSettings) -> PairLosses:
    """
    IPO (arXiv:2310.12036) on the margin of Diffusion-DPO: it stops at a margin, where the sigmoid never stops.

        L = (u - 1/2)^2 = beta^2 (u / beta - 1 / (2 beta))^2

    The right side without the factor `beta^2` is the published form. Its gradient at `beta = 2000` is about a million times
    smaller than the sigmoid's, so small that the epsilon of Adam suppresses it. The factor changes no minimum.

    Args:
        errors ([`losses.PairErrors`]):
            The errors, with those of the reference.
        settings ([`losses.PairSettings`]):
            `beta` is read.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: as [`losses.sigmoid_loss`].
    """
    chosen_rewards, rejected_rewards = errors.rewards(settings.beta)
    losses = (chosen_rewards - rejected_rewards - 0.5).square()
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def hinge_loss(errors: PairErrors, settings: PairSettings) -> PairLosses:
    """
    The hinge loss (SLiC, arXiv:2305.10425) on the margin of Diffusion-DPO: a pair whose margin is above 1 teaches nothing more.

        L = max(0, 1 - u)

    Args:
        errors ([`losses.PairErrors`]):
            The errors, with those of the reference.
        settings ([`losses.PairSettings`]):
            `beta` is read.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: as [`losses.sigmoid_loss`].
    """
    chosen_rewards, rejected_rewards = errors.rewards(settings.beta)
    losses = F.relu(1 - (chosen_rewards - rejected_rewards))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def mapo_loss(errors: PairErrors, settings: PairSettings) -> PairLosses:
    """
    MaPO (arXiv:2406.06424), which has no reference: the error of the chosen image, and a comparison of both images.

        L = d^w - beta log sigma( T [ f(d^w) - f(d^l) ] ),    f(d) = s d / (exp(s d) - 1),    s = 1/2

    `T` is the number of timesteps. `f` falls as `d` grows, and `f(0) = 1`.

    Args:
        errors ([`losses.PairErrors`]):
            The errors of the policy.
        settings ([`losses.PairSettings`]):
            `beta` and `num_timesteps` are read.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: as [`losses.sigmoid_loss`], but the rewards are `beta T f(d)`.
    """
    chosen, rejected = (settings.num_timesteps * _mapo_likelihood(d) for d in (errors.chosen, errors.rejected))
    losses = errors.chosen - settings.beta * F.logsigmoid(chosen - rejected)
    return losses, settings.beta * chosen.detach(), settings.beta * rejected.detach()


def _mapo_likelihood(errors: torch.Tensor) -> torch.Tensor:
    # x / (exp(x) - 1) by its series near 0, where the two terms of the quotient's derivative cancel
    x = 0.5 * errors
    is_small = x.abs() < 0.1
    series = 1 - x / 2 + x.square() / 12 - x.pow(4) / 720
    apart = torch.where(is_small, 1.0, x).clamp(max=80)  # exp(80) is near the end of float32, and the quotient is 0
    return torch.where(is_small, series, apart / torch.expm1(apart))


def dspo_loss(errors: PairErrors, settings: PairSettings) -> PairLosses:
    """
    DSPO (Zhu et al., ICLR 2025): the chosen image's noise is predicted beyond where the reference predicts it, the further the
    less the pair is learned.

        L = | (e^w - eps) - k (e^w - e^w_ref) |^2,    k = beta (1 - sigma(u))

    The right side is computed from the errors: `(1 - k) d^w + k d^w_ref - k (1 - k) |e^w - e^w_ref|^2`. As in the published
    code, the gradient goes through `u` too.

    Args:
        errors ([`losses.PairErrors`]):
            The errors, with those of the reference and the drift.
        settings ([`losses.PairSettings`]):
            `beta` is read.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: as [`losses.sigmoid_loss`].
    """
    chosen_rewards, rejected_rewards = errors.rewards(settings.beta)
    k = settings.beta * torch.sigmoid(rejected_rewards - chosen_rewards)
    losses = (1 - k) * errors.chosen + k * errors.ref_chosen - k * (1 - k) * errors.drift
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def dmpo_loss(errors: PairErrors, settings: PairSettings) -> PairLosses:
    """
    DMPO (arXiv:2507.07510): the reverse Kullback-Leibler divergence of two coins, `p` of the policy and `q` of the labels.

        L = p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q)),    p = sigma(u),    q = 1 - label_smoothing

    Its minimum is where `p = q`.

    Args:
        errors ([`losses.PairErrors`]):
            The errors, with those of the reference.
        settings ([`losses.PairSettings`]):
            `beta` and `label_smoothing` are read; the latter must be above 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: as [`losses.sigmoid_loss`].
    """
    chosen_rewards, rejected_rewards = errors.rewards(settings.beta)
    margins = chosen_rewards - rejected_rewards
    wrong = torch.full_like(margins, settings.label_smoothing)
    losses = torch.sigmoid(margins) * (F.logsigmoid(margins) - torch.log1p(-wrong))
    losses = losses + torch.sigmoid(-margins) * (F.logsigmoid(-margins) - torch.log(wrong))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


PAIR_LOSSES: dict[str, Callable[[PairErrors, PairSettings], PairLosses]] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "mapo": mapo_loss,
    "dspo": dspo_loss,
    "dmpo": dmpo_loss,
}
