# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Real classes of diffusers and transformers on tiny random weights, and a handful of image pairs."""

import copy
from functools import cache

import numpy as np
import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    Trainer,
)

from trl_diffusion import attribute_features, instance_pair_features
from trl_diffusion.backbones import Backbone


WORDS = ["a", "red", "blue", "circle", "square", "and", "cat", "dog"]


def tokenizer() -> CLIPTokenizer:
    """One token a word: each word is merged letter by letter."""
    merges = []
    for word in sorted(WORDS, key=len, reverse=True):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(letters[:index]), letters[index]) for index in range(1, len(letters))]
    tokens = dict.fromkeys(["<|startoftext|>", "<|endoftext|>", "a</w>"])
    tokens.update(dict.fromkeys(symbol for merge in merges for symbol in (*merge, "".join(merge))))
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=12)


def text_encoder(projection: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def scheduler(**kwargs) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **kwargs,
    )


def sd_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """32x32 images, 8x8 latents."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """32x32 images, 8x8 latents."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
    )


def t5_tokenizer() -> T5Tokenizer:
    """One token a word; T5 itself has no limit of tokens."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", ",", *(f"▁{word}" for word in WORDS)]
    return T5Tokenizer(vocab=[(token, -float(place)) for place, token in enumerate(tokens)], extra_ids=0)


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
        )
    ).eval()  # as when it is loaded: T5 has dropout


def flow_scheduler(**kwargs) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"num_train_timesteps": 1000, "shift": 3.0} | kwargs)


def flow_vae() -> AutoencoderKL:
    autoencoder = vae()
    autoencoder.register_to_config(shift_factor=0.1, scaling_factor=1.5)
    return autoencoder


def sd3_pipeline(seed: int = 0, has_t5: bool = True, **scheduler_settings) -> StableDiffusion3Pipeline:
    """32x32 images, 8x8 latents in patches of 2x2; the second block has the dual attention of Stable Diffusion 3.5 medium."""
    torch.manual_seed(seed)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=flow_scheduler(**scheduler_settings),
        vae=flow_vae(),
        text_encoder=text_encoder(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5_encoder() if has_t5 else None,
        tokenizer_3=t5_tokenizer() if has_t5 else None,
    )


def flux_pipeline(seed: int = 0, guidance_embeds: bool = True, **scheduler_settings) -> FluxPipeline:
    """
    32x32 images, 8x8 latents in patches of 2x2; with the guidance embedding and the shift by size of dev, or like schnell.
    A pipeline of FLUX.1 takes 128x128 latents for its default size, so that trainings need `resolution=32`.
    """
    torch.manual_seed(seed)
    dev = {"shift": 3.0, "use_dynamic_shifting": True, "max_image_seq_len": 64, "base_image_seq_len": 4}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=flow_scheduler(**(dev if guidance_embeds else {"shift": 1.0}) | scheduler_settings),
        vae=flow_vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def image(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pairs(num_rows: int = 8, with_instances: bool = True) -> Dataset:
    """Pairs of random images of several sizes; two instances a pair, every other second one in conflict."""
    return copy.copy(_pairs(num_rows, with_instances))


@cache
def _pairs(num_rows: int, with_instances: bool) -> Dataset:
    rows = []
    for index in range(num_rows):
        width, height = [(40, 32), (32, 48), (64, 64)][index % 3]
        row = {
            "id": f"row-{index}",
            "prompt": "a red circle and a blue square" if index % 2 else "a cat and a dog",
            "chosen": image(2 * index, width, height),
            "rejected": image(2 * index + 1, height, width),
        }
        if with_instances:
            row["instances"] = [
                {
                    "label": "circle",
                    "chosen_box": [2, 4, 16, 20],
                    "rejected_box": [4, 2, 20, 16],
                    "preference": "chosen",
                },
                {
                    "label": "square",
                    "chosen_box": [14, 8, 30, 30],
                    "rejected_box": [10, 14, 31, 31],
                    "preference": "rejected" if index % 2 else "tie",
                },
            ]
        rows.append(row)
    features = instance_pair_features()
    if not with_instances:
        del features["instances"]
    return Dataset.from_list(rows, features=features)


PIPELINES = {
    "sd": sd_pipeline,
    "sd_v": lambda: sd_pipeline("v_prediction"),
    "sdxl": sdxl_pipeline,
    "sd3": sd3_pipeline,
    "sd3_without_t5": lambda: sd3_pipeline(has_t5=False),
    "flux": flux_pipeline,
    "schnell": lambda: flux_pipeline(guidance_embeds=False),
}
UNETS = ("sd", "sd_v", "sdxl")
FLOWS = ("sd3", "flux")
FAMILIES = (*UNETS, *FLOWS)
NUM_T5_TOKENS = 16


def settings(pipeline: DiffusionPipeline) -> dict[str, int]:
    """What a configuration must say of a tiny pipeline: few tokens for T5, and the size where the pipeline has that of FLUX.1."""
    if isinstance(pipeline, FluxPipeline):
        return {"resolution": 32, "max_sequence_length": NUM_T5_TOKENS}
    return {"max_sequence_length": NUM_T5_TOKENS} if isinstance(pipeline, StableDiffusion3Pipeline) else {}


# Trainings of three steps that write nothing
FAST = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
}


def lora(r: int = 4, alpha: int = 4) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha)


def losses(trainer: Trainer) -> list[float]:
    """The losses that a training logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CRITERIA = """
name: tiny
levels: [dimension, attribute]
tree:
  color:
    hue: {positive: red, negative: blue, definition: Whether it is red.}
  drawing:
    kind: {positive: circle, negative: square, definition: Whether it is round.}
    pet: {positive: cat, negative: dog, definition: Whether it purrs.}
"""


def paintings(num_rows: int = 8) -> Dataset:
    """Random images with attributes of both kinds, of one kind, and with an attribute that says nothing."""
    return copy.copy(_paintings(num_rows))


@cache
def _paintings(num_rows: int) -> Dataset:
    kinds = [(["hue"], ["kind", "pet"]), (["hue", "kind"], []), ([], ["kind"]), (["pet", "kind"], ["hue"])]
    rows = [
        {
            "id": f"row-{index}",
            "prompt": "a and a" if index % 2 else "a",
            "image": image(index, *[(40, 32), (32, 48), (64, 64)][index % 3]),
            "positive_attributes": kinds[index % 4][0],
            "negative_attributes": kinds[index % 4][1],
        }
        for index in range(num_rows)
    ]
    return Dataset.from_list(rows, features=attribute_features())


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's weights."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def max_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two copies of a module's weights."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def latents(trainer, batch: dict) -> torch.Tensor:
    """The latents of a batch as a trainer samples them."""
    keys = [trainer.randomness.key(row_id, column) for column in trainer.image_columns for row_id in batch["id"]]
    return trainer.encoder.sample_latents(batch, keys)


@torch.no_grad()
def predictions(backbone: Backbone, denoiser: torch.nn.Module) -> torch.Tensor:
    """What a denoiser predicts, without dropout, for two prompts and random latents of 32x32 images, at two timesteps."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes, crops = torch.tensor([[32, 32]] * 2), torch.zeros(2, 2, dtype=torch.int64)
    conditions = backbone.encode_prompts(["a red circle", "a cat and a dog"])
    conditions |= backbone.image_conditions(sizes, crops, (32, 32))
    return backbone.predict(denoiser.eval(), latents, torch.tensor([10, 700]), conditions)


def other_unet():
    """A pipeline that differs from `sd_pipeline()` in its UNet alone."""
    pipeline = sd_pipeline()
    pipeline.unet = sd_pipeline(seed=1).unet
    return pipeline
