# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the training of a batch consists of, written out with the parts of diffusers: nothing of the package but its keyed noise."""

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)

from tests.tiny import NUM_T5_TOKENS
from trl_diffusion.randomness import keyed_noise


def latents(pipeline: DiffusionPipeline, pixel_values: torch.Tensor, keys: list[tuple]) -> torch.Tensor:
    """Latents `(B, 4, 8, 8)` in the denoiser's scale, sampled from the VAE's posterior; `pixel_values` are bytes."""
    posterior, config = pipeline.vae.encode(pixel_values / 127.5 - 1).latent_dist, pipeline.vae.config
    sampled = posterior.mean + posterior.std * keyed_noise(keys, (4, 8, 8))
    return (sampled - (config.get("shift_factor") or 0)) * config.scaling_factor


def noised(
    pipeline: DiffusionPipeline, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noised latents and the target, by DDPM's scheduler, or on the straight line of a rectified flow."""
    if isinstance(pipeline, StableDiffusion3Pipeline | FluxPipeline):
        sigmas = timesteps.view(-1, 1, 1, 1) / 1000
        return (1 - sigmas) * latents + sigmas * noise, noise - latents
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    return scheduler.add_noise(latents, noise, timesteps), target


def predict(
    pipeline: DiffusionPipeline,
    denoiser: torch.nn.Module,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompts: list[str],
    time_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The prediction `(B, 4, 8, 8)` by a call of the denoiser; `time_ids` are SDXL's, uncropped 32x32 images if left out."""
    if isinstance(pipeline, FluxPipeline):
        embeds, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=NUM_T5_TOKENS)
        # 2x2 positions become one of 16 channels: (c, row in the patch, column in the patch)
        packed = noisy_latents.reshape(-1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 16)
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        guidance = torch.ones(len(prompts)) if denoiser.config.guidance_embeds else None
        output = denoiser(
            packed,
            embeds,
            pooled,
            timesteps / 1000,
            img_ids=torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).reshape(16, 3),
            txt_ids=torch.zeros(NUM_T5_TOKENS, 3),
            guidance=guidance,
        ).sample
        return unpacked(output)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=NUM_T5_TOKENS
        )
        return denoiser(noisy_latents, embeds, pooled, timesteps).sample
    if isinstance(pipeline, StableDiffusionXLPipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        time_ids = torch.tensor([[32, 32, 0, 0, 32, 32]] * len(prompts)) if time_ids is None else time_ids
        added = {"text_embeds": pooled, "time_ids": time_ids.float()}
        return denoiser(noisy_latents, timesteps, embeds, added_cond_kwargs=added).sample
    embeds, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    return denoiser(noisy_latents, timesteps, embeds).sample


def unpacked(values: torch.Tensor) -> torch.Tensor:
    """From the sequence of FLUX.1, `(B, 16, 16)`, to `(B, 4, 8, 8)`."""
    return values.reshape(-1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, 8, 8)
