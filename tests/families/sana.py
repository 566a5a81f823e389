# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests import tiny
from trl_diffusion.backbones.sana import INSTRUCTION

from .family import Call, Family


def gemma_tokenizer() -> GemmaTokenizer:
    """One token a word and its blank, and one a line of the pipeline's instruction but the last; Gemma itself has no limit of tokens."""
    merges = []
    for word in sorted(tiny.WORDS, key=len, reverse=True):
        letters = ["▁", *word]
        merges += [("".join(letters[:index]), letters[index]) for index in range(1, len(letters))]
    tokens = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ","])
    tokens.update(dict.fromkeys(symbol for merge in merges for symbol in (*merge, "".join(merge))))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), add_bos_token=True)
    tokenizer.add_tokens(INSTRUCTION[:-1])
    return tokenizer


def gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(gemma_tokenizer()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            max_position_embeddings=64,
        )
    ).eval()


def dc_vae() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=1.5,
    )


def dpm_solver(**settings) -> DPMSolverMultistepScheduler:
    """What Sana's pipelines come with."""
    return DPMSolverMultistepScheduler(
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0} | settings
    )


def sana_pipeline(
    seed: int = 0, scheduler: type[SchedulerMixin] = DPMSolverMultistepScheduler, **scheduler_settings
) -> SanaPipeline:
    """
    32x32 images, 8x8 latents, 4 times smaller and not 32 times. The pipeline takes multiples of 32 pixels alone.
    """
    torch.manual_seed(seed)
    make = dpm_solver if scheduler is DPMSolverMultistepScheduler else scheduler
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ),
        scheduler=make(**scheduler_settings),
        vae=dc_vae(),
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
    )


def read_call(backbone, arguments, output, size) -> Call:
    return Call(arguments["hidden_states"], output[0])


SHORT = {"max_sequence_length": tiny.NUM_T5_TOKENS}
PLAIN = {"use_resolution_binning": False, **SHORT}
FAMILY = Family(
    make=sana_pipeline,
    read_call=read_call,
    settings=SHORT,
    call={"guidance_scale": 1.0, **PLAIN},
    guided={"guidance_scale": 2.0, **PLAIN},
    branches=(("unconditional", "conditional"),),
    half_tolerance=2**-6,  # the padding of the text is left out
    schedules=({}, {"flow_shift": 1.8}, {"scheduler": FlowMatchEulerDiscreteScheduler, "shift": 3.0}),
)
