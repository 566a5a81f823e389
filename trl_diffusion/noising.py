# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Errors of each sample and weights of timesteps, in float32 whatever precision the models run in."""

import torch

from .process import Process


def per_sample_errors(
    model_pred: torch.Tensor, target: torch.Tensor, masks: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Mean squared error of each sample, `mean(M . (target - model_pred)^2)` over channels and latent positions.

    Args:
        model_pred (`torch.Tensor` of shape `(B, C, h, w)`):
            The model's prediction, in any precision.
        target (`torch.Tensor` of shape `(B, C, h, w)`):
            What it should have predicted.
        masks (`torch.Tensor` of shape `(B, h, w)`, *optional*):
            Weights of the positions, see [`masks.instance_masks`]; all ones if left out.

    Returns:
        `torch.Tensor` of shape `(B,)`: float32 errors.
    """
    squared_errors = (target.float() - model_pred.float()).square()
    if masks is not None:
        squared_errors = masks[:, None] * squared_errors
    return squared_errors.flatten(1).mean(dim=1)


def timestep_weights(timesteps: torch.Tensor, process: Process, weighting: str) -> torch.Tensor:
    """
    Weights `omega(lambda_t)` of timesteps, as functions of the signal-to-noise ratio `SNR = a_t^2 / s_t^2`, the exponential
    of `lambda_t`. They are defined as weights of errors of the noise,

        constant   1
        min_snr    min(SNR, 5) / SNR          (arXiv:2303.09556)
        sigmoid    sigma(-lambda_t) = 1 / (1 + SNR)      (arXiv:2303.00848)

    and converted to weights of the errors that the model makes, see [`process.Process.noise_errors_per_error`]; but
    `constant` is 1 for every model.

    Args:
        timesteps (`torch.Tensor` of shape `(B,)`):
            Timesteps.
        process ([`process.Process`]):
            The model's process.
        weighting (`str`):
            `"constant"`, `"min_snr"` or `"sigmoid"`.

    Returns:
        `torch.Tensor` of shape `(B,)`: float32 weights in [0, 1].

    Raises:
        `ValueError`: If `weighting` is something else.
    """
    snr = process.snr(timesteps)
    if weighting == "constant":
        return torch.ones_like(snr)
    if weighting == "min_snr":
        weights = (5 / snr).clamp(max=1)
    elif weighting == "sigmoid":
        weights = 1 / (1 + snr)
    else:
        raise ValueError(f"`weighting` must be 'constant', 'min_snr' or 'sigmoid', got {weighting!r}.")
    return weights * process.noise_errors_per_error(timesteps)
