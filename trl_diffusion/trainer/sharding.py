# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
All that is known of weights that are cut over processes: which settings go with it, cutting a model, and reading and writing whole
weights, in which all processes take part. What is DeepSpeed's alone is in [`trainer.zero`], the rest is FSDP2's.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    str_to_bool,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..backbones import Backbone
from . import zero
from .diffusion_config import DiffusionConfig


OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adagrad",
    "rmsprop",
)  # whose states have the shapes of the weights


# ----- what is asked for, and what is refused -----


def asks_for_fsdp(args: DiffusionConfig) -> bool:
    """Whether a run is launched or configured to cut its weights over processes by FSDP."""
    return bool(args.fsdp) or _is_set("ACCELERATE_USE_FSDP")


def check_sharding(args: DiffusionConfig) -> None:
    """
    Checks what is known of sharded training before a model is loaded.

    Args:
        args ([`DiffusionConfig`]):
            The configuration.

    Raises:
        `ValueError`: If a setting does not go with it.
    """
    if args.deepspeed_plugin is not None:
        zero.check_zero(args)
        _check_settings(args, "DeepSpeed")
    if not asks_for_fsdp(args):
        return
    given = args.fsdp_plugin_args or {}
    if args.world_size == 1:
        _refuse_unsharded("in one process")
    if int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))) != 2:
        raise ValueError(
            "FSDP version 1 is not supported. Set `fsdp_version: 2`, as `--accelerate_config fsdp2` does."
        )
    plugin = FullyShardedDataParallelPlugin(**given)
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` would leave the text encoders without weights in all processes but the first. Set it to "
            "`false`."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing` would rename the modules of the denoiser. Leave it out: `activation_checkpointing` of the "
            "trainer does the same."
        )
    if type(plugin.cpu_offload) is not OffloadPolicy:
        raise ValueError("`fsdp_offload_params` does not go with these trainers. Set it to `false`.")
    if not plugin.reshard_after_forward:
        raise ValueError(
            "`fsdp_reshard_after_forward: false` would leave weights whole after they were used. Set it to `true`."
        )
    if plugin.ignored_modules:
        raise ValueError("`fsdp_ignored_modules` would leave weights whose gradient no process shares. Leave it out.")
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise ValueError(
            "`fsdp_auto_wrap_policy: SIZE_BASED_WRAP` does not know the blocks of a denoiser. Use TRANSFORMER_BASED_WRAP."
        )
    _check_settings(args, "FSDP")


def _check_settings(args: DiffusionConfig, kind: str) -> None:
    if args.half_dtype is torch.float16:
        raise ValueError(f"Mixed precision with float16 does not go with {kind} here. Use `bf16=True`.")
    for name in ("torch_compile", "channels_last", "auto_find_batch_size"):
        if getattr(args, name):
            raise ValueError(f"`{name}=True` does not go with {kind} here. Leave one of the two out.")
    if args.optim not in OPTIMIZERS:
        raise ValueError(
            f"`optim` is {args.optim.value!r}, whose state cannot be put together from shards. With {kind} use one of "
            f"{', '.join(OPTIMIZERS)}."
        )


def check_is_sharded(args: DiffusionConfig, accelerator: Accelerator, backbone: Backbone) -> None:
    """
    Checks that a run is sharded as it asks to be, once the accelerator is made.

    Args:
        args ([`DiffusionConfig`]):
            The configuration.
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator.
        backbone ([`backbones.base.Backbone`]):
            The backbone.

    Raises:
        `ValueError`: If it is not, or the model cannot be cut.
    """
    if args.deepspeed_plugin is not None and not is_sharding(accelerator):
        raise ValueError(
            "This run asks for DeepSpeed, and was not launched for it: nothing would be sharded. Launch it with "
            "`--accelerate_config zero2 --num_processes N`, or leave DeepSpeed out."
        )
    if asks_for_fsdp(args) and not is_sharding(accelerator):
        _refuse_unsharded(
            "on the CPU" if accelerator.device.type == "cpu" else f"as {accelerator.distributed_type.value}"
        )
    if is_sharding(accelerator) and accelerator.parallelism_config is not None:
        raise ValueError(
            "`parallelism_config` does not go with sharded training here. Leave it out: all processes share the weights."
        )
    if is_sharding(accelerator) and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("`--dynamo_backend` does not go with sharded training here. Leave one of the two out.")
    how = backbone.quantization.get(backbone.denoiser_name)
    if how and is_sharding(accelerator):
        raise ValueError(
            f"`{backbone.denoiser_name}` is held in {how}, and quantised weights cannot be cut over processes. Load the model without "
            "`quantization_config`, or train on several GPUs with `--accelerate_config multi_gpu`."
        )


def _refuse_unsharded(where: str) -> NoReturn:
    raise ValueError(
        f"This run asks for FSDP, and nothing would be sharded {where}: FSDP needs several processes with a GPU each. Launch it with "
        "`--accelerate_config fsdp2 --num_processes N`, or leave FSDP out."
    )


def _is_set(name: str) -> bool:
    return bool(str_to_bool(os.environ.get(name, "false")))


# ----- cutting a model -----


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether a run cuts the weights of its models over its processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def shard(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """
    Cuts a model over the processes, in place: a frozen one, or the policy before its optimizer is made. DeepSpeed cuts the policy itself
    when the training begins.

    The denoiser is what is cut, not the [`~peft.PeftModel`] around it, so that it may be called with and without. Computation is that of
    an unsharded run: weights are gathered in the precision that they are held in, and autocast computes.

    Args:
        model (`torch.nn.Module`):
            The denoiser, or a [`~peft.PeftModel`] around it, on any device.
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator.

    Returns:
        `torch.nn.Module`: the same model.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return zero.prepare(model, accelerator)
    denoiser, plugin = denoiser_of(model), accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = None
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = blocks(denoiser)
    fsdp2_prepare_model(accelerator, denoiser)
    # Pipelines and configurations write down what a model's class is called
    type(denoiser).__name__, type(denoiser).__module__ = (
        plain_class(denoiser).__name__,
        plain_class(denoiser).__module__,
    )
    denoiser.set_reshard_after_forward(True)  # of the outermost too, which is also called without a backward
    # The copies of autocast's cache would be the whole model
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    # The gradient of the whole model would wait in each process for the last micro-batch
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    return model


def blocks(denoiser: torch.nn.Module) -> list[str]:
    """The classes of a denoiser's modules that are gathered one at a time: those that diffusers names as not to be split."""
    there = {type(module).__name__ for module in denoiser.modules()}
    return [name for name in denoiser._no_split_modules or () if name in there]


def denoiser_of(model: torch.nn.Module) -> torch.nn.Module:
    """The denoiser of diffusers, without the model of peft around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def keeping_shards(accelerator: Accelerator) -> Iterator[None]:
    """While the context lasts, `accelerator.prepare` does not cut the model again, which it would do from the outside."""

    def prepare(*objects: Any) -> tuple[Any, ...]:
        return tuple(
            accelerator.prepare_model(each, device_placement=False, evaluation_mode=True)
            if isinstance(each, torch.nn.Module)
            else accelerator.prepare_optimizer(each)
            for each in objects
        )

    accelerator._prepare_fsdp2 = prepare
    try:
        yield
    finally:
        del accelerator._prepare_fsdp2


# ----- whole weights -----


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the weights of a model are cut over processes."""
    return isinstance(denoiser_of(model), FSDPModule) or zero.is_cut(model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be cut over processes, which all call this, as a whole."""
    if zero.is_cut_weight(tensor):
        return zero.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, Any], is_kept: bool) -> dict[str, Any]:
    """
    Gathers tensors that may be cut over processes, which all call this, one after the other.

    Args:
        tensors (`dict[str, Any]`):
            The tensors by name; other values stay as they are.
        is_kept (`bool`):
            Whether this process keeps them, which frees the others of the memory.

    Returns:
        `dict[str, Any]`: those that were cut on the CPU; empty if they are not kept.
    """
    kept = {}
    for name, value in tensors.items():
        full = whole(value).detach() if isinstance(value, torch.Tensor) else value
        if is_kept:
            kept[name] = full.cpu() if isinstance(value, DTensor) or zero.is_cut_weight(value) else full
    return kept


def whole_weights(model: torch.nn.Module, is_kept: bool = True) -> dict[str, torch.Tensor]:
    """The state of a model that may be cut over processes, see [`~trainer.sharding.gathered`]."""
    return gathered(model.state_dict(keep_vars=True), is_kept)


def whole_lora(model: PeftModel, adapter_name: str = "default", is_kept: bool = True) -> dict[str, torch.Tensor]:
    """The weights of a LoRA as peft saves them, of a model that may be cut over processes, see [`~trainer.sharding.gathered`]."""
    own = {name: weight for name, weight in model.state_dict(keep_vars=True).items() if "lora_" in name}
    weights = gathered(own, is_kept)
    return get_peft_model_state_dict(model, weights, adapter_name) if is_kept else {}


def cut_as(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Cuts whole weights as a model's own are cut; those that are not stay whole.

    Args:
        own (`dict[str, torch.Tensor]`):
            The model's own.
        weights (`dict[str, torch.Tensor]`):
            Whole ones, the same in each process.

    Returns:
        `dict[str, torch.Tensor]`
    """
    return {name: _cut_as(own[name], weight) if name in own else weight for name, weight in weights.items()}


def _cut_as(own: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not isinstance(own, DTensor):
        return weight
    weight = weight.to(own.device)
    return distribute_tensor(
        weight, own.device_mesh, own.placements, src_data_rank=None
    )  # none sends its own to the others


@contextmanager
def as_whole(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """
    While the context lasts, a denoiser that may be cut saves these weights.

    Args:
        model (`torch.nn.Module`):
            The denoiser.
        weights (`dict[str, torch.Tensor]`):
            Its state, [`~trainer.sharding.gathered`].
    """
    model.state_dict = lambda: weights
    try:
        yield
    finally:
        del model.state_dict


def plain_class(model: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a denoiser as diffusers knows it."""
    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)


# ----- the optimizer -----


def whole_optimizer_state(optimizer: torch.optim.Optimizer, is_kept: bool) -> dict[str, Any]:
    """
    The state of an optimizer as an unsharded run has it, see [`~trainer.sharding.gathered`].

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer of a sharded model.
        is_kept (`bool`):
            Whether this process keeps it.

    Returns:
        `dict[str, Any]`
    """
    state = optimizer.state_dict()
    return state | {"state": {number: gathered(values, is_kept) for number, values in state["state"].items()}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """
    Loads the state of an unsharded run's optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer of a sharded model.
        state (`dict[str, Any]`):
            [`~trainer.sharding.whole_optimizer_state`], the same in each process.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        number: {
            name: _cut_as(parameters[number], value) if _has_shape_of(value, parameters[number]) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": cut})


def _has_shape_of(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape
