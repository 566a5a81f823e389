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
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)

from .source import components_left_out, read_index


logger = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".ckpt")
LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX = "model_index.json"
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
        `ValueError`: If there is no such file, or for a folder with such files and no pipeline.
    """
    path = Path(name)
    if path.is_dir() and not (path / INDEX).exists():
        files = sorted(file.name for file in path.iterdir() if file.name.endswith(ENDINGS))
        if LORA_FILE in files:
            raise ValueError(
                f"{name} holds a LoRA ({LORA_FILE}) and no pipeline: pass the model that it was trained on."
            )
        if files:
            raise ValueError(
                f"{name} holds no pipeline ({INDEX}), but the file {files[0]}: pass {path / files[0]} itself."
            )
    if not name.endswith(ENDINGS) or path.is_dir():
        return False
    if not path.is_file() and not name.startswith(("https://huggingface.co/", "https://hf.co/")):
        raise ValueError(f"There is no file {name}.")
    return True


def load_single_file(
    name: str, config: str | None = None, dtype: torch.dtype | dict[str, torch.dtype] = torch.float32, **kwargs
) -> DiffusionPipeline:
    """
    Loads a pipeline from one file. Components that the file is without, in files of FLUX.1 and Stable Diffusion 3 often all but
    the transformer, come from the pipeline that `config` names.

    Args:
        name (`str`):
            The file, or its link on the Hub.
        config (`str`, *optional*):
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
    checkpoint = load_single_file_checkpoint(name)
    kind = _kind(checkpoint, name)
    pipeline_class, parts = FAMILIES[kind], PREFIXES[FAMILIES[kind]]
    config = config or DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    kwargs |= _checked_config(config, pipeline_class, name, kwargs)
    _check_guidance(kind, name, config)
    missing = [
        part
        for part, prefixes in parts.items()
        if part not in kwargs and not any(key.startswith(prefixes) for key in checkpoint)
    ]
    del checkpoint
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    default = dtypes.get("default", torch.float32)
    if missing:
        logger.warning(f"{name} is without {', '.join(f'`{part}`' for part in missing)}; taken from {config}.")
        denoiser = "transformer" if pipeline_class in (StableDiffusion3Pipeline, FluxPipeline) else "unet"
        others = {part: None for part in (denoiser, *parts) if part not in missing}
        donor = DiffusionPipeline.from_pretrained(config, dtype=dtype, **{**kwargs, **others})
        kwargs |= {part: getattr(donor, part) for part in missing}
    if "vae" not in kwargs and "vae" in dtypes:  # in its own precision, not rounded to the default before
        kwargs["vae"] = AutoencoderKL.from_single_file(name, config=config, subfolder="vae", dtype=dtypes["vae"])
    try:
        pipeline = pipeline_class.from_single_file(name, config=config, dtype=default, **kwargs)
    except NotImplementedError as error:  # what got no weight has no data that could be copied
        raise ValueError(
            f"{name} is without some of the weights of a `{pipeline_class.__name__}` as {config} describes it. Pass a `config` of the "
            "same architecture, or a complete file."
        ) from error
    for part in dtypes.keys() & pipeline.components.keys():
        getattr(pipeline, part).to(dtypes[part])
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
    return FAMILIES[_kind(load_single_file_checkpoint(name), name)]


def _kind(checkpoint: dict[str, torch.Tensor], name: str) -> str:
    kind = infer_diffusers_model_type(checkpoint)
    # diffusers takes whatever it does not know for Stable Diffusion 1
    is_unknown = kind == "v1" and "model.diffusion_model.input_blocks.0.0.weight" not in checkpoint
    if is_unknown or kind not in FAMILIES:
        supported = ", ".join(f"`{family.__name__}`" for family in PREFIXES)
        raise ValueError(
            f"{name} holds {'no model that is known' if is_unknown else f'a model of the kind {kind!r}'}. A single file must hold a "
            f"text-to-image model of one of {supported}, with weights named as in the original code; a LoRA, or a file out of a "
            f"pipeline's folder, is none: pass the folder with {INDEX}."
        )
    return kind


def _checked_config(
    config: str, pipeline_class: type[DiffusionPipeline], name: str, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Components that the pipeline of `config` was saved without. Raises a `ValueError` where it is of another family."""
    try:
        class_name = read_index(config, kwargs)["_class_name"]
    except OSError as error:
        raise ValueError(
            f"{name} needs the configuration of its pipeline, and {config} cannot be had: {str(error).splitlines()[0]} Pass the "
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
