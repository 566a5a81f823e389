# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): two CLIP encoders and T5, and a flow transformer."""

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from .checks import check_other_weights, refuse_reference
from .flow import FlowBackbone
from .flow_checks import check_clip_and_t5, check_vae


class StableDiffusion3Backbone(FlowBackbone):
    """
    A [`~diffusers.StableDiffusion3Pipeline`] as training sees it, with T5 or without. See [`backbones.base.Backbone`].
    """

    pipeline_class = StableDiffusion3Pipeline
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    transformer_class = SD3Transformer2DModel
    text_encoder_classes = {
        **dict.fromkeys(("text_encoder", "text_encoder_2"), "CLIPTextModelWithProjection"),
        "text_encoder_3": "T5EncoderModel",
    }
    attention_processors = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor")
    transformer_inputs = ("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
    max_sequence_length = 256  # the pipeline's default

    def __init__(self, pipeline, source=None):
        if pipeline.text_encoder_3 is None:  # the pipeline puts zeros in place of T5's embeddings
            self.text_encoder_names, self.tokenizer_names = self.text_encoder_names[:2], self.tokenizer_names[:2]
        super().__init__(pipeline, source)

    @classmethod
    def text_encoders_of(cls, pipeline) -> dict[str, str]:
        encoders = dict(cls.text_encoder_classes)
        if pipeline.text_encoder_3 is pipeline.tokenizer_3 is None:
            del encoders["text_encoder_3"]
        return encoders

    @classmethod
    def check_parts(cls, pipeline) -> None:
        check_vae(pipeline)
        check_clip_and_t5(pipeline)

    def check_reference(self, pipeline) -> None:
        check_other_weights(self.pipeline, pipeline, self.denoiser_name)
        if self.text_encoders_of(self.pipeline) != self.text_encoders_of(pipeline):
            refuse_reference("only one of them has T5")
        super().check_reference(pipeline)

    @property
    def patch_size(self) -> int:
        return self.denoiser.config.patch_size

    @property
    def default_resolution(self) -> int:
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @property
    def prompt_limits(self) -> dict[str, int]:
        if "tokenizer_3" in self.tokenizer_names:
            return super().prompt_limits
        return {name: getattr(self.pipeline, name).model_max_length for name in self.tokenizer_names}

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        with self.clip_reads_the_beginning():
            prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
                [prompt or "" for prompt in prompts],
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        return denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    @staticmethod
    def guidance_branches(pipeline, context, arguments) -> tuple[str, ...]:
        # Guidance by skipped layers calls the transformer once more, for the conditional branch alone
        both = pipeline.do_classifier_free_guidance and not arguments.get("skip_layers")
        return ("unconditional", "conditional") if both else ("conditional",)
