# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The policy: a denoiser of diffusers, made trainable by the Trainer of transformers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import set_seed
from trl.trainer.utils import disable_dropout_in_model

from ..backbones import Backbone, load_backbone
from ..backbones.quantization import compute_as_autocast, quantized_layers
from .diffusion_config import DiffusionConfig, configure_backbone
from .lora import (
    base_checksums,
    check_adapters_off,
    check_lora_config,
    check_lora_on_quantized,
    check_trainable,
    load_lora_into,
    with_target_modules,
)


logger = get_logger(__name__)


def make_policy(
    denoiser: torch.nn.Module,
    peft_config: LoraConfig | None,
    default_target_modules: tuple[str, ...],
    half_dtype: torch.dtype | None,
    seed: int,
    initial_weights: dict[str, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """
    Makes a denoiser trainable: all its weights in float32, or a LoRA in float32 on a frozen base.

    Args:
        denoiser (`torch.nn.Module`):
            The denoiser, changed in place.
        peft_config ([`~peft.LoraConfig`] or `None`):
            The LoRA; `None` trains all weights.
        default_target_modules (`tuple[str, ...]`):
            The modules that the LoRA adapts if its configuration names none.
        half_dtype (`torch.dtype` or `None`):
            The type of mixed precision, if any, which a frozen base is stored in.
        seed (`int`):
            Seed of the LoRA's first weights.
        initial_weights (`dict[str, torch.Tensor]`, *optional*):
            The LoRA's first weights, see [`trainer.initial_lora.read_initial_lora`].

    Returns:
        `torch.nn.Module`: the denoiser, or a [`~peft.PeftModel`] around it.

    Raises:
        `ValueError`: If the LoRA cannot be trained rightly, see [`trainer.lora.check_lora_config`].
    """
    # Trackers ask models for a transformers config, and the Trainer for activation checkpointing.
    denoiser._internal_dict = _TrackableConfig(denoiser.config)
    denoiser.activation_checkpointing_enable = partial(_enable_gradient_checkpointing, denoiser)
    disable_dropout_in_model(denoiser)
    if peft_config is None:
        denoiser.requires_grad_(True)
        _cast(denoiser, torch.float32)  # the optimizer's steps are smaller than what half precision resolves
        return denoiser
    peft_config = with_target_modules(peft_config, default_target_modules)
    set_seed(seed)
    denoiser.requires_grad_(False)
    _cast(denoiser, half_dtype or torch.float32)
    compute_as_autocast(denoiser)
    if initial_weights is None:
        peft_config = check_lora_config(peft_config, denoiser)
    base = base_checksums(denoiser)
    model = get_peft_model(denoiser, peft_config)
    check_adapters_off(model, base)
    check_trainable(model)
    if initial_weights is not None:
        load_lora_into(model, initial_weights, "`initial_lora`")
    return model


def make_backbone(model: str | DiffusionPipeline, args: DiffusionConfig, peft_config: LoraConfig | None) -> Backbone:
    """
    Loads the model of a training, and checks all that is known before its denoiser has weights, so that a mistake is told before
    hours of precomputing.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The model, see [`backbones.load_backbone`]. With `args.precompute`, the denoiser of one that is given by its name
            awaits its weights.
        args ([`DiffusionConfig`]):
            The configuration.
        peft_config ([`~peft.LoraConfig`] or `None`):
            The LoRA, if one is trained.

    Returns:
        [`backbones.base.Backbone`]: with encoders that the run can use, see [`backbones.base.Backbone.cast_encoders`].

    Raises:
        `ValueError`: If the model cannot be trained, the configuration does not suit it, or the LoRA cannot be trained rightly,
            see [`trainer.lora.check_lora_config`].
    """
    is_lora = peft_config is not None or args.initial_lora is not None
    backbone = load_backbone(model, without_denoiser=args.precompute, **loading_settings(args, is_lora))
    check_quantized(backbone, args, is_lora)
    configure_backbone(backbone, args)
    if cast := backbone.cast_encoders(args.half_dtype):
        computed = str(args.half_dtype or torch.float32).removeprefix("torch.")
        way_out = (
            "" if args.half_dtype else " Set `bf16=True` or `fp16=True` to keep what is frozen in half precision."
        )
        names = ", ".join(f"`{name}`" for name in cast)
        logger.warning(f"This run computes in {computed}. Cast to it from another precision: {names}.{way_out}")
    if peft_config is not None:
        _cast(backbone.denoiser, args.half_dtype or torch.float32)
        check_lora_config(with_target_modules(peft_config, backbone.lora_target_modules), backbone.denoiser)
        check_lora_on_quantized(peft_config, backbone)
    return backbone


def check_quantized(backbone: Backbone, args: DiffusionConfig, is_lora: bool) -> None:
    """
    Checks that a model with quantised components can be trained as it is asked.

    Args:
        backbone ([`backbones.base.Backbone`]):
            The backbone. Its denoiser may still have no weights.
        args ([`DiffusionConfig`]):
            The configuration.
        is_lora (`bool`):
            Whether a LoRA is trained.

    Raises:
        `ValueError`: If quantised weights would be trained or saved, or an encoder cannot be offloaded.
    """
    quantized, denoiser = backbone.quantization, backbone.denoiser_name
    encoders = [name for name in quantized if name != denoiser]
    if not is_lora:
        if denoiser in quantized:
            raise ValueError(
                f"`{denoiser}` is held in {quantized[denoiser]}, and quantised weights cannot be trained: they stay frozen under a "
                "LoRA. Pass `peft_config` (`--use_peft`), or load the model without `quantization_config`."
            )
        if encoders and backbone.source is None:
            raise ValueError(
                f"`{encoders[0]}` is held in {quantized[encoders[0]]}, and would be saved so with all weights of the model. Pass "
                "`peft_config`, or give the model by its name: what is saved is then loaded in full."
            )
    if encoders and args.offload_encoders:
        raise ValueError(
            f"`offload_encoders=True` cannot move what bitsandbytes keeps beside quantised weights, and `{encoders[0]}` is held in "
            f"{quantized[encoders[0]]}. Leave one of the two out."
        )


def loading_settings(args: DiffusionConfig, is_lora: bool) -> dict[str, Any]:
    """
    How [`backbones.load_backbone`] loads a model that is given by its name: what stays frozen in the type of mixed precision.

    Args:
        args ([`DiffusionConfig`]):
            The configuration.
        is_lora (`bool`):
            Whether a LoRA is trained.

    Returns:
        `dict[str, Any]`
    """
    frozen_dtype = args.half_dtype or torch.float32
    dtypes = {"encoder_dtype": frozen_dtype, "denoiser_dtype": frozen_dtype if is_lora else torch.float32}
    return dtypes | (args.model_init_kwargs or {})


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and back into the mode that it was in, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def training_mode(policy: torch.nn.Module, mode_afterwards: bool) -> Iterator[None]:
    """
    While the context lasts, nothing goes through all modules of a policy, of which SDXL with a LoRA has thousands: to put it into the
    mode that it is in does nothing, as the Trainer does in every micro-batch, and its parameters are found once, which the Trainer
    asks for twice in every optimizer step.

    Args:
        policy (`torch.nn.Module`):
            The policy, not wrapped.
        mode_afterwards (`bool`):
            Whether it is in training mode afterwards, also after an error.
    """
    policy.train = partial(_train_if_needed, policy)
    policy.parameters = partial(_parameters, policy, list(policy.parameters()))
    try:
        yield
    finally:
        del policy.train, policy.parameters
        policy.train(mode_afterwards)


def _train_if_needed(policy: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    denoiser = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    if not policy.training == denoiser.training == mode:
        type(policy).train(policy, mode)
    return policy


def _parameters(
    policy: torch.nn.Module, known: list[torch.nn.Parameter], recurse: bool = True
) -> Iterator[torch.nn.Parameter]:
    return iter(known) if recurse else type(policy).parameters(policy, recurse=False)


class _TrackableConfig(FrozenDict):
    """A diffusers model's configuration with the two methods that trackers call on one of transformers."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.items() if name != "_name_or_path"}  # of this machine

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def _enable_gradient_checkpointing(denoiser, activation_checkpointing_kwargs=None, every_n_layers=1, offload=False):
    if every_n_layers != 1 or offload:
        raise ValueError(
            "`activation_checkpointing_kwargs` may not hold `every_n_layers` or `offload`: the models of diffusers support "
            "neither."
        )
    kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    denoiser.enable_gradient_checkpointing(partial(checkpoint, **kwargs))


def _cast(denoiser: torch.nn.Module, dtype: torch.dtype) -> None:
    if denoiser.dtype != dtype:  # diffusers warns of any cast, also of one that changes nothing
        if quantized_layers(denoiser):  # which diffusers refuses to cast; whole numbers stay what they are
            torch.nn.Module.to(denoiser, dtype)
        else:
            denoiser.to(dtype)
