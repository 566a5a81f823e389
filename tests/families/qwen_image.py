# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import re

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests import tiny

from .family import Call, Family


TEMPLATE = (
    "system user assistant Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background"
)
SHIFT_BY_SIZE = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


def tokenizer() -> Qwen2Tokenizer:
    """One token a word, so that the template of Qwen-Image has the 34 tokens that the pipeline drops; else one a byte."""
    words = [word for text in (TEMPLATE, *tiny.WORDS) for word in re.findall(r"\w+", text)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([spelled for word in words for spelled in (word, f" {word}")], trainer)
    learned = json.loads(learner.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"] | {"<|endoftext|>": len(learned["vocab"])},
        merges=[tuple(merge) for merge in learned["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
    )


def text_config(num_layers: int) -> dict:
    return {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    }


VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 32}


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text_config(2), vision_config=VISION | {"fullatt_block_indexes": [0]})
    ).eval()


def vae() -> AutoencoderKLQwenImage:
    """Latents of a quarter of the image's size, and images with contrasts."""
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.5, 0.7, 2.0],
    )
    torch.nn.init.normal_(autoencoder.decoder.conv_out.weight, std=0.2)
    return autoencoder.eval()


def pipeline(seed: int = 0, **scheduler_settings) -> QwenImagePipeline:
    """
    32x32 images, 8x8 latents in patches of 2x2. The pipeline takes 128x128 latents for its default size, so that trainings need
    `resolution=32`.
    """
    torch.manual_seed(seed)
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=tiny.flow_scheduler(**{"shift": 1.0, **SHIFT_BY_SIZE} | scheduler_settings),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
    )


def read_call(backbone, arguments, output, size) -> Call:
    def unpack(packed):
        return backbone.pipeline._unpack_latents(packed, *size, backbone.vae_scale_factor).squeeze(2)

    return Call(unpack(arguments["hidden_states"]), unpack(output[0]))


SHORT = {"max_sequence_length": 16}
FAMILY = Family(
    make=pipeline,
    read_call=read_call,
    settings={"resolution": 32, **SHORT},
    call=SHORT,
    guided={"true_cfg_scale": 2.0, "negative_prompt": [" ", " "], **SHORT},
    branches=(("conditional",), ("unconditional",)),
    schedules=({"shift_terminal": 0.02}, {"shift_terminal": 0.2}, {"use_dynamic_shifting": False, "shift": 3.0}),
    lora_target="add_q_proj",
)
