# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""One pure function per objective: per-sample errors in, per-sample loss and rewards out."""

import torch
import torch.nn.functional as F

from .noising import per_sample_errors


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


def strengthened_target(conditioned: torch.Tensor, plain: torch.Tensor, strength: float) -> torch.Tensor:
    """
    The expert's target at another strength, `e(y) + s (e(y + A) - e(y))` (ours): like classifier-free guidance with the
    prompt in place of the empty one.

    Args:
        conditioned (`torch.Tensor` of shape `(B, C, h, w)`):
            The expert's prediction for the prompt with attributes.
        plain (`torch.Tensor` of shape `(B, C, h, w)`):
            The expert's prediction for the prompt alone.
        strength (`float`):
            The strength `s`; 1 is `conditioned`.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32.
    """
    return plain.float() + strength * (conditioned.float() - plain.float())


def reflected_target(ref_pred: torch.Tensor, rejected_target: torch.Tensor, weight: float) -> torch.Tensor:
    """
    What the stabilised CPO loss pulls towards in place of pushing away from `z_l`: its reflection through the reference,
    `sg(e_ref + w (e_ref - z_l))`. The paper does not give its form; this one is ours. With `w = 1` its gradient where the
    policy is the reference equals that of the term it replaces.

    Args:
        ref_pred (`torch.Tensor` of shape `(B, C, h, w)`):
            Prediction `e_ref` of the reference.
        rejected_target (`torch.Tensor` of shape `(B, C, h, w)`):
            The expert's negative prediction `z_l`.
        weight (`float`):
            The reflection weight `w`.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32, without gradient.
    """
    ref_pred = ref_pred.detach().float()
    return ref_pred + weight * (ref_pred - rejected_target.detach().float())


def complex_po_loss(
    chosen_errors: torch.Tensor,
    rejected_errors: torch.Tensor,
    ref_chosen_errors: torch.Tensor,
    ref_rejected_errors: torch.Tensor,
    beta: float,
    weights: torch.Tensor,
    stabilized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The loss of complex preference optimisation (CPO, arXiv 2601.04300). Plain, it moves the prediction `e` towards the
    expert's positive target and away from its negative one,

        L = -log sigma( -0.5 beta omega [ (|z_w - e|^2 - |z_w - e_ref|^2) - (|z_l - e|^2 - |z_l - e_ref|^2) ] )

    whose last term is concave in `e` and without bound. Stabilised, a convex term takes its place,

        L = -log sigma( -0.5 beta omega [ (|z_w - e|^2 - |z_w - e_ref|^2) + (|z_t - e|^2 - |z_t - e_ref|^2) ] )

    with the fixed `z_t` of [`losses.reflected_target`]. Both squared errors are means over channels and positions.

    Args:
        chosen_errors (`torch.Tensor` of shape `(B,)`):
            `|z_w - e|^2` of the policy, float32.
        rejected_errors (`torch.Tensor` of shape `(B,)`):
            `|z_l - e|^2` of the policy; `|z_t - e|^2` if stabilised.
        ref_chosen_errors (`torch.Tensor` of shape `(B,)`):
            `|z_w - e_ref|^2` of the reference.
        ref_rejected_errors (`torch.Tensor` of shape `(B,)`):
            `|z_l - e_ref|^2` of the reference; `|z_t - e_ref|^2` if stabilised.
        beta (`float`):
            How strongly the policy is held to the reference; half of it multiplies the errors, as in
            [`losses.diffusion_dpo_loss`].
        weights (`torch.Tensor` of shape `(B,)`):
            The weights `omega`. A term that a sample lacks has errors 0, and so no part in the loss.
        stabilized (`bool`):
            Which of the two.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(B,)`: the losses, the chosen rewards (positive:
        closer to `z_w` than the reference) and the rejected rewards (negative: further from `z_l`, or closer to its
        reflection, than the reference). Their difference is the argument of the sigmoid. The rewards carry no gradient.
    """
    scale = -0.5 * beta * weights
    chosen_rewards = scale * (chosen_errors - ref_chosen_errors)
    rejected_rewards = (-scale if stabilized else scale) * (rejected_errors - ref_rejected_errors)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def complex_po_diagnostics(
    losses: torch.Tensor,
    chosen_errors: torch.Tensor,
    second_errors: torch.Tensor,
    ref_chosen_errors: torch.Tensor,
    ref_second_errors: torch.Tensor,
    model_pred: torch.Tensor,
    ref_pred: torch.Tensor,
    beta: float,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    How CPO moves the policy: the size of each term's gradient, and how far the policy has moved.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            The losses of [`losses.complex_po_loss`].
        chosen_errors, second_errors, ref_chosen_errors, ref_second_errors (`torch.Tensor` of shape `(B,)`):
            The errors that it was given, the second term's being those of `z_l` or of its reflection.
        model_pred (`torch.Tensor` of shape `(B, C, h, w)`):
            The policy's prediction.
        ref_pred (`torch.Tensor` of shape `(B, C, h, w)`):
            The reference's prediction.
        beta (`float`):
            As in the loss.
        weights (`torch.Tensor` of shape `(B,)`):
            As in the loss.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(B,)`, without gradient: the norm of the gradient of
        each of the two terms with respect to the prediction, and the drift: the policy's squared distance from the reference
        over that of its targets. At the minimum of the stabilised loss the drift is at most 1, and at most 1/2 where a sample
        has both terms.
    """
    with torch.no_grad():
        slope = beta * weights * (1 - (-losses).exp()) / model_pred[0].numel() ** 0.5
        targets = (ref_chosen_errors + ref_second_errors).clamp(min=1e-12)
        drift = per_sample_errors(model_pred, ref_pred) / targets
        return slope * chosen_errors.sqrt(), slope * second_errors.sqrt(), drift
