# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet that predicts the noise or the velocity."""

import torch
from diffusers import StableDiffusionPipeline

from .base import Backbone


class StableDiffusionBackbone(Backbone):
    """
    Training's view of a [`~diffusers.StableDiffusionPipeline`]. See [`backbones.base.Backbone`].
    """

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    encoder_names = ("vae", "text_encoder")
    tokenizer_names = ("tokenizer",)
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds}

    def image_conditions(self, original_sizes, crop_top_lefts, target_size) -> dict[str, torch.Tensor]:
        return {}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        return denoiser(
            noisy_latents, timesteps, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False
        )[0]
