# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What Qwen-Image and Krea 2 share: a VAE that encodes videos, of which an image is one frame, and prompts in a template."""

import math

import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline

from .checks import check_ignored, refuse
from .vae import posterior_moments


VAE_SETTINGS = ("latents_mean", "latents_std")


def frame_moments(vae: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`backbones.vae.posterior_moments`], by a VAE that takes `(B, 3, frames, H, W)`."""
    mean, std = posterior_moments(vae, images.unsqueeze(2))
    return mean.squeeze(2), std.squeeze(2)


def text_mask(embeds: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor | None:
    """
    Which tokens are no padding. Without a mask attention is faster, and whether one is needed is known without waiting for the device.

    Args:
        embeds (`torch.Tensor` of shape `(B, L, ...)`):
            The padded sequences.
        lengths (`torch.Tensor` of shape `(B,)`):
            Their own lengths, on the CPU.

    Returns:
        `torch.Tensor` of shape `(B, L)`, or `None` where nothing is padded: booleans on the device of the sequences.
    """
    mask = torch.arange(embeds.shape[1]) < lengths[:, None]
    return None if mask.all() else mask.to(embeds.device, non_blocking=True)


def check_frame_vae(pipeline: DiffusionPipeline, patch_size: int) -> None:
    """
    Refuses a VAE whose latents are not those that the pipeline decodes.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        patch_size (`int`):
            Number of latent positions along a side of what is packed into the channels of the transformer.

    Raises:
        `ValueError`: As all checks.
    """
    vae = pipeline.vae
    if not isinstance(vae, AutoencoderKLQwenImage):
        refuse(
            f"`vae` is a `{type(vae).__name__}`",
            f"a `{type(pipeline).__name__}` decodes frames by an `AutoencoderKLQwenImage`",
            "Train with the model's `AutoencoderKLQwenImage`, and put the other one back for sampling",
        )
    config, packed = vae.config, pipeline.transformer.config.in_channels
    if config.input_channels != 3 or config.z_dim * patch_size**2 != packed:
        refuse(
            f"`vae` has `input_channels={config.input_channels}` and `z_dim={config.z_dim}`, and `transformer` takes {packed} channels "
            f"for {patch_size}x{patch_size} positions",
            "images have 3 channels, and `transformer` takes the latents of the VAE alone",
            "Load the VAE that belongs to `transformer`",
        )
    halvings = len(config.temperal_downsample)
    if halvings != len(config.dim_mult) - 1 or pipeline.vae_scale_factor != 2**halvings:
        refuse(
            f"`vae` has `dim_mult={config.dim_mult}` and `temperal_downsample={config.temperal_downsample}`, and "
            f"`pipeline.vae_scale_factor` is {pipeline.vae_scale_factor}",
            "the size of latents follows from them",
            f"Load the model's VAE, and make the pipeline anew, `{type(pipeline).__name__}(**pipeline.components)`",
        )
    for key, low in (("latents_mean", -math.inf), ("latents_std", 0.0)):
        values = config[key]
        if values is None or len(values) != config.z_dim or not all(low < value < math.inf for value in values):
            refuse(
                f"`vae.config.{key}` is {values!r}",
                f"the pipeline normalizes each of {config.z_dim} channels by it",
                "Load the model's own VAE",
            )
    ignored = {key: config.get(key) for key in ("scaling_factor", "shift_factor")}
    check_ignored(
        pipeline, {"scaling_factor": (ignored["scaling_factor"], 1), "shift_factor": (ignored["shift_factor"], 0)}
    )


def check_template(pipeline: DiffusionPipeline, prefix: str) -> None:
    """
    Refuses a tokenizer that cuts the beginning of the pipeline's template into another number of tokens than the pipeline drops.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        prefix (`str`):
            What the template has before the prompt.

    Raises:
        `ValueError`: As all checks.
    """
    dropped, number = pipeline.prompt_template_encode_start_idx, len(pipeline.tokenizer(prefix).input_ids)
    if number != dropped:
        refuse(
            f"`tokenizer` cuts what stands before the prompt in the template into {number} tokens",
            f"a `{type(pipeline).__name__}` drops the first {dropped}, so that "
            f"{'the prompt would lose its beginning' if number < dropped else 'the template would be read as the prompt'}",
            "Load the tokenizer that belongs to `text_encoder`",
        )


def check_text_width(pipeline: DiffusionPipeline, key: str) -> None:
    """Refuses a text encoder whose embeddings are not of the width that the transformer takes, by the transformer's setting."""
    width, taken = pipeline.text_encoder.config.text_config.hidden_size, pipeline.transformer.config[key]
    if width != taken:
        refuse(
            f"`transformer.config.{key}` is {taken}, and the text encoder gives {width}",
            "they belong to different models",
            "Load the text encoder that belongs to the transformer",
        )
