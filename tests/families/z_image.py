# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests import tiny

from .family import Call, Family


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (  # that of Qwen3, where a chat is one message of a user
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
NUM_TOKENS = 64


def tokenizer() -> Qwen2Tokenizer:
    """One token a letter; the template adds 19. As in Z-Image, its limit is larger than the text encoder's."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=SPECIAL[1:], chat_template=TEMPLATE, model_max_length=1024
    )


def z_image_pipeline(seed: int = 0, **scheduler_settings) -> ZImagePipeline:
    """
    32x32 images, 8x8 latents in patches of 2x2: half of the transformer's 32 tokens for the image is padding, which has an embedding.
    A pipeline of Z-Image draws 1024x1024 pixels by default, so that trainings need `resolution=32`.
    """
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=(4, 2, 2),
        axes_lens=(1024, 64, 64),
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=0,
        )
    )
    return ZImagePipeline(
        scheduler=tiny.flow_scheduler(**scheduler_settings),
        vae=tiny.flow_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer(),
        transformer=transformer,
    )


def read_call(backbone, arguments, output, size) -> Call:
    return Call(torch.stack(arguments["x"]).squeeze(2), -torch.stack(output[0]).squeeze(2))


SHORT = {"max_sequence_length": NUM_TOKENS}
FAMILY = Family(
    make=z_image_pipeline,
    read_call=read_call,
    settings={"resolution": 32, **SHORT},
    call={"guidance_scale": 0.0, **SHORT},
    guided={"guidance_scale": 2.0, **SHORT},
    branches=(("conditional", "unconditional"),),
    schedules=(
        {"shift": 3.0},
        {"shift": 6.0},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64},
    ),
    lora_target="attention.to_q",
)
