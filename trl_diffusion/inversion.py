# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""DDIM inversion: noised latents that lie on the model's own trajectory through the clean ones.

Random noise makes `x_t` a point that the model would never pass on its way to `x_0`. Inversion (InPO, arXiv:2503.18454, and
IAPO for SDXL) walks the deterministic DDIM sampler backwards instead, from the clean latents to timestep `t`. The noise
that the model is then asked for is the one that explains where the walk arrived.
"""

from collections.abc import Callable

import torch

from .noising import keyed_noise


def inversion_timesteps(timestep: int, num_steps: int, num_timesteps: int) -> list[int]:
    """
    The timesteps of a walk from clean latents to a timestep: the last is the timestep itself, and each of the others lies
    one stride below the next. These are the timesteps of [`~diffusers.DDIMInverseScheduler`] with leading spacing and
    `steps_offset = timestep % stride`.

    Args:
        timestep (`int`):
            Where the walk arrives.
        num_steps (`int`):
            The steps that the longest walk takes, to the last timestep.
        num_timesteps (`int`):
            Number of timesteps `T` of the noise schedule.

    Returns:
        `list[int]` of length 1 to `num_steps`: increasing timesteps.
    """
    stride = -(-num_timesteps // num_steps)
    return list(range(timestep % stride, timestep + 1, stride))


def ddim_inverse_step(
    latents: torch.Tensor,
    model_pred: torch.Tensor,
    alpha_from: torch.Tensor,
    alpha_to: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """
    One step of deterministic DDIM (arXiv:2010.02502, equation 12 with sigma = 0) towards more noise.

        x_to = a_to x_0 + s_to eps        with x_0 and eps as the prediction at x_from has them

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Latents `x_from`.
        model_pred (`torch.Tensor` of shape `(B, C, h, w)`):
            The model's prediction for them.
        alpha_from (`torch.Tensor` of shape `(B,)`):
            `alphas_cumprod` of the level that the latents are on; 1 for clean ones.
        alpha_to (`torch.Tensor` of shape `(B,)`):
            `alphas_cumprod` of the level to go to.
        prediction_type (`str`):
            The noise scheduler's `prediction_type`: `"epsilon"` or `"v_prediction"`.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32.

    Raises:
        `ValueError`: If `prediction_type` is something else.
    """
    latents, model_pred = latents.float(), model_pred.float()
    alpha_from, alpha_to = (alpha.float().view(-1, *[1] * (latents.ndim - 1)) for alpha in (alpha_from, alpha_to))
    a_from, s_from = alpha_from.sqrt(), (1 - alpha_from).sqrt()
    if prediction_type == "epsilon":
        clean, noise = (latents - s_from * model_pred) / a_from, model_pred
    elif prediction_type == "v_prediction":
        clean, noise = a_from * latents - s_from * model_pred, a_from * model_pred + s_from * latents
    else:
        raise ValueError(f"`prediction_type` must be 'epsilon' or 'v_prediction', got {prediction_type!r}.")
    return alpha_to.sqrt() * clean + (1 - alpha_to).sqrt() * noise


@torch.no_grad()
def ddim_inversion(
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    num_steps: int,
    eta: float = 0.0,
    keys: list[tuple] | None = None,
) -> torch.Tensor:
    """
    Carries each clean latent to its own timestep. Samples take as many steps as their timestep needs, whatever batch they
    are in: those that have arrived drop out of the forward pass.

    As in diffusers' inversion, a step from one level to the next asks the model at the timestep of the next. The first step
    starts from `alphas_cumprod = 1`, since the latents are clean.

    Args:
        predict (`Callable`):
            The model: `predict(latents, timesteps, rows)` returns the predictions for those rows of the batch that are on
            their way, `rows` being their indices `(R,)`.
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Clean latents `x_0`.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Where each sample arrives. Best on the CPU: the walk's length follows from them.
        alphas_cumprod (`torch.Tensor` of shape `(T,)`):
            The noise schedule, in float32.
        prediction_type (`str`):
            The noise scheduler's `prediction_type`: `"epsilon"` or `"v_prediction"`.
        num_steps (`int`):
            The most steps that a sample takes; see [`inversion.inversion_timesteps`].
        eta (`float`, *optional*, defaults to `0.0`):
            Weight of the random term that is added after each step, `eta` times the standard deviation of DDPM's step
            between the two levels, as in InPO's published run (0.1).
        keys (`list[tuple]` of length `B`, *optional*):
            Keys of this random term, see [`noising.keyed_generator`]; needed where `eta` is above 0.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32 noised latents `x_t`.
    """
    device, alphas_cumprod = latents.device, alphas_cumprod.to(latents.device)
    walks = [inversion_timesteps(timestep, num_steps, len(alphas_cumprod)) for timestep in timesteps.tolist()]
    latents, last_timesteps = latents.float().clone(), torch.zeros(len(walks), dtype=torch.long, device=device)
    for step in range(max(map(len, walks))):
        underway = [row for row, walk in enumerate(walks) if step < len(walk)]
        rows = torch.tensor(underway).to(device, non_blocking=True)
        next_timesteps = torch.tensor([walks[row][step] for row in underway]).to(device, non_blocking=True)
        alpha_from = alphas_cumprod[last_timesteps[rows]] if step > 0 else torch.ones(len(rows), device=device)
        alpha_to = alphas_cumprod[next_timesteps]

        model_pred = predict(latents[rows], next_timesteps, rows)
        moved = ddim_inverse_step(latents[rows], model_pred, alpha_from, alpha_to, prediction_type)
        if eta > 0:
            noise = keyed_noise([(*keys[row], walks[row][step]) for row in underway], latents.shape[1:], device)
            variance = (1 - alpha_from) / (1 - alpha_to) * (1 - alpha_to / alpha_from)
            moved = moved + eta * variance.sqrt().view(-1, *[1] * (latents.ndim - 1)) * noise
        latents[rows], last_timesteps[rows] = moved, next_timesteps
    return latents
