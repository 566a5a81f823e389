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

"""One pure function per objective: per-sample errors in, per-sample loss and rewards out."""

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
    The Diffusion-DPO loss (arXiv:2311.12908, equation 14); with errors under instance masks, the IAPO loss.

        L = -log sigma( -0.5 beta [ (d^w - d^w_ref) - (d^l - d^l_ref) ] )

    where `d` is the mean squared error on a sample, `w` the chosen and `l` the rejected image.

    `beta` means here, and everywhere in this library, what it means in the papers and in the training scripts published
    with Diffusion-DPO, InPO and SmPO: half of it multiplies the difference of mean squared errors. The `beta` of
    diffusers' Stable Diffusion DPO script is half of it (2500 there is 5000 here), that of its SDXL script is the same.

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
            How strongly the policy is held to the reference.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(B,)`: the losses, the rewards of the chosen
        images `-0.5 beta (d^w - d^w_ref)`, and the rewards of the rejected images. The rewards carry no gradient.
    """
    chosen_rewards = -0.5 * beta * (chosen_errors - ref_chosen_errors)
    rejected_rewards = -0.5 * beta * (rejected_errors - ref_rejected_errors)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
