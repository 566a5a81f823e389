# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""One file per pipeline family."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from .base import Backbone
from .stable_diffusion import StableDiffusionBackbone
from .stable_diffusion_xl import StableDiffusionXLBackbone


BACKBONES = (StableDiffusionBackbone, StableDiffusionXLBackbone)


def load_backbone(model: str | Path | DiffusionPipeline, **kwargs) -> Backbone:
    """
    Loads a text-to-image pipeline for training.

    Args:
        model (`str`, `Path` or [`~diffusers.DiffusionPipeline`]):
            A Hub id, a folder that holds a pipeline, or a loaded pipeline.
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`], such as `revision`, `variant` or `dtype`
            (float32 if left out). Only for a Hub id or a folder.

    Returns:
        [`backbones.base.Backbone`]

    Raises:
        `ValueError`: If the pipeline's family is not supported, or if its denoiser carries adapters already.
    """
    if isinstance(model, DiffusionPipeline):
        pipeline = model
    else:
        pipeline = DiffusionPipeline.from_pretrained(str(model), **{"dtype": torch.float32, **kwargs})
    for backbone_class in BACKBONES:
        if type(pipeline) is backbone_class.pipeline_class:
            break
    else:
        supported = ", ".join(f"`{backbone_class.pipeline_class.__name__}`" for backbone_class in BACKBONES)
        raise ValueError(
            f"`model` is a `{type(pipeline).__name__}`, a family that cannot be trained yet. Supported are {supported}: "
            "pass a text-to-image pipeline of one of these."
        )
    if getattr(getattr(pipeline, backbone_class.denoiser_name), "peft_config", None):
        raise ValueError(
            "The pipeline's denoiser carries LoRA adapters already. Call `pipeline.fuse_lora()` and "
            "`pipeline.unload_lora_weights()` to train on top of them, or only the latter to train without them."
        )
    return backbone_class(pipeline)


__all__ = ["BACKBONES", "Backbone", "StableDiffusionBackbone", "StableDiffusionXLBackbone", "load_backbone"]
