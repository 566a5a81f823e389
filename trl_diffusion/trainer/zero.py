# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
All that is known of DeepSpeed (ZeRO-2 and ZeRO-3).

Its engine averages gradients, keeps the optimizer's state in shards, and with ZeRO-3 the weights too. It computes in float32: where a
run has a mixed precision, autocast computes as in any other run, so that its numbers and what it saves are theirs.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .diffusion_config import DiffusionConfig


PRECISIONS = ("bf16", "fp16")
SHARED = {  # settings that the trainer has too, under its names
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
}
SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
REFUSED = (
    *("optimizer", "scheduler", "amp", "torch_autocast", "data_types", "tensor_parallel", "sequence_parallel_size"),
    *("compression_training", "data_efficiency", "curriculum_learning", "progressive_layer_drop", "sparse_attention"),
)


# ----- what is asked for, and what is refused -----


def check_zero(args: DiffusionConfig) -> None:
    """
    Checks what is known of a run with DeepSpeed before a model is loaded.

    Args:
        args ([`DiffusionConfig`]):
            The configuration.

    Raises:
        `ValueError`: If a setting does not go with it.
    """
    config = args.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero.get("stage") not in (2, 3):
        raise ValueError(
            f"The stage of DeepSpeed's ZeRO is {zero.get('stage')}, and the trainers support 2 and 3. Use `--accelerate_config zero2` or "
            "`zero3`, or set `zero_stage`."
        )
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("none", None):
            raise ValueError(
                f"DeepSpeed's `{name}` to {device} does not go with these trainers. Set its device to `none`."
            )
    if refused := [name for name in REFUSED if name in config]:
        raise ValueError(
            f"The configuration of DeepSpeed has `{refused[0]}`, which does not go with these trainers. Leave it out: optimizer, schedule "
            "and precision are the trainer's."
        )
    for name, own in SHARED.items():
        value, given = getattr(args, own), config.get(name, "auto")
        if given not in ("auto", value):
            raise ValueError(
                f"The configuration of DeepSpeed has `{name}` {given}, and `{own}` of the trainer is {value}. Set the former to `auto`."
            )
    if args.auto_find_batch_size:
        raise ValueError("`auto_find_batch_size=True` does not go with DeepSpeed. Set `per_device_train_batch_size`.")


def configure(accelerator: Accelerator, args: DiffusionConfig) -> None:
    """
    Makes DeepSpeed's configuration that of this run, once the accelerator is made: it computes in float32, sizes of buffers that would
    follow from a language model's are DeepSpeed's own, and transformers cuts no model by itself that it loads, such as a text encoder.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator, changed in place.
        args ([`DiffusionConfig`]):
            The configuration.
    """
    settings = accelerator.state.deepspeed_plugin.hf_ds_config
    for precision in PRECISIONS:
        settings.config.pop(precision, None)
    for name in (*SHARED, "train_batch_size"):
        settings.config.setdefault(name, "auto")
    zero = settings.config["zero_optimization"]
    for name in [name for name in SIZES if zero.get(name) == "auto"]:
        del zero[name]
    # Its own linear layer, which it puts in place of PyTorch's in all models, keeps no weights for the backward, and adds the bias after
    # rounding. With activation checkpointing nothing is kept anyway
    zero.setdefault("memory_efficient_linear", not (args.activation_checkpointing or args.gradient_checkpointing))
    settings.trainer_config_process(args)
    unset_hf_deepspeed_config()
    accelerator.native_amp = args.half_dtype is not None


# ----- cutting a model -----


def prepare(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """
    Moves a model to the device, the policy with autocast. A frozen one is cut over the processes with ZeRO-3, in place.

    Args:
        model (`torch.nn.Module`):
            The policy, not wrapped, or a frozen model, which has autocast already.
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator.

    Returns:
        `torch.nn.Module`: the same model.
    """
    if any(weight.requires_grad for weight in model.parameters()):
        return accelerator.prepare_model(model, evaluation_mode=True)
    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    if config["zero_optimization"]["stage"] == 3:
        import deepspeed

        deepspeed.initialize(model=model, config=config)  # which leaves hooks on its modules
        return model
    return model.to(accelerator.device)


def is_cut_weight(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 has cut a weight."""
    return hasattr(weight, "ds_id")  # as DeepSpeed itself tells


def is_cut(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has cut a model's weights."""
    return any(is_cut_weight(weight) for weight in model.parameters())


# ----- whole weights -----


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight that DeepSpeed has cut over the processes, which all call this, as a whole."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


@contextmanager
def writable(model: torch.nn.Module, engine: Any) -> Iterator[None]:
    """
    While the context lasts, trained weights are whole and may be written, by the same values in each process; the optimizer's copies
    follow.

    Args:
        model (`torch.nn.Module`):
            The policy, not wrapped.
        engine (`deepspeed.DeepSpeedEngine` or `None`):
            DeepSpeed's engine, if there is one yet.
    """
    if is_cut(model):
        import deepspeed

        trained = [weight for weight in model.parameters() if weight.requires_grad]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=0):
            yield
    else:
        yield
    if engine is not None:
        engine.optimizer.refresh_fp32_params()


# ----- the optimizer -----


def whole_optimizer_state(optimizer: Any, trained: list[list[torch.nn.Parameter]], is_kept: bool) -> dict[str, Any]:
    """
    The state of an optimizer as an unsharded run has it.

    Args:
        optimizer (`accelerate.utils.DeepSpeedOptimizerWrapper`):
            The optimizer.
        trained (`list[list[torch.nn.Parameter]]`):
            The weights of its groups, as they were before DeepSpeed laid them together.
        is_kept (`bool`):
            Whether this process keeps it, which frees the others of the memory.

    Returns:
        `dict[str, Any]`: on the CPU; empty if it is not kept.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    inner, state = optimizer.optimizer.optimizer, {}
    _link(optimizer.optimizer, trained)
    example = next(iter(inner.state.values()), {})  # of one shard, which all have the same entries
    for number, weight in enumerate(sum(trained, [])):
        for name, value in example.items():
            full = value if name == "step" else safe_get_full_optimizer_state(weight, name)
            if is_kept:
                state.setdefault(number, {})[name] = full.cpu().clone()
    return {"state": state, "param_groups": _groups(inner, trained)} if is_kept else {}


def _groups(inner: torch.optim.Optimizer, trained: list[list[torch.nn.Parameter]]) -> list[dict[str, Any]]:
    groups, start = [], 0
    for group, weights in zip(_spread(inner.param_groups, trained), trained, strict=True):
        settings = {name: value for name, value in group.items() if name != "params"}
        groups.append({**settings, "params": list(range(start, start + len(weights)))})
        start += len(weights)
    return groups


def whole_schedule(state: dict[str, Any], trained: list[list[torch.nn.Parameter]]) -> dict[str, Any]:
    """The state of a learning rate's schedule as an unsharded run has it, from one of DeepSpeed's groups."""
    return {name: _spread(value, trained) if isinstance(value, list) else value for name, value in state.items()}


def own_schedule(state: dict[str, Any], trained: list[list[torch.nn.Parameter]]) -> dict[str, Any]:
    """The state of a learning rate's schedule for DeepSpeed's groups, from that of an unsharded run."""
    return {name: _picked(value, trained) if isinstance(value, list) else value for name, value in state.items()}


def _spread(values: list[Any], trained: list[list[torch.nn.Parameter]]) -> list[Any]:
    """What DeepSpeed has for each group, for all groups: it drops those without weights."""
    own = iter(values)
    return [next(own) if weights else values[0] for weights in trained]


def _picked(values: list[Any], trained: list[list[torch.nn.Parameter]]) -> list[Any]:
    return [value for value, weights in zip(values, trained, strict=True) if weights]


def load_optimizer_state(optimizer: Any, trained: list[list[torch.nn.Parameter]], state: dict[str, Any]) -> None:
    """
    Loads the state of an unsharded run's optimizer.

    Args:
        optimizer (`accelerate.utils.DeepSpeedOptimizerWrapper`):
            The optimizer.
        trained (`list[list[torch.nn.Parameter]]`):
            The weights of its groups, as they were before DeepSpeed laid them together.
        state (`dict[str, Any]`):
            [`~trainer.zero.whole_optimizer_state`], the same in each process.
    """
    zero, weights = optimizer.optimizer, sum(trained, [])
    inner = zero.optimizer
    for group, saved in zip(inner.param_groups, _picked(state["param_groups"], trained), strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    if not state["state"]:
        return
    example, group = next(iter(state["state"].values())), inner.param_groups[0]
    on_device = group.get("fused") or group.get("capturable")
    for shard in _shards(zero, weights[0]):
        inner.state[shard] = {
            name: (value.to(shard.device, copy=True) if on_device else value.clone())
            if name == "step"
            else torch.zeros_like(shard)
            for name, value in example.items()
        }
    _link(zero, trained)
    for number, weight in enumerate(weights):
        for name, value in state["state"][number].items():
            if name != "step":
                _set_state(weight, name, value)


def _shards(zero: Any, weight: torch.nn.Parameter) -> list[torch.Tensor]:
    return zero.fp32_partitioned_groups_flat if is_cut_weight(weight) else zero.single_partition_of_fp32_groups


def _link(zero: Any, trained: list[list[torch.nn.Parameter]]) -> None:
    """With ZeRO-2 tells each weight where its state is. DeepSpeed does so after the first step of the first group, for that alone."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    groups = [weights for weights in trained if weights]
    if not is_cut_weight(groups[0][0]):
        for weights, shard in zip(groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(weights, shard, zero.optimizer.state)


def _set_state(weight: torch.nn.Parameter, name: str, value: torch.Tensor) -> None:
    from deepspeed import comm
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not is_cut_weight(weight):
        safe_set_full_optimizer_state(weight, value.to(weight.device), name)
        return
    size, rank = weight.ds_tensor.numel(), comm.get_rank()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * comm.get_world_size() - value.numel()))
    safe_set_local_optimizer_state(weight, padded[rank * size : (rank + 1) * size].to(weight.device), name)
