# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Sana (arXiv:2410.10629): Gemma 2 behind an instruction, and a flow transformer of linear attention on 32 times smaller latents."""

import inspect
import math
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from ..process import RectifiedFlow
from .flow import FlowBackbone
from .sana_checks import check_parts, check_scheduler


# What the pipeline puts before a prompt, and not before a negative one
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaBackbone(FlowBackbone):
    """
    A [`~diffusers.SanaPipeline`] as training sees it. See [`backbones.base.Backbone`].
    """

    pipeline_class = SanaPipeline
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    transformer_class = SanaTransformer2DModel
    text_encoder_classes = {"text_encoder": "Gemma2Model"}
    attention_processors = ("SanaLinearAttnProcessor2_0", "SanaAttnProcessor2_0")
    transformer_inputs = ("in_channels", "patch_size", "caption_channels", "timestep_scale")
    vae_settings = ("scaling_factor",)
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    max_sequence_length = 300  # the pipeline's default
    padded_conditions = ("prompt_embeds",)
    has_comfyui_names = False
    check_parts = staticmethod(check_parts)
    check_scheduler = staticmethod(check_scheduler)

    def make_process(self) -> RectifiedFlow:
        scheduler = self.pipeline.scheduler
        if not isinstance(scheduler, DPMSolverMultistepScheduler):
            return super().make_process()
        shift = scheduler.config.flow_shift
        return RectifiedFlow(
            scheduler.config.num_train_timesteps,
            shift=lambda sigmas, size: shift * sigmas / (1 + (shift - 1) * sigmas),
        )

    @property
    def patch_size(self) -> int:
        return self.denoiser.config.patch_size

    @property
    def default_resolution(self) -> int:
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        return math.lcm(super().size_multiple, 32)  # the pipeline refuses other sizes

    @property
    def sampling_settings(self) -> dict[str, Any]:
        # The pipeline would draw one of its own sizes, and resize the image
        return super().sampling_settings | {"use_resolution_binning": False}

    @staticmethod
    def num_tokens(tokenizer, prompt: str) -> int:
        # The transformer is given the first, the instruction's last, and those of the prompt, in small letters
        instruction = "\n".join(INSTRUCTION)
        whole, before = (
            len(tokenizer(text, verbose=False).input_ids)
            for text in (instruction + prompt.lower().strip(), instruction)
        )
        return whole - before + 2

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        prompt_embeds = self.embed([prompt or "" for prompt in prompts], INSTRUCTION)
        if None in prompts:
            is_dropped = torch.tensor([prompt is None for prompt in prompts]).to(self.device, non_blocking=True)
            prompt_embeds = torch.where(is_dropped[:, None, None], self.embed([""], None), prompt_embeds)
        # Counted on the host, which a length on the device would make wait; a dropped prompt is one token, without the instruction
        tokenizer, longest = self.pipeline.tokenizer, self.max_sequence_length
        lengths = [1 if prompt is None else min(self.num_tokens(tokenizer, prompt), longest) for prompt in prompts]
        prompt_embeds = prompt_embeds[:, : max(lengths)]
        prompt_lengths = torch.tensor(lengths).to(self.device, non_blocking=True)
        is_padding = ~is_token(prompt_lengths, prompt_embeds)
        return {
            "prompt_embeds": prompt_embeds.masked_fill(is_padding[:, :, None], 0),
            "prompt_lengths": prompt_lengths,
        }

    def embed(self, prompts: list[str], instruction: list[str] | None) -> torch.Tensor:
        """Embeddings `(B, max_sequence_length, D)` of prompts behind an instruction."""
        return self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )[0]

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        return denoiser(
            hidden_states=noisy_latents,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=is_token(conditions["prompt_lengths"], conditions["prompt_embeds"]),
            timestep=timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]

    @staticmethod
    def guidance_branches(pipeline, context, arguments) -> tuple[str, ...]:
        return ("unconditional", "conditional") if pipeline.do_classifier_free_guidance else ("conditional",)


def is_token(lengths: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """The mask `(B, L)` of the places that sequences `(B, L, D)` of these lengths do not pad."""
    return torch.arange(sequences.shape[1], device=sequences.device) < lengths[:, None]
