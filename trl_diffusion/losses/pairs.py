# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The losses of image pairs, from errors of samples to losses and rewards of samples."""

import torch
import torch.nn.functional as F


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
    chosen_rewards = -0.5 * beta * (chosen_errors - ref_chosen_errors)
    rejected_rewards = -0.5 * beta * (rejected_errors - ref_rejected_errors)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
