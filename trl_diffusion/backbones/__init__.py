# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""One file for each pipeline family."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .base import Backbone
from .flux import FluxBackbone
from .single_file import is_single_file, load_single_file
from .source import PipelineSource, as_dtype, components_left_out, read_index
from .stable_diffusion import StableDiffusionBackbone
from .stable_diffusion_3 import StableDiffusion3Backbone
from .stable_diffusion_xl import StableDiffusionXLBackbone


logger = logging.getLogger(__name__)

BACKBONES = (StableDiffusionBackbone, StableDiffusionXLBackbone, StableDiffusion3Backbone, FluxBackbone)


def load_backbone(
    model: str | Path | DiffusionPipeline,
    *,
    encoder_dtype: torch.dtype = torch.float32,
    denoiser_dtype: torch.dtype = torch.float32,
    without_denoiser: bool = False,
    **kwargs,
) -> Backbone:
    """
    Loads a text-to-image pipeline for training.

    Args:
        model (`str`, `Path` or [`~diffusers.DiffusionPipeline`]):
            A Hub id, a folder that holds a pipeline, a single file (see [`backbones.single_file.load_single_file`]), or a loaded
            pipeline, to which nothing below applies.
        encoder_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of the text encoders. The VAE is float32: it is small, and some overflow in half precision.
        denoiser_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of the denoiser.
        without_denoiser (`bool`, *optional*, defaults to `False`):
            Give the denoiser no weights before [`~backbones.base.Backbone.load_denoiser`] is called.
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`], such as `revision` and `variant`. A `dtype`, or a
            `torch_dtype`, goes before the two above; it may be a string, or a `dict` by component.

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
        source, empty = None, {}
    elif is_single_file(str(model)):
        dtype = _given_dtype(kwargs) or {"default": denoiser_dtype, "vae": torch.float32}
        pipeline, source = load_single_file(str(model), dtype=dtype, **kwargs), None
    else:
        source, empty = _open(str(model), encoder_dtype, denoiser_dtype, without_denoiser, kwargs)
        pipeline = source.load_pipeline(**empty)
    backbone_class = backbone_class_of(pipeline)
    backbone_class.check(pipeline)
    return backbone_class(pipeline, source)


def _given_dtype(kwargs: dict[str, Any]) -> torch.dtype | dict[str, torch.dtype] | None:
    """Takes the precision that was asked for, by either of its names, out of the arguments."""
    given = [kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs]
    return as_dtype(given[0]) if given else None


def _open(
    name: str,
    encoder_dtype: torch.dtype,
    denoiser_dtype: torch.dtype,
    without_denoiser: bool,
    kwargs: dict[str, Any],
) -> tuple[PipelineSource, dict[str, torch.nn.Module]]:
    """Where a pipeline is loaded from, and its denoiser without weights, by its name, if it is loaded without."""
    given = _given_dtype(kwargs)
    unrounded = dtype = given or torch.float32
    class_name = read_index(name, kwargs)["_class_name"]
    families = [family for family in BACKBONES if family.pipeline_class.__name__ == class_name]
    if families and not given and (encoder_dtype, denoiser_dtype) != (torch.float32, torch.float32):
        dtype = {"default": encoder_dtype, "vae": torch.float32, families[0].denoiser_name: denoiser_dtype}
    source = PipelineSource(name, dtype, unrounded, **kwargs)
    names = [family.denoiser_name for family in families if without_denoiser and family.denoiser_name not in kwargs]
    empty = {name: source.empty(name) for name in names}
    return source, {name: module for name, module in empty.items() if module is not None}


def load_pipeline(name: str, **kwargs) -> DiffusionPipeline:
    """
    Loads a pipeline without its safety checker, which would turn some images black.

    Args:
        name (`str`):
            A Hub id, a folder that holds a pipeline, or a single file, see [`backbones.single_file.load_single_file`].
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`].

    Returns:
        [`~diffusers.DiffusionPipeline`]
    """
    if is_single_file(name):
        return load_single_file(name, **kwargs)
    return DiffusionPipeline.from_pretrained(name, **{**kwargs, **components_left_out(name, kwargs)})


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
