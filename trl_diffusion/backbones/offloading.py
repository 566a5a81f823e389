# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Frozen encoders that stay in CPU memory and pass through the device layer by layer, by diffusers' group offloading."""

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading


MARK, HOOK = "_is_offloaded_by_layer", "group_offloading"


def is_offloaded_by_layer(module: torch.nn.Module) -> bool:
    """Whether a module was offloaded by [`backbones.offloading.offload_by_layer`]."""
    return MARK in vars(module)


def offload_by_layer(module: torch.nn.Module, device: torch.device) -> None:
    """
    Has each layer of a frozen module on a device while it computes, and in CPU memory else. Results are the same. The hooks hold no
    copies of the weights, so that the module can be cast and saved meanwhile.

    Args:
        module (`torch.nn.Module`):
            The module, which is not trained: backward would find its weights on the CPU.
        device (`torch.device`):
            Where it computes.
    """
    stop_offloading(module)
    apply_group_offloading(module, device, torch.device("cpu"), offload_type="leaf_level")
    setattr(module, MARK, True)


def stop_offloading(module: torch.nn.Module) -> None:
    """Takes back what [`backbones.offloading.offload_by_layer`] did; the module is then in CPU memory."""
    if is_offloaded_by_layer(module):
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK, recurse=True)
        delattr(module, MARK)
