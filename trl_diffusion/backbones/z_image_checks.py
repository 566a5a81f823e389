# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline of Z-Image must be so that it is trained rightly, see [`backbones.checks`]."""

from diffusers import ZImagePipeline

from .checks import refuse
from .flow_checks import check_thousand_timesteps, check_vae


def check_z_image_transformer(pipeline: ZImagePipeline) -> None:
    """Refuses a transformer that is called in another way, or that belongs to another VAE, text encoder or scheduler."""
    check_thousand_timesteps(pipeline)
    check_vae(pipeline)
    config, hidden_size = pipeline.transformer.config, pipeline.text_encoder.config.hidden_size
    if config.siglip_feat_dim is not None:
        refuse(
            f"`transformer.config.siglip_feat_dim` is {config.siglip_feat_dim}",
            "it takes images beside the prompt (Z-Image-Omni), whose layers a text-to-image pipeline leaves out",
            "Choose a text-to-image model, such as Z-Image",
        )
    patches = tuple(config.all_patch_size), tuple(config.all_f_patch_size)
    if patches != ((2,), (1,)):
        refuse(
            f"`transformer.config.all_patch_size` is {patches[0]} and `all_f_patch_size` is {patches[1]}",
            "a `ZImagePipeline` samples with patches of 2x2 in one frame, and would leave the layers of others untrained",
            "Load a transformer with `all_patch_size=(2,)` and `all_f_patch_size=(1,)`",
        )
    if config.cap_feat_dim != hidden_size:
        refuse(
            f"`transformer.config.cap_feat_dim` is {config.cap_feat_dim}, and `text_encoder` gives {hidden_size}",
            "they belong to different models",
            "Load the text encoder that belongs to the transformer",
        )
