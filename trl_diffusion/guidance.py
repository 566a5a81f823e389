# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Diffusion-NPO (arXiv:2505.11245): another model in the unconditional branch of classifier-free guidance."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer

from .backbones import BACKBONES, Backbone, backbone_class_of


@contextmanager
def negative_preference_guidance(
    pipeline: DiffusionPipeline, positive: str | dict[str, float] | None, negative: str | dict[str, float]
) -> Iterator[None]:
    """
    Lets a pipeline use another model in the unconditional branch of classifier-free guidance than in the conditional one
    (Diffusion-NPO, arXiv:2505.11245): guidance then leads away from the samples of a model with the reversed preference.

    Within the context, the denoiser runs once for each branch, with the adapters of this branch. Afterwards the pipeline is as
    it was.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline of a supported family, with the adapters loaded by `load_lora_weights`.
        positive (`str`, `dict[str, float]` or `None`):
            The adapter of the conditional branch, or several with their weights, or `None` for the denoiser's own
            weights.
        negative (`str` or `dict[str, float]`):
            The adapter of the unconditional branch, trained with `reverse_preference=True`, or several with their weights. In
            the authors' code it comes on top of the positive one: `{"aligned": 1.0, "reversed": 1.0}`.

    Raises:
        `ValueError`: If the pipeline has no such adapter (the message names those that it has), if adapters are fused into its
            weights, if its family is not supported, or if a pipeline that calls its denoiser once for each branch samples without
            an unconditional one, as FLUX.1 does without `true_cfg_scale`. (Those that call it for both at once have none at a
            `guidance_scale` of 1, or of 0 where the family counts from there; the positive model then samples alone.)

    Example:

    ```python
    pipeline.load_lora_weights("user/sdxl-cpo", adapter_name="aligned")
    pipeline.load_lora_weights("user/sdxl-cpo-reversed", adapter_name="reversed")
    both = {"aligned": 1.0, "reversed": 1.0}
    with negative_preference_guidance(pipeline, positive="aligned", negative=both):
        image = pipeline("a harbor at dusk").images[0]
    ```
    """
    backbone_class = _backbone_class_of(pipeline)
    hint = backbone_class.guidance_hint
    if hint and not isinstance(pipeline, backbone_class.pipeline_class):
        raise ValueError(
            f"A `{type(pipeline).__name__}` does not tell which branch of guidance its transformer is called for. Use a "
            f"`{backbone_class.pipeline_class.__name__}`."
        )
    denoiser = getattr(pipeline, backbone_class.denoiser_name)
    layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
    known = sorted({name for layer in layers for name in layer.lora_A})
    adapters = {
        "conditional": _adapter_weights(positive, known),
        "unconditional": _adapter_weights(negative, known),
    }
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

    signature = inspect.signature(type(_unwrapped(denoiser)).forward)
    context = None  # of the call, as the pipeline names it
    last_timestep = None
    is_alone = False  # whether the last call was one of the conditional branch, where each branch has a call
    no_branch = ValueError(
        f"The pipeline samples without an unconditional branch, so `negative` would have no effect: {hint}."
    )
    replaced_context = vars(denoiser).get("cache_context")
    own_context = getattr(denoiser, "cache_context", None)

    @contextmanager
    def cache_context(name: str, **kwargs):
        nonlocal context
        context = name
        try:
            with own_context(name, **kwargs):
                yield
        finally:
            context = None

    def guided(*args, **kwargs):
        nonlocal is_alone, last_timestep
        arguments = signature.bind(denoiser, *args, **kwargs).arguments
        timestep = arguments.get("timestep")
        is_again = context is None and isinstance(timestep, torch.Tensor) and timestep is last_timestep
        last_timestep = timestep
        branches = backbone_class.guidance_branches(pipeline, "again" if is_again else context, arguments)
        if hint:
            if is_alone and branches == ("conditional",):
                raise no_branch
            is_alone = branches == ("conditional",)
        if len(branches) == 1:
            switch(adapters[branches[0]])
            return forward(*args, **kwargs)
        rows = next(x for x in arguments.values() if isinstance(x, list) or (torch.is_tensor(x) and x.ndim))
        predictions = []
        for index, branch in enumerate(branches):
            switch(adapters[branch])
            part = index * len(rows) // len(branches), (index + 1) * len(rows) // len(branches)
            args_rows, kwargs_rows = _rows_of_branch((args, kwargs), slice(*part), len(rows), isinstance(rows, list))
            predictions.append(forward(*args_rows, **kwargs_rows))
        if isinstance(predictions[0], tuple):
            return tuple(map(_joined, zip(*predictions, strict=True)))
        return type(predictions[0])(_joined([prediction.sample for prediction in predictions]))

    guided.unguided = forward
    denoiser.forward = guided
    if own_context is not None:
        denoiser.cache_context = cache_context
    try:
        yield
        if is_alone:  # in the last of its calls
            raise no_branch
    finally:
        del denoiser.forward
        vars(denoiser).pop("cache_context", None)
        if replaced_context is not None:
            denoiser.cache_context = replaced_context
        if replaced is not None:
            denoiser.forward = replaced
        for layer, active, disabled, scaling in before:
            layer.enable_adapters(not disabled)
            layer.set_adapter(active)
            layer.scaling.update(scaling)
        for weight, requires_grad in trainable:
            weight.requires_grad_(requires_grad)


def _backbone_class_of(pipeline: DiffusionPipeline) -> type[Backbone]:
    # A pipeline of another task, such as image to image, has the denoiser and all components of the family's text-to-image pipeline
    components = set(inspect.signature(type(pipeline).__init__).parameters)
    for backbone_class in BACKBONES:
        wanted = inspect.signature(backbone_class.pipeline_class.__init__).parameters
        denoiser = getattr(pipeline, backbone_class.denoiser_name, None)
        if wanted.keys() <= components and isinstance(
            _unwrapped(denoiser), wanted[backbone_class.denoiser_name].annotation
        ):
            return backbone_class
    return backbone_class_of(pipeline)


def _unwrapped(denoiser: torch.nn.Module | None) -> torch.nn.Module | None:
    """What `torch.compile` wrapped, or the module itself."""
    return getattr(denoiser, "_orig_mod", denoiser)


def _adapter_weights(adapters: str | dict[str, float] | None, known: list[str]) -> dict[str, float]:
    weights = {} if adapters is None else {adapters: 1.0} if isinstance(adapters, str) else adapters
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(
            f"The pipeline has no adapter {unknown[0]!r}; it has {', '.join(map(repr, known)) or 'none'}. Load it with "
            f"`pipeline.load_lora_weights(..., adapter_name={unknown[0]!r})`."
        )
    return weights


def _rows_of_branch(value, part: slice, num_rows: int, in_lists: bool):
    """The part of one branch of whatever has a row for each of the `num_rows` of the batch; `in_lists` are ragged ones, a tensor each."""
    if isinstance(value, torch.Tensor):
        return value[part] if value.ndim and len(value) == num_rows else value
    if isinstance(value, list) and in_lists and len(value) == num_rows:
        return value[part]
    if isinstance(value, dict):
        return {key: _rows_of_branch(item, part, num_rows, in_lists) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_rows_of_branch(item, part, num_rows, in_lists) for item in value)
    return value


def _joined(parts: Sequence[torch.Tensor | list[torch.Tensor]]) -> torch.Tensor | list[torch.Tensor]:
    """The rows of all branches, one after the other: of tensors, or of lists with a tensor for each row."""
    if isinstance(parts[0], list):
        return [row for part in parts for row in part]
    return torch.cat(list(parts))
