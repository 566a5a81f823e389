# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests import tiny

from .family import Call, Family
from .qwen_image import SHIFT_BY_SIZE, VISION, text_config, tokenizer, vae


LAYERS = (1, 3)


def text_encoder() -> Qwen3VLModel:
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLModel(
        Qwen3VLConfig(text_config=text_config(3) | {"head_dim": 8}, vision_config=VISION | vision)
    ).eval()


def pipeline(seed: int = 0, is_distilled: bool = False, layers=LAYERS, **scheduler_settings) -> Krea2Pipeline:
    """32x32 images, 8x8 latents in patches of 2x2: Raw, or Turbo. The default size is 1024, so that trainings need `resolution=32`."""
    torch.manual_seed(seed)
    return Krea2Pipeline(
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=len(layers),
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=tiny.flow_scheduler(**{"shift": 1.0, **SHIFT_BY_SIZE} | scheduler_settings),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        text_encoder_select_layers=layers,
        is_distilled=is_distilled,
    )


def read_call(backbone, arguments, output, size) -> Call:
    def unpack(packed):
        return backbone.pipeline._unpack_latents(packed, *size).squeeze(2)

    return Call(unpack(arguments["hidden_states"]), unpack(output[0]))


SHORT = {"max_sequence_length": 24}
FAMILY = Family(
    make=pipeline,
    read_call=read_call,
    settings={"resolution": 32, **SHORT},
    call={"guidance_scale": 0.0, **SHORT},
    guided={"guidance_scale": 2.0, **SHORT},
    branches=(("conditional",), ("unconditional",)),
    schedules=({}, {"is_distilled": True}, {"use_dynamic_shifting": False, "shift": 3.0}),
    half_tolerance=2**-6,  # two units in the last place of a number near 1: the padding of the text is left out
    lora_target="to_gate",
)
