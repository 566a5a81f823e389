# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images of several models side by side."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from ..sampling import sample_images
from ..visualization import image_grid
from .picture import SIZE, Picture


@dataclass(frozen=True, repr=False)
class Samples(Picture):
    """
    Images of several models side by side.

    Attributes:
        images (`dict[str, list[PIL.Image.Image]]`):
            The images of each column, in the order of the prompts.
    """

    images: dict[str, list[PIL.Image.Image]]


def show_samples(
    models: DiffusionPipeline | Mapping[str, DiffusionPipeline | list[PIL.Image.Image]],
    prompts: list[str],
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
) -> Samples:
    """
    Shows images of several models side by side: a row for each prompt, whose images all start from the same noise.

    Args:
        models (`dict[str, DiffusionPipeline or list[PIL.Image.Image]]`, or [`~diffusers.DiffusionPipeline`]):
            The models by the labels of their columns. Instead of a pipeline, images that it drew for the prompts. A pipeline alone
            is shown without its LoRAs (`"base"`) and with each of them; afterwards those are active that were.
        prompts (`list[str]`):
            The prompts.
        seed (`int`, *optional*, defaults to `0`), num_inference_steps (`int`, *optional*, defaults to `25`), guidance_scale (`float`, *optional*):
            See [`sample_images`]. If you need other settings of a pipeline, call that and pass the images.

    Returns:
        [`notebook.Samples`]

    Raises:
        `ValueError`: If there is no model or no prompt, the images of a model are not one for each prompt, or a LoRA is called `"base"`.
    """
    if not prompts:
        raise ValueError("`prompts` is empty. Pass at least one.")

    def draw(pipeline: DiffusionPipeline) -> list[PIL.Image.Image]:
        return sample_images(
            *(pipeline, prompts, seed),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            disable_tqdm=True,
        )

    images = {}
    if isinstance(models, DiffusionPipeline):
        adapters = adapters_of(models)
        if "base" in adapters:
            raise ValueError(
                "A LoRA is called 'base', like the column without one. Load it by another `adapter_name`."
            )
        for adapter in (None, *adapters):
            with using_adapter(models, adapter):
                images["base" if adapter is None else adapter] = draw(models)
    else:
        for label, model in models.items():
            images[label] = draw(model) if isinstance(model, DiffusionPipeline) else list(model)
    if not images:
        raise ValueError("`models` is empty. Pass at least one pipeline.")
    for label, of_model in images.items():
        if len(of_model) != len(prompts):
            raise ValueError(f"{label!r} has {len(of_model)} images for {len(prompts)} prompts. Pass one for each.")
    rows = [list(row) for row in zip(*images.values(), strict=True)]
    return Samples(image_grid(rows, list(images), prompts, SIZE), images)


def adapters_of(pipeline: DiffusionPipeline) -> list[str]:
    """The names of the adapters in a pipeline, in the order in which they were loaded."""
    return list(dict.fromkeys(name for names in pipeline.get_list_adapters().values() for name in names))


def adapter_layers(pipeline: DiffusionPipeline) -> list[BaseTunerLayer]:
    """The layers of all models of a pipeline that hold adapters."""
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    return [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def using_adapter(pipeline: DiffusionPipeline, adapter: str | None) -> Iterator[None]:
    """Draws with one adapter of a pipeline, or without any, while the context lasts. Its weight stays what it is."""
    layers = adapter_layers(pipeline)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = adapter
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
