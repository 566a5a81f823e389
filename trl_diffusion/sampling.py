# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Sampling images from fixed noise, so that models are compared on the same terms."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from .backbones import BACKBONES, Backbone
from .randomness import keyed_generator


# Arguments of a pipeline's call with one text for each prompt
TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


class NotFiniteError(ValueError):
    """Says that a pipeline drew something that is no image."""


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int = 0,
    batch_size: int = 8,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    keys: list[int | str] | None = None,
    disable_tqdm: bool = False,
    **kwargs,
) -> list[PIL.Image.Image]:
    """
    Samples one image for each prompt. The noise of an image depends on the seed and its key only: every model that is given
    the same prompts and seed starts from the same noise, whatever the batch size.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        prompts (`list[str]`):
            The prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of images that are sampled at once.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Sampling steps.
        guidance_scale (`float`, *optional*):
            Guidance, as users of the pipeline write it: for Qwen-Image its `true_cfg_scale` with an empty negative prompt, for
            FLUX.1 the scale that the transformer is told. Defaults to the pipeline's, see [`sampling.default_guidance`].
        height (`int`, *optional*):
            Height in pixels. Defaults to the pipeline's.
        width (`int`, *optional*):
            Width in pixels. Defaults to the pipeline's.
        keys (`list[int | str]`, *optional*):
            The key of each image's noise beside the seed, such as the prompt's id. Defaults to the position.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress.
        **kwargs:
            Further arguments of the pipeline's call, such as `max_sequence_length`, or for true guidance of FLUX.1
            `true_cfg_scale=2.0, negative_prompt=""`. A `negative_prompt` is one for all prompts, or a list of one for each.

    Returns:
        `list[PIL.Image.Image]`: the images, in the order of the prompts.

    Raises:
        [`NotFiniteError`]: If pixels are not finite, which would be black.
        `ValueError`: If the pipeline's call does not take an argument, or a list has not one text for each prompt.
    """
    if keys is None:
        keys = list(range(len(prompts)))
    if guidance_scale is None:
        guidance_scale = default_guidance(type(pipeline), pipeline.config)
    guidance = {} if guidance_scale is None else family_of(type(pipeline)).guidance_arguments(guidance_scale)
    sides = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    arguments = guidance | sides | kwargs
    _check_arguments(type(pipeline), arguments, len(prompts))
    images = []
    bar = getattr(pipeline, "_progress_bar_config", {})
    try:
        for start in _progress(pipeline, range(0, len(prompts), batch_size), disable_tqdm):
            batch = slice(start, start + batch_size)
            texts = {  # a list even of equal ones, which FLUX.1 needs
                name: [value] * len(prompts[batch]) if isinstance(value, str) else value[batch]
                for name, value in arguments.items()
                if name in TEXTS and value is not None
            }
            pixels = pipeline(
                prompt=prompts[batch],  # the first argument of some pipelines is an image
                generator=[keyed_generator(seed, key, "sample") for key in keys[batch]],
                num_inference_steps=num_inference_steps,
                output_type="np",
                **arguments | texts,
            ).images
            _check_finite(pixels, prompts[batch])
            images += pipeline.numpy_to_pil(pixels)
    finally:
        pipeline.set_progress_bar_config(**bar)
    return images


def family_of(pipeline_class: type[DiffusionPipeline]) -> type[Backbone]:
    """The backbone of a pipeline class; for one of no family [`backbones.base.Backbone`], with what holds where none says otherwise."""
    return next((family for family in BACKBONES if issubclass(pipeline_class, family.pipeline_class)), Backbone)


def default_guidance(pipeline_class: type[DiffusionPipeline], config: Mapping[str, Any] | None = None) -> float | None:
    """
    The guidance scale that images are sampled with where none is asked for.

    Args:
        pipeline_class (`type`):
            Class of the pipeline.
        config (`Mapping[str, Any]`, *optional*):
            The pipeline's configuration, the content of `model_index.json`, which tells some distilled models.

    Returns:
        `float`: the scale as users of the pipeline write it, or `None` where its call has none.
    """
    family = family_of(pipeline_class)
    defaults = family.sampling_defaults(config or {})
    if "guidance_scale" in defaults:
        return defaults["guidance_scale"]
    return default_argument(pipeline_class, next(iter(family.guidance_arguments(1.0))))


def default_argument(pipeline_class: type[DiffusionPipeline], name: str) -> Any:
    """The default of an argument of a pipeline's call; `None` where it has no such argument."""
    parameter = inspect.signature(pipeline_class.__call__).parameters.get(name)
    return None if parameter is None else parameter.default


def _check_arguments(pipeline_class: type[DiffusionPipeline], arguments: dict[str, Any], num_prompts: int) -> None:
    taken = inspect.signature(pipeline_class.__call__).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    if others := [name for name in arguments if name not in taken and not takes_all]:
        raise ValueError(f"A `{pipeline_class.__name__}` takes no `{others[0]}`. Leave it out.")
    for name in TEXTS:
        value = arguments.get(name)
        if value is not None and not isinstance(value, str) and len(value) != num_prompts:
            raise ValueError(
                f"`{name}` has {len(value)} texts for {num_prompts} prompts. Pass one for each, or one for all of them."
            )


def only_colour(image: PIL.Image.Image) -> tuple[int, int, int] | None:
    """The colour of all pixels of an image, or `None` if they differ."""
    extrema = image.convert("RGB").getextrema()
    return tuple(low for low, _ in extrema) if all(low == high for low, high in extrema) else None


def _check_finite(pixels: np.ndarray, prompts: list[str]) -> None:
    is_finite = np.isfinite(pixels).reshape(len(prompts), -1).all(axis=1)
    if broken := [prompt for prompt, finite in zip(prompts, is_finite, strict=True) if not finite]:
        raise NotFiniteError(
            f"{len(broken)} of {len(prompts)} images have pixels that are not finite, such as the one of {broken[0]!r}: a model "
            "overflowed. Sample in bfloat16 or float32, or use a VAE that was made for half precision, such as "
            "madebyollin/sdxl-vae-fp16-fix for Stable Diffusion XL."
        )


def _progress(pipeline: DiffusionPipeline, batches: Iterable[int], disable: bool) -> Iterable[int]:
    # One bar for all batches is enough: the pipeline's own, a new one for each batch, is silenced.
    pipeline.set_progress_bar_config(disable=disable, desc="Sampling", leave=False)
    bar = pipeline.progress_bar(batches)
    pipeline.set_progress_bar_config(disable=True)
    return bar
