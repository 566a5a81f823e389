# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Loading a checkpoint that is one file in the layout of the original code, by diffusers' `from_single_file`."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

from .dtypes import check_components, dtype_of
from .files import read_checkpoint
from .folder_checks import allowing_pickles, check_folder
from .kinds import kind_of
from .names import find_model
from .source import components_left_out, local_folder, read_index
from .stable_diffusion_checks import check_velocity
from .vae import load_vae
from .weights import load_checked, reason_of


logger = logging.getLogger(__name__)

# The families that are supported, by what diffusers calls a checkpoint
FAMILIES = {
    "v1": StableDiffusionPipeline,
    "v2": StableDiffusionPipeline,
    "xl_base": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "sd35_medium": StableDiffusion3Pipeline,
    "sd35_large": StableDiffusion3Pipeline,
    "flux-dev": FluxPipeline,
    "flux-schnell": FluxPipeline,
}
# What the names of weights begin with, for the components that a file may be without
VAE = ("first_stage_model.", "vae.")
PREFIXES = {
    StableDiffusionPipeline: {"vae": VAE, "text_encoder": ("cond_stage_model.",)},
    StableDiffusionXLPipeline: {
        "vae": VAE,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    },
    StableDiffusion3Pipeline: {
        "vae": VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    FluxPipeline: {
        "vae": VAE,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
}


def is_single_file(name: str) -> bool:
    """
    Whether a model is one file, and not a folder or a Hub id.

    Args:
        name (`str`):
            The model's name.

    Returns:
        `bool`

    Raises:
        `ValueError`: If there is none, see [`backbones.names.find_model`].
    """
    return Path(find_model(name)).is_file()


def load_single_file(
    name: str, config: str | Path | None = None, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32, **kwargs
) -> DiffusionPipeline:
    """
    Loads a pipeline from one file. Components that the file is without, in files of FLUX.1 and Stable Diffusion 3 often all but
    the transformer, come from the pipeline that `config` names.

    Args:
        name (`str`):
            The file, or its link on the Hub.
        config (`str` or `Path`, *optional*):
            Folder or Hub id of a pipeline of the same architecture, which gives configuration, tokenizers and scheduler.
            Defaults to the one on the Hub that diffusers takes for this kind of checkpoint.
        dtype (`torch.dtype` or `dict[str, torch.dtype]`, *optional*, defaults to `torch.float32`):
            Precision of all components, or of each by its name, with `"default"` for the others.
        **kwargs:
            Passed to [`~diffusers.loaders.FromSingleFileMixin.from_single_file`], such as a component by its name.

    Returns:
        [`~diffusers.DiffusionPipeline`]

    Raises:
        `ValueError`: If the file holds no model of a supported family, `config` is of another model or cannot be had, or weights
            are missing.
    """
    checkpoint = read_checkpoint(name)
    kind = kind_of(checkpoint, name, FAMILIES)
    pipeline_class, parts = FAMILIES[kind], PREFIXES[FAMILIES[kind]]
    config = find_model(config or DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
    pickles = allowing_pickles({"use_safetensors": kwargs.pop("use_safetensors", None)})
    kwargs |= _checked_config(config, pipeline_class, name, kwargs)
    denoiser = "transformer" if pipeline_class in (StableDiffusion3Pipeline, FluxPipeline) else "unet"
    if Path(config).is_dir():  # of which the components that the file may hold are not read
        index, of_file = read_index(config, {}), (denoiser, *parts)
        check_folder(config, {part: index.get(part) for part in of_file}, kwargs, pickles=True)
        check_folder(config, index, {*kwargs, *of_file}, pickles=not pickles["use_safetensors"])
    _check_guidance(kind, name, config)
    if "v_pred" in checkpoint:
        check_velocity(name, config)
    missing = [
        part
        for part, prefixes in parts.items()
        if part not in kwargs and not any(key.startswith(prefixes) for key in checkpoint)
    ]
    del checkpoint
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    check_components(dtype, read_index(config, kwargs))
    default = dtypes.get("default", torch.float32)
    if isinstance(kwargs.get("vae"), str | Path):
        kwargs["vae"] = load_vae(kwargs["vae"], dtype_of("vae", dtype), config, kwargs | pickles)
    if missing:
        logger.warning(f"{name} is without {', '.join(f'`{part}`' for part in missing)}; taken from {config}.")
        others = {part: None for part in (denoiser, *parts) if part not in missing}
        given = {**kwargs, **others, **pickles}
        donor = load_checked(local_folder(config, given), dtype, given)
        kwargs |= {part: getattr(donor, part) for part in missing}
    try:
        if "vae" not in kwargs and "vae" in dtypes:  # in its own precision, not rounded to the default before
            kwargs["vae"] = AutoencoderKL.from_single_file(name, config=config, subfolder="vae", dtype=dtypes["vae"])
        pipeline = pipeline_class.from_single_file(name, config=config, dtype=default, **kwargs)
    except NotImplementedError as error:  # what got no weight has no data that could be copied
        raise _is_without(name, pipeline_class, config) from error
    except Exception as error:  # of diffusers, with advice that does not help here
        raise ValueError(
            f"{name} does not fit {config}, which gives its configuration: {reason_of(error)}. Pass a `config` of the same architecture."
        ) from error
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    if any(parameter.is_meta for module in modules for parameter in module.parameters()):
        raise _is_without(name, pipeline_class, config)
    for part in dtypes.keys() & pipeline.components.keys():
        getattr(pipeline, part).to(dtypes[part])
    pipeline.register_to_config(_name_or_path=str(name))
    return pipeline


def family_of_file(name: str) -> type[DiffusionPipeline]:
    """
    The pipeline class of a single file.

    Args:
        name (`str`):
            The file.

    Returns:
        `type`: a subclass of [`~diffusers.DiffusionPipeline`].

    Raises:
        `ValueError`: If the file holds no model of a supported family.
    """
    return FAMILIES[kind_of(read_checkpoint(name), name, FAMILIES)]


def _is_without(name: str, pipeline_class: type[DiffusionPipeline], config: str) -> ValueError:
    return ValueError(
        f"{name} is without some of the weights of a `{pipeline_class.__name__}` as {config} describes it. Pass a `config` of the "
        "same architecture, or a complete file."
    )


def _checked_config(
    config: str, pipeline_class: type[DiffusionPipeline], name: str, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Components that the pipeline of `config` was saved without. Raises a `ValueError` where it is of another family."""
    try:
        class_name = read_index(config, kwargs)["_class_name"]
    except ValueError as error:
        raise ValueError(
            f"{name} needs the configuration of its pipeline, and {config} cannot be had: {error} Pass the "
            "folder or the Hub id of a pipeline of the same architecture as `config` in `model_init_kwargs`."
        ) from error
    if class_name != pipeline_class.__name__:
        raise ValueError(
            f"`config` is {config}, a `{class_name}`, and {name} holds a `{pipeline_class.__name__}`. Pass a pipeline of the same "
            "architecture."
        )
    return components_left_out(config, kwargs)


def _check_guidance(kind: str, name: str, config: str) -> None:
    if not kind.startswith("flux"):
        return
    has_guidance = FluxTransformer2DModel.load_config(config, subfolder="transformer").get("guidance_embeds")
    if has_guidance != (kind == "flux-dev"):
        raise ValueError(
            f"{name} holds a transformer of the kind {kind!r}, and `config` is {config}, whose transformer takes "
            f"{'a' if has_guidance else 'no'} guidance scale. Pass a pipeline of the same kind."
        )
