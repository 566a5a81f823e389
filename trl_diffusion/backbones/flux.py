# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""FLUX.1 dev and schnell: CLIP and T5, and a flow transformer that takes packed latents and, in dev, a guidance scale."""

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from .flow import FlowBackbone
from .flow_checks import check_clip_and_t5, check_thousand_timesteps, check_vae


class FluxBackbone(FlowBackbone):
    """
    A [`~diffusers.FluxPipeline`] as training sees it. See [`backbones.base.Backbone`].
    """

    pipeline_class = FluxPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    transformer_class = FluxTransformer2DModel
    text_encoder_classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    attention_processors = ("FluxAttnProcessor",)
    transformer_inputs = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
    max_sequence_length = 512  # the pipeline's default
    guidance_hint = "pass `true_cfg_scale` above 1 and `negative_prompt=''` to it; its `guidance_scale` makes none"
    true_guidance = {"negative_prompt": "", "true_cfg_scale": 2.0}
    patch_size = 2  # 2x2 positions are packed into the channels

    def __init__(self, pipeline, source=None):
        super().__init__(pipeline, source)
        self.embedded_guidance = 1.0 if self.denoiser.config.guidance_embeds else None
        self.position_ids: dict[tuple, torch.Tensor] = {}  # the pipeline makes them on the CPU

    @classmethod
    def check_parts(cls, pipeline) -> None:
        check_thousand_timesteps(pipeline)
        check_vae(pipeline)
        check_clip_and_t5(pipeline)

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        with self.clip_reads_the_beginning():
            prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
                [prompt or "" for prompt in prompts], device=self.device, max_sequence_length=self.max_sequence_length
            )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        (batch_size, channels, height, width), prompt_embeds = noisy_latents.shape, conditions["prompt_embeds"]
        settings = height // 2, width // 2, noisy_latents.device, prompt_embeds.dtype
        if settings not in self.position_ids:
            self.position_ids[settings] = self.pipeline._prepare_latent_image_ids(batch_size, *settings)
        ids = self.position_ids[settings]
        guidance = self.embedded_guidance
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents, batch_size, channels, height, width),
            timestep=timesteps.to(noisy_latents.dtype) / 1000,  # the transformer multiplies by 1000
            guidance=None if guidance is None else torch.full((batch_size,), guidance, device=noisy_latents.device),
            pooled_projections=conditions["pooled_prompt_embeds"],
            encoder_hidden_states=prompt_embeds,
            txt_ids=ids.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        scale = self.vae_scale_factor
        return self.pipeline._unpack_latents(packed, height * scale, width * scale, scale)
