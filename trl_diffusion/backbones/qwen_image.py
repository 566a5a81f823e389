# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Qwen-Image (arXiv:2508.02324): Qwen2.5-VL, and a flow transformer that takes packed latents and masks the padding of prompts."""

from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from .checks import refuse
from .flow import FlowBackbone
from .flow_checks import check_thousand_timesteps
from .qwen_parts import VAE_SETTINGS, check_frame_vae, check_template, check_text_width, frame_moments, text_mask


UNCONDITIONAL = " "  # the negative prompt that the model is published with; the pipeline itself makes none


class QwenImageBackbone(FlowBackbone):
    """
    A [`~diffusers.QwenImagePipeline`] as training sees it. See [`backbones.base.Backbone`].
    """

    pipeline_class = QwenImagePipeline
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    transformer_class = QwenImageTransformer2DModel
    text_encoder_classes = {"text_encoder": "Qwen2_5_VLForConditionalGeneration"}
    attention_processors = ("QwenDoubleStreamAttnProcessor2_0",)
    transformer_inputs = ("in_channels", "joint_attention_dim")
    vae_settings = VAE_SETTINGS
    posterior_moments = staticmethod(frame_moments)
    padded_conditions = ("prompt_embeds",)
    host_conditions = ("prompt_lengths",)
    max_sequence_length = 512  # the pipeline's default
    longest_sequence = 1024
    guidance_hint = "pass `true_cfg_scale` above 1 and `negative_prompt=' '` to it; its `guidance_scale` makes none"
    patch_size = 2  # 2x2 positions are packed into the channels

    @classmethod
    def check_parts(cls, pipeline) -> None:
        config = pipeline.transformer.config
        for key, reason in (
            ("guidance_embeds", "diffusers fails when it tells such a transformer a guidance scale"),
            ("zero_cond_t", "it edits images, of which a `QwenImagePipeline` gives it none"),
            (
                "use_additional_t_cond",
                "it draws images in layers, and a `QwenImagePipeline` does not tell it how many",
            ),
            ("use_layer3d_rope", "it draws images in layers, of which a `QwenImagePipeline` has one"),
        ):
            if config[key]:
                way_out = "Choose a text-to-image model, such as Qwen/Qwen-Image"
                refuse(f"`transformer.config.{key}` is {config[key]}", reason, way_out)
        check_thousand_timesteps(pipeline)
        check_frame_vae(pipeline, cls.patch_size)
        check_text_width(pipeline, "joint_attention_dim")
        check_template(pipeline, pipeline.prompt_template_encode.partition("{}")[0])

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    @property
    def text_settings(self) -> tuple[Any, ...]:
        return (self.pipeline.prompt_template_encode,)

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        prompts = [UNCONDITIONAL if prompt is None else prompt for prompt in prompts]
        settings = {"device": self.device, "max_sequence_length": self.max_sequence_length}
        embeds, mask = self.pipeline.encode_prompt(prompts, **settings)
        lengths = torch.tensor([embeds.shape[1]] * len(embeds)) if mask is None else mask.sum(dim=1).cpu()
        return {"prompt_embeds": embeds, "prompt_lengths": lengths}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        (batch_size, channels, height, width), embeds = noisy_latents.shape, conditions["prompt_embeds"]
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents, batch_size, channels, height, width),
            timestep=timesteps.to(noisy_latents.dtype) / 1000,  # the transformer multiplies by 1000
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=text_mask(embeds, conditions["prompt_lengths"]),
            img_shapes=[[(1, height // 2, width // 2)]] * batch_size,
            return_dict=False,
        )[0]
        scale = self.vae_scale_factor
        return self.pipeline._unpack_latents(packed, height * scale, width * scale, scale).squeeze(2)

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": UNCONDITIONAL}
