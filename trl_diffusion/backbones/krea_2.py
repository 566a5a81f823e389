# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Krea 2: several layers of Qwen3-VL, and a flow transformer that takes packed latents. Raw is trained; Turbo is distilled of it."""

from typing import Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch.nn.utils.rnn import pad_sequence

from .flow import FlowBackbone
from .krea_2_checks import check_layers, check_length, check_same_inputs
from .qwen_parts import VAE_SETTINGS, check_frame_vae, check_template, check_text_width, frame_moments, text_mask


class Krea2Backbone(FlowBackbone):
    """
    A [`~diffusers.Krea2Pipeline`] as training sees it. See [`backbones.base.Backbone`].
    """

    pipeline_class = Krea2Pipeline
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    transformer_class = Krea2Transformer2DModel
    text_encoder_classes = {"text_encoder": "Qwen3VLModel"}
    attention_processors = ("Krea2AttnProcessor",)
    transformer_inputs = ("in_channels", "text_hidden_dim", "num_text_layers")
    vae_settings = VAE_SETTINGS
    lora_target_modules = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")
    posterior_moments = staticmethod(frame_moments)
    padded_conditions = ("prompt_embeds",)
    host_conditions = ("prompt_lengths",)
    max_sequence_length = 512  # the pipeline's default
    longest_sequence = 1024  # the pipeline itself has no limit
    unguided_scale = 0.0  # the pipeline adds `guidance_scale` times the difference of the branches to the prompt's
    default_resolution = 1024  # the pipeline's default

    def __init__(self, pipeline, source=None):
        super().__init__(pipeline, source)
        self.position_ids: dict[tuple, torch.Tensor] = {}

    @classmethod
    def check_parts(cls, pipeline) -> None:
        check_frame_vae(pipeline, pipeline.patch_size)
        check_text_width(pipeline, "text_hidden_dim")
        check_template(pipeline, pipeline.prompt_template_encode_prefix)
        check_layers(pipeline)

    def check_reference(self, pipeline) -> None:
        super().check_reference(pipeline)
        check_same_inputs(self.pipeline, pipeline)

    def configure(self, max_sequence_length, embedded_guidance) -> None:
        super().configure(max_sequence_length, embedded_guidance)
        check_length(self.pipeline, self.max_sequence_length)

    @property
    def patch_size(self) -> int:
        return self.pipeline.patch_size

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def shift_for(self, num_patches: int) -> float:
        return 1.15 if self.pipeline.config.is_distilled else super().shift_for(num_patches)

    @property
    def text_settings(self) -> tuple[Any, ...]:
        template = self.pipeline.prompt_template_encode_prefix, self.pipeline.prompt_template_encode_suffix
        return *template, self.pipeline.text_encoder_select_layers

    @staticmethod
    def num_tokens(tokenizer, prompt) -> int:
        # The end of the template is among those that are counted
        return FlowBackbone.num_tokens(tokenizer, prompt) + 5

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        settings = {"device": self.device, "max_sequence_length": self.max_sequence_length}
        embeds, mask = self.pipeline.encode_prompt([prompt or "" for prompt in prompts], **settings)
        # The padding stands before the end of the template. All text is at one position, so that the order makes no difference
        texts = [row[is_text] for row, is_text in zip(embeds, mask, strict=True)]
        lengths = torch.tensor([len(text) for text in texts])
        return {"prompt_embeds": pad_sequence(texts, batch_first=True), "prompt_lengths": lengths}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        (batch_size, channels, height, width), embeds = noisy_latents.shape, conditions["prompt_embeds"]
        settings = height // self.patch_size, width // self.patch_size, noisy_latents.device
        if settings not in self.position_ids:
            self.position_ids[settings] = self.pipeline.prepare_position_ids(0, *settings)
        ids = self.position_ids[settings]
        packed = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy_latents, batch_size, channels, height, width),
            encoder_hidden_states=embeds,
            timestep=(timesteps / self.process.num_timesteps).to(noisy_latents.dtype),
            position_ids=torch.cat([ids.new_zeros(embeds.shape[1], 3), ids]),  # text is at the origin
            encoder_attention_mask=text_mask(embeds, conditions["prompt_lengths"]),
            return_dict=False,
        )[0]
        scale = self.vae_scale_factor
        return self.pipeline._unpack_latents(packed, height * scale, width * scale).squeeze(2)

    @staticmethod
    def sampling_defaults(config) -> dict[str, Any]:
        return {"guidance_scale": 0.0, "num_inference_steps": 8} if config.get("is_distilled") else {}

    @staticmethod
    def guidance_branches(pipeline, context, arguments) -> tuple[str, ...]:
        # The second call of a step, of the same timestep, is the unconditional one
        return ("unconditional",) if context == "again" else ("conditional",)
