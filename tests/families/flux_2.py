# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2 import pipeline_flux2_klein
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests import tiny

from .family import Call, Family


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a word, with the space before it or without, and one for each other byte; Qwen itself has a limit that nobody reaches."""
    merges = []
    for word in sorted({*tiny.WORDS, "user", "assistant", "think"}, key=lambda word: (len(word), word), reverse=True):
        for text in (word, f"Ġ{word}"):
            merges += [(text[:index], text[index]) for index in range(1, len(text))]
    tokens = dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())])
    tokens.update(dict.fromkeys("".join(merge) for merge in merges))
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=list(dict.fromkeys(merges)),
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=131072,
        chat_template=TEMPLATE,
    )


def qwen3_encoder(vocab_size: int, layers: int, hidden_size: int = 8) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
    ).eval()


def flux_2_vae(channels: tuple[int, ...] = (8, 8, 8)) -> AutoencoderKLFlux2:
    """With statistics that are neither 0 nor 1."""
    vae = AutoencoderKLFlux2(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.3, 3.0)
    return vae


def flux_2_transformer(joint_attention_dim: int, **config) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        **{
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": joint_attention_dim,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
            "guidance_embeds": False,
        }
        | config
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)  # of predictions that a training moves
    return transformer


def klein_pipeline(seed: int = 0, is_distilled: bool = False, **scheduler_settings) -> Flux2KleinPipeline:
    """32x32 images, 4x4 latents of 16 channels. The pipeline's default size is 512, so that trainings need `resolution=32`."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=flux_2_transformer(24),
        scheduler=tiny.flow_scheduler(**{"use_dynamic_shifting": True} | scheduler_settings),
        vae=flux_2_vae(),
        text_encoder=qwen3_encoder(len(tokenizer), layers=28),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )


def read_call(backbone, arguments, output, size) -> Call:
    def unpack(packed):
        height, width = (side // backbone.vae_scale_factor for side in size)
        ids = arguments["img_ids"]
        return Flux2KleinPipeline._unpack_latents_with_ids(packed, ids.expand(len(packed), -1, -1), height, width)

    return Call(unpack(arguments["hidden_states"]), unpack(output[0]))


def shifted_as_in_50_steps(module) -> AbstractContextManager:
    """The empirical shift of the pipeline in this module is that of 50 steps, however many there are."""
    own = module.compute_empirical_mu
    return patch.object(module, "compute_empirical_mu", lambda image_seq_len, num_steps: own(image_seq_len, 50))


SHORT = {"max_sequence_length": 40}
FAMILY = Family(
    make=klein_pipeline,
    read_call=read_call,
    settings={"resolution": 32, **SHORT},
    call={"guidance_scale": 1.0, **SHORT},
    guided={"guidance_scale": 2.0, **SHORT},
    branches=(("conditional",), ("unconditional",)),
    schedules=({}, {"shift_terminal": 0.2}),
    full_schedule=lambda: shifted_as_in_50_steps(pipeline_flux2_klein),
    lora_target="single_transformer_blocks.1.attn.to_out",
)
