# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""One file for each pipeline family."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .base import Backbone
from .checks import class_of_diffusers
from .dtypes import given_dtype
from .flux import FluxBackbone
from .flux_2 import Flux2KleinBackbone
from .flux_2_dev import Flux2Backbone
from .krea_2 import Krea2Backbone
from .names import find_model
from .quantization import SETTING, check_environment, read_quantization
from .qwen_image import QwenImageBackbone
from .sana import SanaBackbone
from .single_file import load_single_file
from .source import PipelineSource, read_index
from .stable_diffusion import StableDiffusionBackbone
from .stable_diffusion_3 import StableDiffusion3Backbone
from .stable_diffusion_xl import StableDiffusionXLBackbone
from .weights import check_finite
from .z_image import ZImageBackbone


logger = logging.getLogger(__name__)

BACKBONES = (
    StableDiffusionBackbone,
    StableDiffusionXLBackbone,
    StableDiffusion3Backbone,
    FluxBackbone,
    Flux2KleinBackbone,
    Flux2Backbone,
    ZImageBackbone,
    QwenImageBackbone,
    Krea2Backbone,
    SanaBackbone,
)


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
            A Hub id, a folder that holds a pipeline, a single file or its link on the Hub (see
            [`backbones.single_file.load_single_file`]), or a loaded pipeline, to which nothing below applies.
        encoder_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of the text encoders. The VAE is float32: it is small, and some overflow in half precision.
        denoiser_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of the denoiser.
        without_denoiser (`bool`, *optional*, defaults to `False`):
            Give the denoiser no weights before [`~backbones.base.Backbone.load_denoiser`] is called.
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`], such as `revision` and `variant`. A `dtype`, or a
            `torch_dtype`, goes before the two above; it may be a string, or a `dict` by component. `vae` may be the name of a VAE,
            see [`backbones.vae.load_vae`]. `quantization_config` is for folders, see [`backbones.quantization.read_quantization`].
            `config` is for single files.

    Returns:
        [`backbones.base.Backbone`]

    Raises:
        `ValueError`: If the pipeline's family is not supported, or if something about the pipeline makes training it wrong,
            see [`backbones.base.Backbone.check`].
    """
    if isinstance(model, DiffusionPipeline):
        if kwargs:
            logger.warning(
                f"`model_init_kwargs` ({', '.join(kwargs)}) says how to load a model: a loaded pipeline is taken as it is."
            )
        pipeline = model
        if getattr(pipeline, "safety_checker", None) is not None:
            logger.warning("The pipeline's safety checker is removed: it would turn samples black.")
            pipeline.register_modules(safety_checker=None)
            pipeline.register_to_config(requires_safety_checker=False)
        source, empty = None, {}
    elif Path(name := find_model(model)).is_file():
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                f"{SETTING} is for pipelines in folders, and {name} is a single file. Save it as a folder once, with "
                "`from_single_file(...).save_pretrained(...)` of its pipeline in diffusers, and name that."
            )
        dtype = given_dtype(kwargs) or {"default": denoiser_dtype, "vae": torch.float32}
        pipeline, source = load_single_file(name, dtype=dtype, **kwargs), None
    else:
        source, empty = _open(name, encoder_dtype, denoiser_dtype, without_denoiser, kwargs)
        pipeline = source.load_pipeline(**empty)
    backbone_class = backbone_class_of(pipeline)
    backbone_class.check(pipeline)
    return backbone_class(pipeline, source)


def _open(
    name: str,
    encoder_dtype: torch.dtype,
    denoiser_dtype: torch.dtype,
    without_denoiser: bool,
    kwargs: dict[str, Any],
) -> tuple[PipelineSource, dict[str, torch.nn.Module]]:
    """Where a pipeline is loaded from, and its denoiser without weights, by its name, if it is loaded without."""
    given = given_dtype(kwargs)
    if config := kwargs.pop("config", None):
        logger.warning(f"`config` is {config}, which is for single files: {name} has its own configuration.")
    unrounded = dtype = given or torch.float32
    class_name = read_index(name, kwargs)["_class_name"]
    families = [family for family in BACKBONES if family.pipeline_class.__name__ == class_name]
    config, quantization = kwargs.pop("quantization_config", None), None
    if config is not None and families:  # another family is refused once it is loaded
        quantization = read_quantization(config, families[0].denoiser_name, families[0].text_encoder_names)
        check_environment(SETTING)
    if families and not given and (encoder_dtype, denoiser_dtype) != (torch.float32, torch.float32):
        dtype = {"default": encoder_dtype, "vae": torch.float32, families[0].denoiser_name: denoiser_dtype}
    source = PipelineSource(name, dtype, unrounded, quantization, **kwargs)
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

    Raises:
        `ValueError`: If there is no such model, or its weights do not fit or are not finite.
    """
    name = find_model(name)
    if Path(name).is_file():
        pipeline = load_single_file(name, **kwargs)
    else:
        kwargs.pop("config", None)
        dtype = kwargs.pop("dtype", torch.float32)
        pipeline = PipelineSource(name, dtype, dtype, **kwargs).load_pipeline()
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            check_finite(part, module)
    return pipeline


def backbone_class_of(pipeline: DiffusionPipeline) -> type[Backbone]:
    """
    The backbone of a pipeline's family. A subclass of the user's own is of the family, one of diffusers is for another task.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.

    Returns:
        `type`: a subclass of [`backbones.base.Backbone`].

    Raises:
        `ValueError`: If the family is not supported.
    """
    for backbone_class in BACKBONES:
        if class_of_diffusers(pipeline) is backbone_class.pipeline_class:
            return backbone_class
    supported = ", ".join(f"`{backbone_class.pipeline_class.__name__}`" for backbone_class in BACKBONES)
    raise ValueError(
        f"`model` is a `{type(pipeline).__name__}`, a family that is not supported yet. Supported are {supported}: pass a "
        "text-to-image pipeline of one of these."
    )


__all__ = [
    "BACKBONES",
    "Backbone",
    "Flux2Backbone",
    "Flux2KleinBackbone",
    "FluxBackbone",
    "Krea2Backbone",
    "QwenImageBackbone",
    "SanaBackbone",
    "StableDiffusion3Backbone",
    "StableDiffusionBackbone",
    "StableDiffusionXLBackbone",
    "ZImageBackbone",
    "backbone_class_of",
    "load_backbone",
    "load_pipeline",
]
