# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The losses of complex preference optimisation (CPO, arXiv 2601.04300), their targets and diagnostics."""

import torch
import torch.nn.functional as F

from ..noising import per_sample_errors


def strengthened_target(conditioned: torch.Tensor, plain: torch.Tensor, strength: float) -> torch.Tensor:
    """
    The target of the expert at another strength, `e(y) + s (e(y + A) - e(y))` (ours). This is like classifier-free guidance with
    the plain prompt instead of the empty one.

    Args:
        conditioned (`torch.Tensor` of shape `(B, C, h, w)`):
            The expert's prediction for the prompt with attributes.
        plain (`torch.Tensor` of shape `(B, C, h, w)`):
            The expert's prediction for the prompt alone.
        strength (`float`):
            The strength `s`. With 1, the result is `conditioned`.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32.
    """
    return plain.float() + strength * (conditioned.float() - plain.float())


def reflected_target(ref_pred: torch.Tensor, rejected_target: torch.Tensor, weight: float) -> torch.Tensor:
    """
    The reflection of `z_l` through the reference, `sg(e_ref + w (e_ref - z_l))`. The stabilised CPO loss pulls towards it instead
    of pushing away from `z_l`. We do not know the target of the paper; this one is ours. With `w = 1`, the gradient equals that of
    the unstabilised term if the policy equals the reference.

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
    The loss of complex preference optimisation (CPO, arXiv 2601.04300). The unstabilised loss moves the prediction `e` towards the
    positive target of the expert and away from the negative one,

        L = -log sigma( -0.5 beta omega [ (|z_w - e|^2 - |z_w - e_ref|^2) - (|z_l - e|^2 - |z_l - e_ref|^2) ] )

    Its last term is concave in `e` and unbounded. The stabilised loss replaces it by a convex term,

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
            How strongly the policy is kept near the reference. Half of it multiplies the errors, as in
            [`losses.diffusion_dpo_loss`].
        weights (`torch.Tensor` of shape `(B,)`):
            The weights `omega`. If a sample does not have one of the terms, its errors are 0, so it does not contribute.
        stabilized (`bool`):
            Whether to use the stabilised loss.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(B,)`: the losses, the chosen rewards (positive if the
        policy is closer to `z_w` than the reference) and the rejected rewards (negative if the policy is further from `z_l`, or
        closer to its reflection, than the reference). Their difference is the argument of the sigmoid. The rewards have no
        gradient.
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
    Diagnostics of CPO: the size of the gradient of each term, and how far the policy has moved.

    Args:
        losses (`torch.Tensor` of shape `(B,)`):
            The losses of [`losses.complex_po_loss`].
        chosen_errors, second_errors, ref_chosen_errors, ref_second_errors (`torch.Tensor` of shape `(B,)`):
            The errors that the loss was computed from. Those of the second term are of `z_l` or of its reflection.
        model_pred (`torch.Tensor` of shape `(B, C, h, w)`):
            The policy's prediction.
        ref_pred (`torch.Tensor` of shape `(B, C, h, w)`):
            The reference's prediction.
        beta (`float`):
            As in the loss.
        weights (`torch.Tensor` of shape `(B,)`):
            As in the loss.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(B,)`, without gradient: the norms of the gradients of
        the two terms with respect to the prediction, and the drift, which is the squared distance of the policy from the
        reference, divided by that of its targets. At the minimum of the stabilised loss, the drift is at most 1, and at most 1/2
        for a sample with both terms.
    """
    with torch.no_grad():
        slope = beta * weights * (1 - (-losses).exp()) / model_pred[0].numel() ** 0.5
        targets = (ref_chosen_errors + ref_second_errors).clamp(min=1e-12)
        drift = per_sample_errors(model_pred, ref_pred) / targets
        return slope * chosen_errors.sqrt(), slope * second_errors.sqrt(), drift
