# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion XL: two text encoders, and a UNet that is told each image's original size and crop."""

import torch
from diffusers import StableDiffusionXLPipeline

from .base import Backbone


class StableDiffusionXLBackbone(Backbone):
    """
    Training's view of a [`~diffusers.StableDiffusionXLPipeline`]. See [`backbones.base.Backbone`].
    """

    pipeline_class = StableDiffusionXLPipeline
    denoiser_name = "unet"
    encoder_names = ("vae", "text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds, "text_embeds": pooled_prompt_embeds}

    def image_conditions(self, original_sizes, crop_top_lefts, target_size) -> dict[str, torch.Tensor]:
        # SDXL's micro-conditioning (arXiv:2307.01952, section 2.2): original size, crop and target size, each (y, x)
        target_sizes = torch.tensor(target_size, device=original_sizes.device).expand_as(original_sizes)
        return {"time_ids": torch.cat([original_sizes, crop_top_lefts, target_sizes], dim=1)}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        prompt_embeds = conditions["prompt_embeds"]
        return denoiser(
            noisy_latents,
            timesteps,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={
                "text_embeds": conditions["text_embeds"],
                "time_ids": conditions["time_ids"].to(prompt_embeds.dtype),
            },
            return_dict=False,
        )[0]
