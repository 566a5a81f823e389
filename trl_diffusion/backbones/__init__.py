# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""One file for each pipeline family."""

import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from .base import Backbone
from .flux import FluxBackbone
from .stable_diffusion import StableDiffusionBackbone
from .stable_diffusion_3 import StableDiffusion3Backbone
from .stable_diffusion_xl import StableDiffusionXLBackbone


logger = logging.getLogger(__name__)

BACKBONES = (StableDiffusionBackbone, StableDiffusionXLBackbone, StableDiffusion3Backbone, FluxBackbone)


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
        `ValueError`: If the pipeline's family is not supported, or if something about the pipeline makes training it wrong,
            see [`backbones.base.Backbone.check`].
    """
    if isinstance(model, DiffusionPipeline):
        pipeline = model
        if getattr(pipeline, "safety_checker", None) is not None:
            logger.warning("The pipeline's safety checker is removed: it would turn samples black.")
            pipeline.register_modules(safety_checker=None)
            pipeline.register_to_config(requires_safety_checker=False)
    else:
        pipeline = load_pipeline(str(model), **{"dtype": torch.float32, **kwargs})
    backbone_class = backbone_class_of(pipeline)
    backbone_class.check(pipeline)
    return backbone_class(pipeline)


def load_pipeline(name: str, **kwargs) -> DiffusionPipeline:
    """
    Loads a pipeline without its safety checker, which would turn some images black.

    Args:
        name (`str`):
            A Hub id, or a folder that holds a pipeline.
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`].

    Returns:
        [`~diffusers.DiffusionPipeline`]
    """
    location = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    if DiffusionPipeline.load_config(name, **location).get("safety_checker", [None])[0] is not None:
        logger.warning(f"The safety checker of {name} is not loaded: it would turn some images black.")
        kwargs |= {"safety_checker": None, "requires_safety_checker": False}
    return DiffusionPipeline.from_pretrained(name, **kwargs)


def backbone_class_of(pipeline: DiffusionPipeline) -> type[Backbone]:
    """
    The backbone of a pipeline's family.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.

    Returns:
        `type`: a subclass of [`backbones.base.Backbone`].

    Raises:
        `ValueError`: If the family is not supported.
    """
    for backbone_class in BACKBONES:
        if type(pipeline) is backbone_class.pipeline_class:
            return backbone_class
    supported = ", ".join(f"`{backbone_class.pipeline_class.__name__}`" for backbone_class in BACKBONES)
    raise ValueError(
        f"`model` is a `{type(pipeline).__name__}`, a family that is not supported yet. Supported are {supported}: pass a "
        "text-to-image pipeline of one of these."
    )


__all__ = [
    "BACKBONES",
    "Backbone",
    "FluxBackbone",
    "StableDiffusion3Backbone",
    "StableDiffusionBackbone",
    "StableDiffusionXLBackbone",
    "backbone_class_of",
    "load_backbone",
    "load_pipeline",
]
