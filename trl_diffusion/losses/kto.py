# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The loss of single images with a label, from errors of samples to losses and rewards of samples."""

import torch
import torch.nn.functional as F


def diffusion_kto_rewards(errors: torch.Tensor, ref_errors: torch.Tensor, beta: float) -> torch.Tensor:
    """
    The rewards of Diffusion-KTO, `r = -0.5 beta (d - d_ref)`.

    Half of `beta` multiplies the difference of mean squared errors, as in [`losses.diffusion_dpo_loss`]. In the published training
    script of Diffusion-KTO all of it does: its 1000 is 2000 here.

    Args:
        errors (`torch.Tensor` of shape `(B,)`):
            Mean squared errors `d` of the policy, float32.
        ref_errors (`torch.Tensor` of shape `(B,)`):
            Mean squared errors `d_ref` of the reference, float32.
        beta (`float`):
            How strongly the policy is kept near the reference.

    Returns:
        `torch.Tensor` of shape `(B,)`: positive where the policy denoises the image better than the reference.
    """
    return -0.5 * beta * (errors - ref_errors)


def diffusion_kto_loss(
    rewards: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """
    The Diffusion-KTO loss (arXiv:2404.04465), by the label of each image.

        x = s (r - kl),    s = 1 for a desirable image, -1 for an undesirable one
        L = w (1 - sigma(x))        "kto"
        L = -w log sigma(x)         "log_sigmoid", which the paper calls loss-averse
        L = w log sigma(-x)         "risk_seeking", which is negative

    These are the utilities of the paper, `sigma(x)`, `log sigma(x)` and `-log sigma(-x)`, maximised: their slopes are largest at 0, at
    negative `x` and at positive `x`.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            The rewards `r` of [`losses.diffusion_kto_rewards`].
        desirable (`torch.Tensor` of shape `(B,)`, bool):
            Which images are desirable.
        kl (`torch.Tensor`, a scalar):
            The mean of the rewards of the whole optimizer step, at least 0. It has no part in the gradient.
        loss_type (`str`, *optional*, defaults to `"kto"`):
            The utility.
        desirable_weight (`float`, *optional*, defaults to `1.0`):
            Weight `w` of the desirable images.
        undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Weight `w` of the undesirable images.

    Returns:
        `torch.Tensor` of shape `(B,)`: the losses.
    """
    gains = rewards - kl.detach()
    gains = torch.where(desirable, gains, -gains)
    if loss_type == "kto":
        losses = F.sigmoid(-gains)  # 1 - sigma(x), without the rounding of a difference
    else:
        losses = -F.logsigmoid(gains) if loss_type == "log_sigmoid" else F.logsigmoid(-gains)
    return torch.where(desirable, desirable_weight, undesirable_weight) * losses
