# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline of FLUX.2 must be so that it is trained rightly, see [`backbones.checks`]."""

import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from transformers import PreTrainedConfig

from .checks import check_ignored, refuse, refuse_reference


def check_flux_2_vae(pipeline: DiffusionPipeline) -> None:
    """Refuses a VAE whose latents, in patches of 2x2 and by its own statistics, are not those that the transformer takes."""
    vae, channels = pipeline.vae, pipeline.transformer.config.in_channels
    if not isinstance(vae, AutoencoderKLFlux2):
        refuse(
            f"`vae` is a `{type(vae).__name__}`",
            f"a `{type(pipeline).__name__}` scales latents by the statistics of an `AutoencoderKLFlux2`",
            "Train with the model's `AutoencoderKLFlux2`, and put the other one back for sampling",
        )
    config = vae.config
    if 4 * config.latent_channels != channels or config.in_channels != 3 or config.out_channels != 3:
        refuse(
            f"`vae` has `in_channels={config.in_channels}`, `out_channels={config.out_channels}` and "
            f"`latent_channels={config.latent_channels}`, and `transformer` takes patches of {channels} channels",
            "images have 3 channels, and a patch has 2x2 positions of the VAE's latents",
            "Load the VAE that belongs to `transformer`",
        )
    if pipeline.vae_scale_factor != 2 ** (len(config.block_out_channels) - 1):
        refuse(
            f"`vae` has `block_out_channels={config.block_out_channels}` and `pipeline.vae_scale_factor` is {pipeline.vae_scale_factor}",
            "the VAE was put into a pipeline that was made with another one",
            f"Make the pipeline anew, `{type(pipeline).__name__}(**pipeline.components)`",
        )
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    if len(mean) != channels:
        refuse(
            f"`vae.config.patch_size` is {config.patch_size}, for which `vae.bn` has statistics of {len(mean)} channels",
            f"a patch of 2x2 positions has {channels}",
            "Load the VAE that belongs to `transformer`",
        )
    if not mean.isfinite().all() or not (variance.isfinite() & (variance + config.batch_norm_eps > 0)).all():
        refuse(
            "`vae.bn` has statistics that are not finite, or variances that are not positive",
            "latents are scaled by them",
            "Load the VAE that belongs to the model",
        )
    ignored = {"scaling_factor": 1, "shift_factor": 0, "latents_mean": 0, "latents_std": 1}
    check_ignored(pipeline, {key: (config.get(key), neutral) for key, neutral in ignored.items()})


def check_hidden_layers(pipeline: DiffusionPipeline, config: PreTrainedConfig, layers: tuple[int, ...]) -> None:
    """Refuses a text encoder, by the configuration of its language model, whose hidden layers are not what the transformer takes."""
    if config.num_hidden_layers < max(layers):
        refuse(
            f"`text_encoder` has {config.num_hidden_layers} layers",
            f"a `{type(pipeline).__name__}` takes what the layers {', '.join(map(str, layers))} give",
            "Load the text encoder that belongs to the transformer",
        )
    wanted, width = pipeline.transformer.config.joint_attention_dim, len(layers) * config.hidden_size
    if wanted != width:
        refuse(
            f"`transformer.config.joint_attention_dim` is {wanted}, and {len(layers)} layers of the text encoder give {width}",
            "they belong to different models",
            "Load the text encoder that belongs to the transformer",
        )


def check_same_statistics(vae: torch.nn.Module, other: torch.nn.Module) -> None:
    """Refuses a reference whose VAE scales latents by other statistics."""
    for name in ("running_mean", "running_var"):
        own, others = (getattr(each.bn, name).float().cpu() for each in (vae, other))
        if not torch.allclose(own, others, rtol=2**-7, atol=2**-7):  # the one may have been rounded to half precision
            refuse_reference(f"its `vae.bn.{name}` has other values")
