# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""From clean latents to what an objective is given: noised latents, and what the frozen models predict for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..inversion import invert_latents
from ..process import Process
from ..randomness import keyed_noise
from .ahead import take_rows
from .diffusion_config import DiffusionConfig


class NoisedBatch(NamedTuple):
    """
    The images of a batch at one timestep each: `n` images for each of `B` rows, one image column after the other.

    Attributes:
        batch (`dict[str, Any]`):
            What does not depend on the timestep: what the trainer's `prepare_batch` returned.
        latents (`torch.Tensor` of shape `(n * B, C, h, w)`):
            Clean latents `x_0`, float32.
        noise (`torch.Tensor` of shape `(n * B, C, h, w)`):
            The noise `eps`, float32.
        noisy_latents (`torch.Tensor` of shape `(n * B, C, h, w)`):
            Noised latents `x_t`, float32.
        timesteps (`torch.Tensor` of shape `(n * B,)`):
            Timesteps. The images of a row share theirs.
        frozen (`dict[str, torch.Tensor]`):
            Predictions of the frozen models by name, such as `ref_pred`.
    """

    batch: dict[str, Any]
    latents: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    frozen: dict[str, torch.Tensor]


class Noiser:
    """
    Noises latents by random noise or by inversion, as a configuration says.

    Args:
        process ([`process.Process`]):
            The model's process.
        image_columns (`tuple[str, ...]`):
            The `n` image columns of a row.
        args ([`DiffusionConfig`]):
            `noise_source`, `inversion_steps` and `inversion_eta` are read.
        make_noise (`Callable`, *optional*, defaults to [`randomness.keyed_noise`]):
            Makes the noise, or has it ready.
    """

    def __init__(
        self,
        process: Process,
        image_columns: tuple[str, ...],
        args: DiffusionConfig,
        make_noise: Callable[[list[tuple], tuple[int, ...], torch.device], torch.Tensor] = keyed_noise,
    ):
        self.process = process
        self.image_columns = image_columns
        self.args = args
        self.make_noise = make_noise

    def __call__(
        self,
        batch: dict[str, Any],
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        keys: list[tuple],
        predict: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    ) -> NoisedBatch:
        """
        Noises latents. The images of a row share their timestep, and their noise where it is random.

        Args:
            batch (`dict[str, Any]`):
                What does not depend on the timestep, with the `conditions` of the images.
            latents (`torch.Tensor` of shape `(n * B, C, h, w)`):
                Clean latents.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps, on the CPU.
            keys (`list[tuple]` of length `B`):
                Keys of the noise.
            predict (`Callable`):
                The model that inverts: `predict(noisy_latents, timesteps, conditions)`, without gradient.

        Returns:
            [`trainer.noised_batch.NoisedBatch`], without predictions of the frozen models.
        """
        num_images, device = len(self.image_columns), latents.device
        timesteps_on_cpu = timesteps.repeat(num_images)
        timesteps = timesteps_on_cpu.to(device, non_blocking=True)
        if self.args.noise_source == "random":
            noise = torch.cat([self.make_noise(keys, latents.shape[1:], device)] * num_images)
            noisy_latents = self.process.add_noise(latents, noise, timesteps)
            return NoisedBatch(batch, latents, noise, noisy_latents, timesteps, {})

        # With the prompt and without guidance, as in InPO
        def predict_rows(noisy_latents: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return predict(noisy_latents, timesteps, take_rows(batch["conditions"], rows))

        noisy_latents = invert_latents(
            predict_rows,
            latents,
            timesteps_on_cpu,
            self.process,
            self.args.inversion_steps,
            self.args.inversion_eta,
            [(*key, column) for column in self.image_columns for key in keys],
        )
        noise = self.process.explaining_noise(latents, noisy_latents, timesteps)
        return NoisedBatch(batch, latents, noise, noisy_latents, timesteps, {})

    def cached(self, batch: dict[str, Any], latents: torch.Tensor, tensors: dict[str, torch.Tensor]) -> NoisedBatch:
        """
        A noised batch from tensors that were precomputed.

        Args:
            batch (`dict[str, Any]`):
                What does not depend on the timestep.
            latents (`torch.Tensor` of shape `(n * B, C, h, w)`):
                Clean latents.
            tensors (`dict[str, torch.Tensor]`):
                `timesteps` `(B, n)`, `noisy_latents` `(B, n, C, h, w)`, and the predictions of the frozen models.

        Returns:
            [`trainer.noised_batch.NoisedBatch`]
        """
        tensors = {name: by_image(value.to(latents.device, non_blocking=True)) for name, value in tensors.items()}
        timesteps, noisy_latents = tensors.pop("timesteps"), tensors.pop("noisy_latents")
        noise = self.process.explaining_noise(latents, noisy_latents, timesteps)
        return NoisedBatch(batch, latents, noise, noisy_latents, timesteps, tensors)


def by_row(values: torch.Tensor, num_images: int) -> torch.Tensor:
    """From `(n * B, ...)`, one image column after the other, to `(B, n, ...)`."""
    return values.unflatten(0, (num_images, -1)).transpose(0, 1)


def by_image(values: torch.Tensor) -> torch.Tensor:
    """From `(B, n, ...)` to `(n * B, ...)`, one image column after the other."""
    return values.transpose(0, 1).flatten(0, 1)
