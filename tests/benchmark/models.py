# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Pipelines of true architecture with random weights, and image pairs for them."""

import io

import numpy as np
import torch
from datasets import Dataset
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from tests import tiny
from trl_diffusion import instance_pair_features
from trl_diffusion.quickstart.sampling import load_pipeline


# The words that every tokenizer here has
PROMPTS = [
    "a red circle and a blue square",
    "a blue circle and a red square",
    "a red square and a red circle",
    "a blue square and a blue circle",
]


def tokenizer() -> CLIPTokenizer:
    """The tests' small vocabulary, padded to CLIP's length."""
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def text_config(hidden_size: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
    """A CLIP text encoder of CLIP's vocabulary, with the special tokens of the tests' tokenizer."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden_size,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_vit_l() -> CLIPTextModel:
    return CLIPTextModel(text_config(768, 12, 12, "quick_gelu"))


def clip_vit_l_with_projection() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(768, 12, 12, "quick_gelu"))


def openclip_bigg() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(1280, 32, 20, "gelu"))


def t5_xxl() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def qwen3(hidden_size: int, intermediate_size: int) -> Qwen3Config:
    """Qwen3 4B (2560, 9728) or 8B (4096, 12288), by the configurations of their model cards; 4B ties its embeddings."""
    return Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=hidden_size == 2560,
    )


def qwen3_4b() -> Qwen3Model:
    return Qwen3Model(qwen3(2560, 9728))


def qwen3_4b_lm() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(qwen3(2560, 9728))


def qwen3_8b_lm() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(qwen3(4096, 12288))


def qwen25_vl_7b() -> Qwen2_5_VLForConditionalGeneration:
    """By the configuration of Qwen/Qwen2.5-VL-7B-Instruct."""
    text = {
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064},
        **{"num_attention_heads": 28, "num_key_value_heads": 4},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen3_vl_4b() -> Qwen3VLModel:
    """By the configuration of Qwen/Qwen3-VL-4B-Instruct."""
    text = {
        **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    }
    vision = {
        **{"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560},
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True))


def mistral_small_3() -> Mistral3ForConditionalGeneration:
    """By the configuration of mistralai/Mistral-Small-3.1-24B-Instruct-2503."""
    text = {
        **{"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072},
    }
    vision = {
        **{"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14},
    }
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


def gemma2_2b() -> Gemma2Model:
    return Gemma2Model(Gemma2Config())  # its defaults are google/gemma-2-2b-it


def deep_compression_vae() -> AutoencoderDC:
    """The VAE of Sana, by diffusers' `scripts/convert_dcae_to_diffusers.py`."""
    return AutoencoderDC(
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def vae(sample_size: int, latent_channels: int = 4, **kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=sample_size,
        **kwargs,
    )


def flow_vae(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """The VAE of Stable Diffusion 3 and of FLUX.1, which differ in their statistics."""
    return vae(
        1024,
        latent_channels=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
    )


def sd35_medium_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def sd35_large_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=38,
        attention_head_dim=64,
        num_attention_heads=38,
        joint_attention_dim=4096,
        caption_projection_dim=2432,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )


def flux_dev_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(guidance_embeds=True)


def flux2_klein_transformer(size: str) -> Flux2Transformer2DModel:
    """FLUX.2-klein base, `"4B"` or `"9B"`, by the `transformer/config.json` of their repositories as several trainers quote it."""
    shape = {
        "4B": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560},
        "9B": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 3 * 4096},
    }
    return Flux2Transformer2DModel(**shape[size], guidance_embeds=False)


def sana_transformer(size: str) -> SanaTransformer2DModel:
    """Sana, `"600M"` or `"1600M"` (the defaults of the class), by diffusers' `scripts/convert_sana_to_diffusers.py`."""
    small = {
        **{"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16},
        **{"cross_attention_head_dim": 72, "cross_attention_dim": 1152},
    }
    return SanaTransformer2DModel(**(small if size == "600M" else {}))


def sd15_pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(512),
        text_encoder=clip_vit_l(),
        tokenizer=tokenizer(),
        unet=sd15_unet(),
        scheduler=tiny.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_vit_l(),
        text_encoder_2=openclip_bigg(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=sdxl_unet(),
        scheduler=tiny.scheduler(),
        add_watermarker=False,
    )


def sd35_pipeline(
    transformer: SD3Transformer2DModel, t5: T5EncoderModel, clips: list[CLIPTextModelWithProjection]
) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=flow_vae(1.5305, 0.0609),
        text_encoder=clips[0],
        tokenizer=tokenizer(),
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=tiny.t5_tokenizer(),
        transformer=transformer,
        scheduler=tiny.flow_scheduler(shift=3.0),
    )


def sd35_medium_pipeline() -> StableDiffusion3Pipeline:
    return sd35_pipeline(sd35_medium_transformer(), t5_xxl(), [clip_vit_l_with_projection(), openclip_bigg()])


def sd35_large_pipeline() -> StableDiffusion3Pipeline:
    return sd35_pipeline(sd35_large_transformer(), t5_xxl(), [clip_vit_l_with_projection(), openclip_bigg()])


def flux_dev_pipeline() -> FluxPipeline:
    return FluxPipeline(
        vae=flow_vae(0.3611, 0.1159),
        text_encoder=clip_vit_l(),
        tokenizer=tokenizer(),
        text_encoder_2=t5_xxl(),
        tokenizer_2=tiny.t5_tokenizer(),
        transformer=flux_dev_transformer(),
        scheduler=tiny.flow_scheduler(shift=3.0, use_dynamic_shifting=True),
    )


TINY = {"tiny": "base_pipeline", "tiny_flow": "flow_base_pipeline"}
TRUE_SIZE = {"sd15": sd15_pipeline, "sdxl": sdxl_pipeline, "sd35_medium": sd35_medium_pipeline}


def build_pipeline(name: str, device: str, encoder_dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """
    A pipeline in float32, but for its text encoders: `tiny` and `tiny_flow` are the quickstart's, the others have their true size
    and the same random weights each time.
    """
    if name in TINY:
        pipeline = load_pipeline(TINY[name]).to(device)
    else:
        torch.manual_seed(0)
        with torch.device(device):  # weights are drawn where they will be
            pipeline = TRUE_SIZE[name]()
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config
        )  # on the CPU, as when loaded
    for component, module in pipeline.components.items():
        if component.startswith("text_encoder") and module is not None:
            module.to(encoder_dtype)
    return pipeline


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    return pipeline.components["unet" if "unet" in pipeline.components else "transformer"]


def jpeg(rng: np.random.Generator, resolution: int) -> dict[str, bytes]:
    """A random picture without the finest detail, which photographs do not have either."""
    blocks = rng.integers(0, 256, (resolution // 8, resolution // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((resolution, resolution), Image.Resampling.BICUBIC).save(file, "JPEG")
    return {"bytes": file.getvalue()}


def image_pairs(ids: list[str], resolution: int) -> Dataset:
    """One pair of JPEG files an id, of at most 64 different ones, with one instance that contradicts the label."""
    rng = np.random.default_rng(0)
    files = [jpeg(rng, resolution) for _ in range(min(2 * len(ids), 64))]
    instance = {
        "label": "circle",
        "chosen_box": [0, 0, resolution // 2, resolution // 2],
        "rejected_box": [resolution // 4, resolution // 4, resolution, resolution],
        "preference": "rejected",
    }
    rows = [
        {
            "id": row_id,
            "prompt": PROMPTS[index % len(PROMPTS)],
            "chosen": files[2 * index % len(files)],
            "rejected": files[(2 * index + 1) % len(files)],
            "instances": [instance],
        }
        for index, row_id in enumerate(ids)
    ]
    return Dataset.from_list(rows, features=instance_pair_features())
