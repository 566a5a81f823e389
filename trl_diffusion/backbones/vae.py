# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a VAE encodes images to, and loading one by its name in place of the one that a pipeline was saved with."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import pixel_unshuffle

from .folder_checks import check_component, pipeline_class, read_index
from .names import INDEX, find_model
from .weights import check_loading_info


HUB_ARGUMENTS = ("cache_dir", "token", "local_files_only")


def posterior_moments(vae: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Encodes images.

    Args:
        vae (`torch.nn.Module`):
            The VAE.
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            Images in [-1, 1], in the VAE's precision.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, each of shape `(B, C, h, w)`: mean and standard deviation in the VAE's own scale, float32.
        The deviation is 0 where the VAE has no posterior.
    """
    encoded = vae.encode(images)
    if "latent_dist" in encoded:
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    return encoded.latent.float(), torch.zeros_like(encoded.latent, dtype=torch.float32)


def patchified_moments(vae: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[`backbones.vae.posterior_moments`] with 2x2 positions in the channels, as FLUX.2 has them: `(B, 4 C, h / 2, w / 2)`."""
    mean, std = posterior_moments(vae, images)
    return pixel_unshuffle(mean, 2), pixel_unshuffle(std, 2)


def batch_norm_statistics(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What is subtracted from patchified latents of an [`~diffusers.AutoencoderKLFlux2`], and what they are multiplied by."""
    variance = vae.bn.running_var.float() + vae.config.batch_norm_eps
    return vae.bn.running_mean.float().view(1, -1, 1, 1), variance.rsqrt().view(1, -1, 1, 1)


def load_vae(name: str | Path, dtype: torch.dtype, config: str, kwargs: dict[str, Any]) -> torch.nn.Module:
    """
    Loads a VAE of the class that a pipeline has.

    Args:
        name (`str` or `Path`):
            A Hub id or a folder of a VAE, such as `"madebyollin/sdxl-vae-fp16-fix"`, or of a pipeline, whose VAE is taken, or a
            single file.
        dtype (`torch.dtype`):
            Precision of its weights.
        config (`str`):
            Folder or Hub id of the pipeline, which also gives a single file its configuration.
        kwargs (`dict`):
            What is passed to `from_pretrained`, of which the arguments for the Hub are used.

    Returns:
        `torch.nn.Module`: such as an [`~diffusers.AutoencoderKL`].

    Raises:
        `ValueError`: If there is no such VAE, or it is of another class, or its weights do not fit.
    """
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    how = {"use_safetensors": kwargs.get("use_safetensors", True)}
    vae_class = _vae_class(config, hub)
    path = Path(name).expanduser()
    where = str(path) if path.is_dir() else find_model(name)
    try:
        if Path(where).is_file():
            if vae_class is not AutoencoderKL:
                raise ValueError(
                    f"`vae` is {name}, a file, and diffusers reads no `{vae_class.__name__}` out of one. Pass its folder or Hub id."
                )
            vae = AutoencoderKL.from_single_file(where, config=config, subfolder="vae", dtype=dtype)
            info = {"missing_keys": [key for key, weight in vae.named_parameters() if weight.is_meta]}
        else:
            folder = {"subfolder": "vae"} if _is_pipeline(where, hub) else {}
            check_component(Path(where, *folder.values()), pickles=not how["use_safetensors"])
            kind = AutoencoderKL.load_config(where, **folder, **hub).get("_class_name")
            if kind != vae_class.__name__:
                raise ValueError(
                    f"`vae` is {name}, a `{kind}`. Pass an `{vae_class.__name__}`, as the pipeline has it."
                )
            vae, info = vae_class.from_pretrained(where, dtype=dtype, output_loading_info=True, **folder, **how, **hub)
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise ValueError(
            f"`vae` is {name}, which cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0][:500]}"
        ) from error
    check_loading_info(info, f"The VAE {name}")
    return vae


def _vae_class(pipeline: str, hub: dict[str, Any]) -> type[torch.nn.Module]:
    """The class of VAE that a pipeline of this class has."""
    index = read_index(pipeline, hub)
    if (family := pipeline_class(index)) is None:
        return AutoencoderKL
    parameters = inspect.signature(family).parameters
    if "vae" not in parameters:
        raise ValueError(f"{pipeline} is a `{index['_class_name']}`, which has no VAE. Leave `vae` out.")
    return parameters["vae"].annotation


def _is_pipeline(where: str, hub: dict[str, Any]) -> bool:
    if Path(where).is_dir():
        return (Path(where) / INDEX).is_file()
    try:
        AutoencoderKL.load_config(where, **hub)
    except OSError:
        return True
    return False
