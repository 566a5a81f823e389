# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion XL: two text encoders, and a UNet that is given each image's original size and crop."""

import torch
from diffusers import StableDiffusionXLPipeline

from .stable_diffusion import StableDiffusionBackbone


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """
    A [`~diffusers.StableDiffusionXLPipeline`] as training sees it. See [`backbones.base.Backbone`].
    """

    pipeline_class = StableDiffusionXLPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            [prompt or "" for prompt in prompts],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        if self.pipeline.config.force_zeros_for_empty_prompt and None in prompts:
            is_given = torch.tensor([prompt is not None for prompt in prompts])
            is_given = is_given.to(prompt_embeds.device, non_blocking=True)
            prompt_embeds = prompt_embeds * is_given[:, None, None]
            pooled_prompt_embeds = pooled_prompt_embeds * is_given[:, None]
        return {"prompt_embeds": prompt_embeds, "text_embeds": pooled_prompt_embeds}

    def image_conditions(self, original_sizes, crop_top_lefts, target_size) -> dict[str, torch.Tensor]:
        # SDXL's micro-conditioning (arXiv:2307.01952, section 2.2): original size, crop and target size, each (y, x)
        target_sizes = [original_sizes.new_full((len(original_sizes), 1), side) for side in target_size]
        return {"time_ids": torch.cat([original_sizes, crop_top_lefts, *target_sizes], dim=1)}

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
