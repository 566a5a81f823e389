# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline with a flow transformer must be so that it is trained rightly, see [`backbones.checks`]."""

from collections.abc import Callable, Collection

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, SchedulerMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention

from .checks import (
    check_ignored,
    check_module,
    check_other_weights,
    check_same_inputs,
    check_text_encoder,
    check_vae_scale,
    plain_tokenizer,
    refuse,
    refuse_reference,
    tokenizer_of,
)


def check_flow_pipeline(
    pipeline: DiffusionPipeline,
    transformer_class: type[torch.nn.Module],
    text_encoders: dict[str, str],
    attention_processors: Collection[str],
    check_scheduler: Callable[[SchedulerMixin], None],
) -> None:
    """
    Refuses a pipeline of a flow transformer that is not made of the parts of its family.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        transformer_class (`type`):
            Class of its transformer.
        text_encoders (`dict[str, str]`):
            Names of the text encoders, and of their classes.
        attention_processors (`Collection[str]`):
            Names of the attention processors that compute plain attention by the layers that are trained and saved.
        check_scheduler (`Callable`):
            Refuses a scheduler that does not tell how the family's timesteps are shifted.

    Raises:
        `ValueError`: As all checks.
    """
    for name in ("scheduler", "transformer", "vae", *map(tokenizer_of, text_encoders), *text_encoders):
        if getattr(pipeline, name, None) is None:
            refuse(f"`{name}` is None", "training needs it", f"Load the pipeline without `{name}=None`")
    check_scheduler(pipeline.scheduler)
    for name in ("transformer", "vae", *text_encoders):
        check_module(name, getattr(pipeline, name))
    check_transformer(pipeline, transformer_class, attention_processors)
    for name, wanted in text_encoders.items():
        check_text_encoder(pipeline, name, wanted)


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuses a scheduler that does not tell how the timesteps of a rectified flow are shifted."""
    name, config = type(scheduler).__name__, scheduler.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        refuse(
            f"`scheduler` is a `{name}`",
            "the timesteps of a rectified flow are shifted as its `FlowMatchEulerDiscreteScheduler` shifts them",
            "Load the model's own scheduler for training, and put the other one back for sampling",
        )
    correct = "Load the scheduler that belongs to the model"
    if config.invert_sigmas:
        refuse(
            f"`scheduler.config.invert_sigmas` is {config.invert_sigmas}", "these models start from the noise", correct
        )
    shifts = ("base_shift", "max_shift") if config.use_dynamic_shifting else ("shift",)
    for key in shifts:
        value = scheduler.shift if key == "shift" else config[key]
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            refuse(f"`scheduler.config.{key}` is {value!r}", "timesteps are shifted by it", correct)


def check_thousand_timesteps(pipeline: DiffusionPipeline) -> None:
    """Refuses another number of timesteps than 1000 where the pipeline divides by 1000."""
    number = pipeline.scheduler.config.num_train_timesteps
    if number != 1000:
        refuse(
            f"`scheduler.config.num_train_timesteps` is {number}",
            f"a `{type(pipeline).__name__}` divides timesteps by 1000, whatever the scheduler says",
            "Load the scheduler that belongs to the model",
        )


def check_chat(pipeline: DiffusionPipeline) -> None:
    """Refuses a tokenizer that cannot write a prompt as the pipeline does, as the message of a chat, and pad it."""
    tokenizer = pipeline.tokenizer
    needed = {"chat_template": tokenizer.chat_template, "pad_token": plain_tokenizer(tokenizer).pad_token}
    for name, value in needed.items():
        if value is None:
            refuse(
                f"`tokenizer.{name}` is None",
                f"a `{type(pipeline).__name__}` encodes prompts as messages of a chat, and pads them",
                "Load the tokenizer that belongs to the model",
            )


def check_transformer(
    pipeline: DiffusionPipeline, wanted: type[torch.nn.Module], attention_processors: Collection[str]
) -> None:
    """Refuses a transformer that needs more than noised latents, a timestep and a prompt."""
    transformer = pipeline.transformer
    if type(transformer) is not wanted:
        refuse(
            f"`transformer` is a `{type(transformer).__name__}`",
            f"a `{type(pipeline).__name__}` has a `{wanted.__name__}`",
            f"Put the plain `{wanted.__name__}` into the pipeline",
        )
    attentions = [module for module in transformer.modules() if isinstance(module, Attention | AttentionModuleMixin)]
    processors = {type(attention.processor).__name__ for attention in attentions}
    if any("IPAdapter" in name for name in processors):
        refuse("`transformer` carries an IP-Adapter", "training has no image prompts", "Load the pipeline without it")
    is_fused = any(attention.fused_projections for attention in attentions)
    if is_fused or (others := processors - set(attention_processors)):
        what = "fused projections" if is_fused else f"attention processors of the kind `{', '.join(sorted(others))}`"
        refuse(
            f"`transformer` has {what}",
            "they compute something else than the layers that are trained and saved",
            "Call `pipeline.transformer.unfuse_qkv_projections()`, or load the pipeline anew",
        )
    config = transformer.config
    out_channels = config.get("out_channels") or config.in_channels
    packed_channels = out_channels * config.get("patch_size", 1) ** 2  # where the transformer counts before packing
    if config.in_channels not in (out_channels, packed_channels):
        refuse(
            f"`transformer.config.in_channels` is {config.in_channels} and `out_channels` is {out_channels}",
            "it takes more than the noised latents (inpainting, depth, image editing)",
            "Choose a text-to-image model, where both are the same",
        )


def check_vae(pipeline: DiffusionPipeline) -> None:
    """Refuses a VAE whose latents are not those that Stable Diffusion 3, FLUX.1 or Z-Image decodes."""
    channels = pipeline.transformer.config.in_channels
    if isinstance(pipeline, FluxPipeline):
        channels //= 4  # 2x2 positions are packed into the channels
    check_vae_scale(pipeline, "transformer", channels)
    config = pipeline.vae.config
    shift = config.get("shift_factor")
    if not isinstance(shift, int | float) or not abs(shift) < float("inf"):
        refuse(
            f"`vae.config.shift_factor` is {shift!r}",
            f"a `{type(pipeline).__name__}` adds it to the latents when it decodes",
            "Call `pipeline.vae.register_to_config(shift_factor=0.0)` if the model was trained without a shift",
        )
    check_ignored(
        pipeline, {"latents_mean": (config.get("latents_mean"), 0), "latents_std": (config.get("latents_std"), 1)}
    )


def check_clip_and_t5(pipeline: DiffusionPipeline) -> None:
    """Refuses CLIP and T5 encoders whose embeddings are not of the width that the transformer takes."""
    config, clip = pipeline.transformer.config, pipeline.text_encoder.config
    if isinstance(pipeline, FluxPipeline):
        pooled, longest, t5 = clip.hidden_size, 0, pipeline.text_encoder_2
    else:
        clips = clip, pipeline.text_encoder_2.config
        pooled, longest = (sum(getattr(each, key) for each in clips) for key in ("projection_dim", "hidden_size"))
        t5 = pipeline.text_encoder_3
    widths = [("pooled_projection_dim", pooled)] + ([("joint_attention_dim", t5.config.d_model)] if t5 else [])
    for key, width in widths:
        if config[key] != width:
            refuse(
                f"`transformer.config.{key}` is {config[key]}, and the text encoders give {width}",
                "they belong to different models",
                "Load the text encoders that belong to the transformer",
            )
    if longest > config.joint_attention_dim:
        refuse(
            f"`transformer.config.joint_attention_dim` is {config.joint_attention_dim}, and the two CLIP encoders give {longest}",
            "they belong to different models",
            "Load the text encoders that belong to the transformer",
        )
    if pipeline.tokenizer_max_length != pipeline.tokenizer.model_max_length or (
        longest and pipeline.tokenizer_2.model_max_length != pipeline.tokenizer.model_max_length
    ):
        refuse(
            f"`tokenizer.model_max_length` is {pipeline.tokenizer.model_max_length}, and the pipeline pads to "
            f"{pipeline.tokenizer_max_length}",
            "prompts of both CLIP encoders are padded to one number of tokens, which is read when the pipeline is made",
            f"Set both tokenizers to the same, and make the pipeline anew, `{type(pipeline).__name__}(**pipeline.components)`",
        )


def check_flow_reference(
    pipeline: DiffusionPipeline,
    reference: DiffusionPipeline,
    transformer_inputs: tuple[str, ...],
    text_encoders: tuple[str, ...],
    vae_settings: tuple[str, ...],
    moments: Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """
    Refuses a reference that cannot be given what the policy is given, see [`backbones.checks.check_same_inputs`].

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The policy's pipeline.
        reference ([`~diffusers.DiffusionPipeline`]):
            The reference's pipeline.
        transformer_inputs (`tuple[str, ...]`):
            Settings of the transformer that its inputs depend on.
        text_encoders (`tuple[str, ...]`):
            Names of the text encoders.
        vae_settings (`tuple[str, ...]`):
            Settings of the VAE that the scale of latents depends on.
        moments (`Callable`):
            Encodes images by a VAE of the family.

    Raises:
        `ValueError`: If the reference does not fit.
    """
    check_other_weights(pipeline, reference, "transformer")
    own, other = (each.scheduler.config.num_train_timesteps for each in (pipeline, reference))
    if own != other:
        refuse_reference(f"its `scheduler.config.num_train_timesteps` is {other} and the policy's is {own}")
    check_same_inputs(pipeline, reference, "transformer", transformer_inputs, text_encoders, vae_settings, moments)
