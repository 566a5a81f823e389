# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2 import pipeline_flux2
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from tests import tiny

from .family import Family
from .flux_2 import SHORT, flux_2_transformer, flux_2_vae, qwen_tokenizer, read_call, shifted_as_in_50_steps


# The system's message is long, and the tiny tokenizer would spell it
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content[0].text[:5] }}{% else %}"
    "<|im_start|>{{ message.content[0].text }}<|im_end|>{% endif %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    """A tokenizer and an image processor, as FLUX.2 dev has them; its own, Pixtral's, needs torchvision."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return LlavaProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer, chat_template=TEMPLATE)


def mistral3_encoder(vocab_size: int, layers: int) -> Mistral3ForConditionalGeneration:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 4}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=MistralConfig(
                vocab_size=vocab_size,
                num_hidden_layers=layers,
                num_key_value_heads=1,
                max_position_embeddings=64,
                initializer_range=0.3,
                **sizes,
            ),
            vision_config=PixtralVisionConfig(num_hidden_layers=1, image_size=16, patch_size=8, **sizes),
            image_token_index=0,
        )
    ).eval()


def flux_2_dev_pipeline(seed: int = 0, **scheduler_settings) -> Flux2Pipeline:
    """32x32 images, 4x4 latents of 16 channels. The pipeline's default size is 512, so that trainings need `resolution=32`."""
    torch.manual_seed(seed)
    tokenizer = processor()
    return Flux2Pipeline(
        transformer=flux_2_transformer(24, guidance_embeds=True),
        scheduler=tiny.flow_scheduler(**{"use_dynamic_shifting": True} | scheduler_settings),
        vae=flux_2_vae(),
        text_encoder=mistral3_encoder(len(tokenizer.tokenizer), layers=31),
        tokenizer=tokenizer,
    )


FAMILY = Family(
    make=flux_2_dev_pipeline,
    read_call=read_call,
    settings={"resolution": 32, **SHORT},
    call={"guidance_scale": 1.0, **SHORT},
    guided=None,
    branches=(),
    schedules=({}, {"shift_terminal": 0.2}),
    full_schedule=lambda: shifted_as_in_50_steps(pipeline_flux2),
    lora_target="single_transformer_blocks.1.attn.to_out",
)
