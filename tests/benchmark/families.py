# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The families at their true sizes: what the denoiser is, how it is called, and what encodes its images and prompts.

Sizes are the defaults of diffusers' classes, which are those of Z-Image, Qwen-Image, Krea 2, FLUX.1 and FLUX.2 dev, or stand with
their origin in `tests.benchmark.models`. `python -m tests.gpu.flops` counts their parameters and the TFLOP of a forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from tests.benchmark import models
from tests.benchmark.steps import predict as predict_sd
from trl_diffusion.backbones.flow import FlowBackbone
from trl_diffusion.backbones.stable_diffusion import StableDiffusionBackbone


Conditions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """
    A model of true size.

    Args:
        hub_id (`str`):
            What is trained.
        make_denoiser, make_vae (`Callable`):
            Make them, with random weights.
        make_text_encoders (`tuple[Callable, ...]`):
            Make the text encoders, with the number of tokens that each reads.
        predict (`Callable`):
            Calls the denoiser on latents, timesteps and conditions as the pipeline does.
        latent_channels (`int`):
            Channels of the latents.
        vae_scale_factor (`int`):
            Number of pixels along a side of a latent position.
        conditions (`dict[str, tuple[int, ...]]`):
            Shapes of the conditions of one prompt, of the longest that the pipeline reads by default.
        lora_target_modules (`tuple[str, ...]`):
            What a LoRA adapts.
        is_flow (`bool`):
            Whether it is a rectified flow.
    """

    hub_id: str
    make_denoiser: Callable[[], torch.nn.Module]
    make_vae: Callable[[], torch.nn.Module]
    make_text_encoders: tuple[tuple[Callable[[], torch.nn.Module], int], ...]
    predict: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
    latent_channels: int
    conditions: dict[str, tuple[int, ...]]
    lora_target_modules: tuple[str, ...] = StableDiffusionBackbone.lora_target_modules
    vae_scale_factor: int = 8
    is_flow: bool = True


# ----- how the transformers are called -----


def pack(latents: torch.Tensor) -> torch.Tensor:
    """2x2 positions become channels of one token: `(B, C, h, w)` -> `(B, h w / 4, 4 C)`."""
    batch_size, channels, height, width = latents.shape
    patches = latents.view(batch_size, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, -1, 4 * channels)


def unpack(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    batch_size, channels, height, width = like.shape
    patches = tokens.view(batch_size, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def predict_flux(transformer, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    ids = latents.new_zeros(latents.shape[2] * latents.shape[3] // 4, 3)
    tokens = transformer(
        hidden_states=FluxPipeline._pack_latents(latents, *latents.shape),
        timestep=timesteps / 1000,
        guidance=torch.ones_like(timesteps),
        pooled_projections=conditions["pooled_prompt_embeds"],
        encoder_hidden_states=conditions["prompt_embeds"],
        txt_ids=ids.new_zeros(conditions["prompt_embeds"].shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return unpack(tokens, latents)


def predict_flux2(transformer, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    has_guidance = "guidance" in conditions  # of dev
    ids = latents.new_zeros(latents.shape[2] * latents.shape[3] // 4, 4)
    tokens = transformer(
        hidden_states=pack(latents),
        timestep=timesteps / 1000,
        guidance=conditions["guidance"] if has_guidance else None,
        encoder_hidden_states=conditions["prompt_embeds"],
        txt_ids=ids.new_zeros(conditions["prompt_embeds"].shape[1], 4),
        img_ids=ids,
        return_dict=False,
    )[0]
    return unpack(tokens, latents)


def predict_z_image(
    transformer, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    images, prompts = list(latents.unsqueeze(2)), list(conditions["prompt_embeds"])
    predictions = transformer(images, (1000 - timesteps) / 1000, prompts, return_dict=False)[0]
    return -torch.stack(predictions).squeeze(2)


def predict_qwen_image(
    transformer, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    batch_size, _, height, width = latents.shape
    tokens = transformer(
        hidden_states=pack(latents),
        timestep=timesteps / 1000,
        encoder_hidden_states=conditions["prompt_embeds"],
        img_shapes=[(1, height // 2, width // 2)] * batch_size,
        return_dict=False,
    )[0]
    return unpack(tokens, latents)


def predict_krea_2(
    transformer, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    num_tokens = latents.shape[2] * latents.shape[3] // 4 + conditions["prompt_embeds"].shape[1]
    tokens = transformer(
        hidden_states=pack(latents),
        timestep=timesteps / 1000,
        encoder_hidden_states=conditions["prompt_embeds"],
        position_ids=latents.new_zeros(num_tokens, 3),
        return_dict=False,
    )[0]
    return unpack(tokens, latents)


def predict_sana(transformer, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    mask = latents.new_ones(conditions["prompt_embeds"].shape[:2])
    return transformer(
        latents,
        encoder_hidden_states=conditions["prompt_embeds"],
        encoder_attention_mask=mask,
        timestep=timesteps,
        return_dict=False,
    )[0]


# ----- the families -----

T5 = (models.t5_xxl, 512)
CLIP_L, CLIP_BIG_G = (models.clip_vit_l, 77), (models.openclip_bigg, 77)
SD35_ENCODERS = ((models.clip_vit_l_with_projection, 77), CLIP_BIG_G, (models.t5_xxl, 256))
SD35_CONDITIONS = {"prompt_embeds": (77 + 256, 4096), "pooled_prompt_embeds": (2048,)}
TWO_STREAMS = FlowBackbone.lora_target_modules  # projections of the image and of the text
UNET = {"predict": predict_sd, "latent_channels": 4, "is_flow": False}
FLUX2 = {"make_vae": AutoencoderKLFlux2, "predict": predict_flux2, "latent_channels": 32}


def flux2_targets(num_single_layers: int) -> tuple[str, ...]:
    """A single block has one projection for queries, keys, values and its feed-forward network, and one behind both."""
    outputs = (f"single_transformer_blocks.{block}.attn.to_out" for block in range(num_single_layers))
    return *TWO_STREAMS, "to_qkv_mlp_proj", *outputs


def sana(size: str) -> Family:
    return Family(
        f"Efficient-Large-Model/Sana_{size}_1024px_diffusers",
        *(partial(models.sana_transformer, size), models.deep_compression_vae, ((models.gemma2_2b, 300),)),
        *(predict_sana, 32, {"prompt_embeds": (300, 2304)}),
        vae_scale_factor=32,
    )


FAMILIES = {
    "sd15": Family(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        *(models.sd15_unet, partial(models.vae, 512), (CLIP_L,)),
        conditions={"prompt_embeds": (77, 768)},
        **UNET,
    ),
    "sdxl": Family(
        "stabilityai/stable-diffusion-xl-base-1.0",
        *(models.sdxl_unet, partial(models.vae, 1024), (CLIP_L, CLIP_BIG_G)),
        conditions={"prompt_embeds": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        **UNET,
    ),
    "sana_600m": sana("600M"),
    "sana": sana("1600M"),
    "sd35_medium": Family(
        "stabilityai/stable-diffusion-3.5-medium",
        *(models.sd35_medium_transformer, partial(models.flow_vae, 1.5305, 0.0609), SD35_ENCODERS),
        *(predict_sd, 16, SD35_CONDITIONS, TWO_STREAMS),
    ),
    "flux2_klein_4b": Family(
        "black-forest-labs/FLUX.2-klein-base-4B",
        partial(models.flux2_klein_transformer, "4B"),
        make_text_encoders=((models.qwen3_4b_lm, 512),),
        conditions={"prompt_embeds": (512, 3 * 2560)},
        lora_target_modules=flux2_targets(20),
        **FLUX2,
    ),
    "z_image": Family(
        "Tongyi-MAI/Z-Image",
        *(ZImageTransformer2DModel, partial(models.flow_vae, 0.3611, 0.1159), ((models.qwen3_4b, 512),)),
        *(predict_z_image, 16, {"prompt_embeds": (512, 2560)}),
    ),
    "sd35_large": Family(
        "stabilityai/stable-diffusion-3.5-large",
        *(models.sd35_large_transformer, partial(models.flow_vae, 1.5305, 0.0609), SD35_ENCODERS),
        *(predict_sd, 16, SD35_CONDITIONS, TWO_STREAMS),
    ),
    "flux2_klein_9b": Family(
        "black-forest-labs/FLUX.2-klein-base-9B",
        partial(models.flux2_klein_transformer, "9B"),
        make_text_encoders=((models.qwen3_8b_lm, 512),),
        conditions={"prompt_embeds": (512, 3 * 4096)},
        lora_target_modules=flux2_targets(24),
        **FLUX2,
    ),
    "flux": Family(
        "black-forest-labs/FLUX.1-dev",
        *(models.flux_dev_transformer, partial(models.flow_vae, 0.3611, 0.1159), (CLIP_L, T5)),
        *(predict_flux, 16, {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}, TWO_STREAMS),
    ),
    "krea2": Family(
        "krea/Krea-2-Raw",
        *(Krea2Transformer2DModel, AutoencoderKLQwenImage, ((models.qwen3_vl_4b, 512 + 34),)),
        *(predict_krea_2, 16, {"prompt_embeds": (512, 12, 2560)}),
        lora_target_modules=(*StableDiffusionBackbone.lora_target_modules, "to_gate"),
    ),
    "qwen_image": Family(
        "Qwen/Qwen-Image",
        *(QwenImageTransformer2DModel, AutoencoderKLQwenImage, ((models.qwen25_vl_7b, 512 + 34),)),
        *(predict_qwen_image, 16, {"prompt_embeds": (512, 3584)}, TWO_STREAMS),
    ),
    "flux2_dev": Family(
        "black-forest-labs/FLUX.2-dev",
        Flux2Transformer2DModel,
        make_text_encoders=((models.mistral_small_3, 512),),
        conditions={"prompt_embeds": (512, 15360), "guidance": ()},
        lora_target_modules=flux2_targets(48),
        **FLUX2,
    ),
}


def empty_latents(family: Family, rows: int, resolution: int) -> torch.Tensor:
    """Latents without values, float32."""
    side = resolution // family.vae_scale_factor
    return torch.empty(rows, family.latent_channels, side, side)


def empty_conditions(family: Family, rows: int) -> Conditions:
    """Conditions of some prompts without values, in bfloat16 as encoders give them; what is no embedding in float32."""
    return {
        name: torch.empty(rows, *shape, dtype=torch.bfloat16 if "embeds" in name else torch.float32)
        for name, shape in family.conditions.items()
    }
