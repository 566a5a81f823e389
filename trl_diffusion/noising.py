# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Keyed randomness, the forward process, training targets and per-sample errors.

Every random number of training is a pure function of a key such as (seed, global step, row id), never of the global
generators: eight micro-batches of one equal one of eight, two processes equal one, and a resumed run equals one that was
never interrupted. Everything here is float32, whatever precision the models run in.
"""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """
    Makes a random generator from a key.

    Args:
        *key (`int` or `str`):
            The parts of the key, such as the run's seed, the global step, the row's id and what is drawn.

    Returns:
        `torch.Generator`: a generator on the CPU (so that every device sees the same numbers), seeded with a hash of the
        key.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def keyed_noise(keys: list[tuple], shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """
    Draws standard normal noise, one independent draw for each key.

    Args:
        keys (`list[tuple]` of length `B`):
            One key a row, see [`keyed_generator`].
        shape (`tuple[int, ...]`):
            Shape of one row's noise, such as `(C, h, w)`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the result goes.

    Returns:
        `torch.Tensor` of shape `(B, *shape)`: float32.
    """
    noise = torch.stack([torch.randn(shape, generator=keyed_generator(*key, "noise")) for key in keys])
    return noise.to(device, non_blocking=True)


def keyed_timesteps(keys: list[tuple], low: int, high: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """
    Draws uniform timesteps, one for each key.

    Args:
        keys (`list[tuple]` of length `B`):
            One key a row, see [`keyed_generator`].
        low (`int`):
            Smallest timestep.
        high (`int`):
            One above the largest timestep.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the result goes.

    Returns:
        `torch.Tensor` of shape `(B,)`: int64 timesteps in [low, high).
    """
    timesteps = [torch.randint(low, high, (), generator=keyed_generator(*key, "timestep")) for key in keys]
    return torch.stack(timesteps).to(device, non_blocking=True)


def fixed_timesteps(low: int, high: int, num: int) -> list[int]:
    """
    Spreads timesteps evenly over a range, each in the middle of its share.

    Args:
        low (`int`):
            Smallest timestep of the range.
        high (`int`):
            One above the largest timestep of the range.
        num (`int`):
            How many timesteps to return.

    Returns:
        `list[int]` of length `num`: increasing timesteps in [low, high).
    """
    return [low + int((high - low) * (k + 0.5) / num) for k in range(num)]


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """
    Forward process `x_t = a_t x_0 + s_t eps` (DDPM, arXiv:2006.11239, equation 4), with `a_t^2 = alphas_cumprod[t]` and
    `a_t^2 + s_t^2 = 1`.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Clean latents `x_0`.
        noise (`torch.Tensor` of shape `(B, C, h, w)`):
            Standard normal noise `eps`.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Integer timesteps.
        alphas_cumprod (`torch.Tensor` of shape `(T,)`):
            The noise schedule, in float32 (in float16 it is 7 % off near t = 0).

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32 noised latents.
    """
    a_t, s_t = _signal_and_noise(timesteps, alphas_cumprod, latents.ndim)
    return a_t * latents.float() + s_t * noise.float()


def explaining_noise(
    latents: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """
    The noise that explains how clean latents became noised ones, `eps = (x_t - a_t x_0) / s_t`: the inverse of
    [`noising.add_noise`].

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Clean latents `x_0`.
        noisy_latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Noised latents `x_t`.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Integer timesteps.
        alphas_cumprod (`torch.Tensor` of shape `(T,)`):
            The noise schedule, in float32.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32 noise.
    """
    a_t, s_t = _signal_and_noise(timesteps, alphas_cumprod, latents.ndim)
    return (noisy_latents.float() - a_t * latents.float()) / s_t


def training_target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """
    What the model is to predict at `x_t`: the noise, or the velocity `v = a_t eps - s_t x_0` (arXiv:2202.00512).

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Clean latents `x_0`.
        noise (`torch.Tensor` of shape `(B, C, h, w)`):
            Standard normal noise `eps`.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Integer timesteps.
        alphas_cumprod (`torch.Tensor` of shape `(T,)`):
            The noise schedule, in float32.
        prediction_type (`str`):
            The noise scheduler's `prediction_type`: `"epsilon"` or `"v_prediction"`.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32 targets.

    Raises:
        `ValueError`: If `prediction_type` is something else.
    """
    if prediction_type == "epsilon":
        return noise.float()
    if prediction_type == "v_prediction":
        a_t, s_t = _signal_and_noise(timesteps, alphas_cumprod, latents.ndim)
        return a_t * noise.float() - s_t * latents.float()
    raise ValueError(
        f"The noise scheduler's `prediction_type` is {prediction_type!r}; supported are 'epsilon' and 'v_prediction'."
    )


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


def timestep_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, weighting: str, prediction_type: str
) -> torch.Tensor:
    """
    Weights `omega(lambda_t)` of the timesteps, as functions of the signal-to-noise ratio `SNR = a_t^2 / s_t^2`, the
    exponential of `lambda_t`. They are given as weights of errors of the noise,

        constant   1
        min_snr    min(SNR, 5) / SNR          (arXiv:2303.09556)
        sigmoid    sigma(-lambda_t) = 1 / (1 + SNR)      (arXiv:2303.00848)

    and multiplied by `SNR / (1 + SNR)` where the model predicts the velocity, whose squared error is larger by the inverse
    of this; but `constant` is 1 for every model.

    Args:
        timesteps (`torch.Tensor` of shape `(B,)`):
            Integer timesteps.
        alphas_cumprod (`torch.Tensor` of shape `(T,)`):
            The noise schedule, in float32.
        weighting (`str`):
            `"constant"`, `"min_snr"` or `"sigmoid"`.
        prediction_type (`str`):
            The noise scheduler's `prediction_type`: `"epsilon"` or `"v_prediction"`.

    Returns:
        `torch.Tensor` of shape `(B,)`: float32 weights in [0, 1].

    Raises:
        `ValueError`: If `weighting` is something else.
    """
    alphas_cumprod = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    if weighting == "constant":
        return torch.ones_like(alphas_cumprod)
    if weighting == "min_snr":
        weights = (5 * (1 - alphas_cumprod) / alphas_cumprod).clamp(max=1)
    elif weighting == "sigmoid":
        weights = 1 - alphas_cumprod
    else:
        raise ValueError(f"`weighting` must be 'constant', 'min_snr' or 'sigmoid', got {weighting!r}.")
    return weights * alphas_cumprod if prediction_type == "v_prediction" else weights


def _signal_and_noise(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, ndim: int):
    """`a_t` and `s_t` of each sample, shaped to multiply tensors of `ndim` dimensions."""
    alphas_cumprod = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps].view(-1, *[1] * (ndim - 1))
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
