# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Z-Image (arXiv:2511.22699): Qwen3 under a chat template, and a flow transformer that takes lists of images and prompts."""

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence

from .flow import FlowBackbone
from .flow_checks import check_chat
from .z_image_checks import check_z_image_transformer


class ZImageBackbone(FlowBackbone):
    """
    A [`~diffusers.ZImagePipeline`] as training sees it. See [`backbones.base.Backbone`].
    """

    pipeline_class = ZImagePipeline
    text_encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    transformer_class = ZImageTransformer2DModel
    text_encoder_classes = {"text_encoder": "Qwen3Model"}
    attention_processors = ("ZSingleStreamAttnProcessor",)
    transformer_inputs = ("in_channels", "cap_feat_dim")
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    max_sequence_length = 512  # the pipeline's default
    unguided_scale = 0.0  # the pipeline adds `guidance_scale` times the difference of the branches to the prompt's
    padded_conditions = ("prompt_embeds",)
    host_conditions = ("prompt_lengths",)  # the transformer takes a tensor of its own length for each prompt
    default_resolution = 1024  # the pipeline's default
    patch_size = 2

    @classmethod
    def check_parts(cls, pipeline) -> None:
        check_z_image_transformer(pipeline)
        check_chat(pipeline)

    @staticmethod
    def templated(tokenizer, prompt) -> str:
        messages = [{"role": "user", "content": prompt}]
        settings = {"add_generation_prompt": True, "enable_thinking": True, "tokenize": False}
        return tokenizer.apply_chat_template(messages, **settings)

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            [prompt or "" for prompt in prompts],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {
            "prompt_embeds": pad_sequence(prompt_embeds, batch_first=True),
            "prompt_lengths": torch.tensor([len(embeds) for embeds in prompt_embeds]),
        }

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        rows = zip(conditions["prompt_embeds"], conditions["prompt_lengths"].tolist(), strict=True)
        images = denoiser(
            list(noisy_latents.unsqueeze(2)),  # of one frame
            (1000 - timesteps) / 1000,
            [embeds[:length] for embeds, length in rows],
            return_dict=False,
        )[0]
        return -torch.stack(images).squeeze(2)

    @staticmethod
    def guidance_branches(pipeline, context, arguments) -> tuple[str, ...]:
        truncation = pipeline._cfg_truncation  # the time from which on the pipeline samples without guidance
        is_truncated = truncation is not None and truncation < 1 and arguments["t"][0].item() > truncation
        both = pipeline.do_classifier_free_guidance and not is_truncated
        return ("conditional", "unconditional") if both else ("conditional",)
