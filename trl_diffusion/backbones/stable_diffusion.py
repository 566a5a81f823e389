# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion 1.x and 2.x: one text encoder, and a UNet that predicts the noise or the velocity."""

import torch
from diffusers import StableDiffusionPipeline

from ..process import DiscreteProcess
from .base import Backbone
from .stable_diffusion_checks import check_pipeline, check_reference, default_sample_size, training_schedule


class StableDiffusionBackbone(Backbone):
    """
    A [`~diffusers.StableDiffusionPipeline`] as training sees it. See [`backbones.base.Backbone`].
    """

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")

    check = staticmethod(check_pipeline)

    def check_reference(self, pipeline) -> None:
        check_reference(self.pipeline, pipeline)

    def make_process(self) -> DiscreteProcess:
        return DiscreteProcess(*training_schedule(self.pipeline.scheduler))

    @property
    def default_resolution(self) -> int:
        return default_sample_size(self.denoiser) * self.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        # VAE and UNet halve the sides without rest
        return self.vae_scale_factor * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            [prompt or "" for prompt in prompts],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": prompt_embeds}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        return denoiser(
            noisy_latents, timesteps, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False
        )[0]

    @staticmethod
    def guidance_branches(pipeline, context, arguments) -> tuple[str, ...]:
        return ("unconditional", "conditional") if pipeline.do_classifier_free_guidance else ("conditional",)
