# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Inversion: noised latents that lie on the model's own trajectory through the clean ones.

With random noise, `x_t` is a point that the model would never pass on its way to `x_0`. Inversion (InPO, arXiv:2503.18454, and
IAPO for SDXL) runs the deterministic sampler backwards instead, from the clean latents to timestep `t`. The target of the
model is then the noise that explains the result.
"""

from collections.abc import Callable

import torch

from .process import Process
from .randomness import keyed_noise


@torch.no_grad()
def invert_latents(
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    process: Process,
    num_steps: int,
    eta: float = 0.0,
    keys: list[tuple] | None = None,
) -> torch.Tensor:
    """
    Inverts each clean latent to its own timestep. A sample takes as many steps as its timestep needs, whatever batch it is
    in: the forward pass leaves out those that are finished.

    A step splits the latents by the prediction and mixes them again at the next timestep,

        x_to = a_to x_0 + s_to eps

    which is deterministic DDIM backwards (arXiv:2010.02502, equation 12 with sigma = 0) for noise and velocity models, and the
    Euler step of the ODE for rectified flows. As in diffusers' inversion, the model is called with the timestep that the step
    leads to. The first step starts at clean latents.

    Args:
        predict (`Callable`):
            The model: `predict(latents, timesteps, rows)` returns the predictions for some rows of the batch, whose indices
            are `rows` `(R,)`, on the CPU.
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Clean latents `x_0`.
        timesteps (`torch.Tensor` of shape `(B,)`):
            The timestep of each sample. Best on the CPU: the number of steps follows from them.
        process ([`process.Process`]):
            The model's process.
        num_steps (`int`):
            Maximum number of steps, see [`process.Process.inversion_timesteps`].
        eta (`float`, *optional*, defaults to `0.0`):
            Weight of the random term that is added after each step, `eta` times the standard deviation of DDPM's step between
            the two levels, as in InPO's published run (0.1).
        keys (`list[tuple]` of length `B`, *optional*):
            Keys of this random term, see [`randomness.keyed_generator`]; needed where `eta` is above 0.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: float32 noised latents `x_t`.
    """
    device = latents.device
    paths = [process.inversion_timesteps(timestep, num_steps) for timestep in timesteps.tolist()]
    latents = latents.float().clone()
    last_timesteps = torch.full((len(paths),), process.clean_timestep, device=device)
    for step in range(max(map(len, paths))):
        unfinished = [row for row, path in enumerate(paths) if step < len(path)]
        rows_on_cpu = torch.tensor(unfinished)
        rows = rows_on_cpu.to(device, non_blocking=True)
        next_timesteps = torch.tensor([paths[row][step] for row in unfinished]).to(device, non_blocking=True)

        model_pred = predict(latents[rows], next_timesteps, rows_on_cpu)
        moved = process.add_noise(*process.split(model_pred, latents[rows], last_timesteps[rows]), next_timesteps)
        if eta > 0:
            noise = keyed_noise([(*keys[row], paths[row][step]) for row in unfinished], latents.shape[1:], device)
            variance = process.posterior_variance(last_timesteps[rows], next_timesteps)
            moved = moved + eta * variance.sqrt().view(-1, *[1] * (latents.ndim - 1)) * noise
        latents[rows], last_timesteps[rows] = moved, next_timesteps
    return latents
