# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Drawing pictures from fixed noise, so that models are compared on the same terms."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer

from .noising import keyed_generator


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int = 0,
    batch_size: int = 8,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    keys: list[int | str] | None = None,
    disable_tqdm: bool = False,
) -> list[PIL.Image.Image]:
    """
    Draws one image a prompt. The noise of an image depends on the seed and its key only: every model that is given the same
    prompts and seed starts from the same noise, whatever the batch size.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        prompts (`list[str]`):
            The prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.
        batch_size (`int`, *optional*, defaults to `8`):
            Images drawn at a time.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Sampling steps.
        guidance_scale (`float`, *optional*, defaults to `7.5`):
            Classifier-free guidance.
        height (`int`, *optional*):
            Height in pixels. Defaults to the pipeline's.
        width (`int`, *optional*):
            Width in pixels. Defaults to the pipeline's.
        keys (`list[int | str]`, *optional*):
            What each image's noise depends on beside the seed, such as the prompt's id. Defaults to the position.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress.

    Returns:
        `list[PIL.Image.Image]`: the images, in the order of the prompts.
    """
    if keys is None:
        keys = list(range(len(prompts)))
    images = []
    bar = getattr(pipeline, "_progress_bar_config", {})
    try:
        for start in _progress(pipeline, range(0, len(prompts), batch_size), disable_tqdm):
            batch = slice(start, start + batch_size)
            images += pipeline(
                prompts[batch],
                generator=[keyed_generator(seed, key, "sample") for key in keys[batch]],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
            ).images
    finally:
        pipeline.set_progress_bar_config(**bar)
    return images


@contextmanager
def negative_preference_guidance(
    pipeline: DiffusionPipeline, positive: str | dict[str, float] | None, negative: str | dict[str, float]
) -> Iterator[None]:
    """
    Lets a pipeline draw with another model in the unconditional branch of classifier-free guidance than in the conditional
    one (Diffusion-NPO, arXiv:2505.11245): guidance then leads away from what a model with the reversed preference draws.

    Within the context, calls of the pipeline that use guidance run their denoiser once for each branch, each with its own
    adapters. Afterwards the pipeline is as it was.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline with a `unet`, such as Stable Diffusion or SDXL, with the adapters loaded by `load_lora_weights`.
        positive (`str`, `dict[str, float]` or `None`):
            The adapter of the conditional branch, or several with their weights, or `None` for the denoiser's own
            weights.
        negative (`str` or `dict[str, float]`):
            The adapter of the unconditional branch, trained with `reverse_preference=True`, or several with their weights,
            such as `{"aligned": 0.5, "reversed": 1.0}`.

    Raises:
        `ValueError`: If the pipeline has no such adapter; names those that it has. If adapters are fused into its weights,
            or if it has no `unet`.

    Example:

    ```python
    pipeline.load_lora_weights("user/sdxl-cpo", adapter_name="aligned")
    pipeline.load_lora_weights("user/sdxl-cpo-reversed", adapter_name="reversed")
    with negative_preference_guidance(pipeline, positive="aligned", negative="reversed"):
        image = pipeline("a harbor at dusk").images[0]
    ```
    """
    if getattr(pipeline, "unet", None) is None:
        raise ValueError(
            f"A `{type(pipeline).__name__}` has no `unet`: this is for pipelines that call one for both branches."
        )
    denoiser = pipeline.unet
    layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
    known = sorted({name for layer in layers for name in layer.lora_A})
    branches = [_adapter_weights(adapters, known) for adapters in (negative, positive)]
    if any(layer.merged_adapters for layer in layers):
        raise ValueError(
            "The pipeline has adapters that are fused into its weights, where they cannot be switched. Call "
            "`pipeline.unfuse_lora()` before."
        )
    before = [(layer, layer.active_adapters, layer.disable_adapters, dict(layer.scaling)) for layer in layers]
    trainable = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
    replaced = vars(denoiser).get("forward")  # a hook of accelerate's, or a context around this one
    forward = getattr(replaced, "unguided", denoiser.forward)

    def switch(weights: dict[str, float]) -> None:
        if weights:
            denoiser.enable_lora()
            denoiser.set_adapters(list(weights), list(weights.values()))
        else:
            denoiser.disable_lora()

    def guided(sample: torch.Tensor, *args, **kwargs):
        if not pipeline.do_classifier_free_guidance:
            switch(branches[1])
            return forward(sample, *args, **kwargs)
        predictions = []
        for branch, weights in enumerate(branches):  # diffusers puts the unconditional rows first
            switch(weights)
            inputs = _branch((sample, args, kwargs), branch, len(sample))
            predictions.append(forward(inputs[0], *inputs[1], **inputs[2]))
        if isinstance(predictions[0], tuple):
            return tuple(map(torch.cat, zip(*predictions, strict=True)))
        return type(predictions[0])(torch.cat([prediction.sample for prediction in predictions]))

    guided.unguided = forward
    denoiser.forward = guided
    try:
        yield
    finally:
        del denoiser.forward
        if replaced is not None:
            denoiser.forward = replaced
        for layer, active, disabled, scaling in before:
            layer.enable_adapters(not disabled)
            layer.set_adapter(active)
            layer.scaling.update(scaling)
        for weight, requires_grad in trainable:
            weight.requires_grad_(requires_grad)


def _adapter_weights(adapters: str | dict[str, float] | None, known: list[str]) -> dict[str, float]:
    weights = {} if adapters is None else {adapters: 1.0} if isinstance(adapters, str) else adapters
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(
            f"The pipeline has no adapter {unknown[0]!r}; it has {', '.join(map(repr, known)) or 'none'}. Load it with "
            f"`pipeline.load_lora_weights(..., adapter_name={unknown[0]!r})`."
        )
    return weights


def _branch(value, branch: int, rows: int):
    """One half of whatever has a row for each row of the doubled batch."""
    if isinstance(value, torch.Tensor):
        return value.chunk(2)[branch] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _branch(item, branch, rows) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_branch(item, branch, rows) for item in value)
    return value


def _progress(pipeline: DiffusionPipeline, batches: Iterable[int], disable: bool) -> Iterable[int]:
    # One bar for all batches is enough: the pipeline's own, a new one for each batch, is silenced.
    pipeline.set_progress_bar_config(disable=disable, desc="Sampling", leave=False)
    bar = pipeline.progress_bar(batches)
    pipeline.set_progress_bar_config(disable=True)
    return bar
