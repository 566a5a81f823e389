# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Sampling images from fixed noise, so that models are compared on the same terms."""

from collections.abc import Iterable

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from .randomness import keyed_generator


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
            Guidance. Defaults to the pipeline's.
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
            `true_cfg_scale=2.0, negative_prompt=""`.

    Returns:
        `list[PIL.Image.Image]`: the images, in the order of the prompts.

    Raises:
        [`NotFiniteError`]: If pixels are not finite, which would be black.
    """
    if keys is None:
        keys = list(range(len(prompts)))
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    images, further = [], kwargs
    bar = getattr(pipeline, "_progress_bar_config", {})
    try:
        for start in _progress(pipeline, range(0, len(prompts), batch_size), disable_tqdm):
            batch = slice(start, start + batch_size)
            if isinstance(kwargs.get("negative_prompt"), str):  # one for each prompt, which FLUX.1 needs
                further = kwargs | {"negative_prompt": [kwargs["negative_prompt"]] * len(prompts[batch])}
            pixels = pipeline(
                prompt=prompts[batch],  # the first argument of some pipelines is an image
                generator=[keyed_generator(seed, key, "sample") for key in keys[batch]],
                num_inference_steps=num_inference_steps,
                height=height,
                width=width,
                output_type="np",
                **guidance,
                **further,
            ).images
            _check_finite(pixels, prompts[batch])
            images += pipeline.numpy_to_pil(pixels)
    finally:
        pipeline.set_progress_bar_config(**bar)
    return images


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
