# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Tensors without memory, and how much they would take: what `tests.benchmark.memory` and `tests.benchmark.recipe` count with."""

import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


GIB = 2**30
PARTS = ["weights", "gradients", "optimizer", "activations"]


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive, by part, and keeps the parts at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak = Counter(), Counter()
        self.live = {}  # storage: a reference that notices its end, its part, its size

    def put(self, tensor: torch.Tensor, part: str) -> None:
        """Counts a tensor's storage, or moves it to another part."""
        storage = tensor.untyped_storage()
        self.forget(storage._cdata)
        key = storage._cdata
        self.live[key] = (weakref.ref(storage, lambda _: self.forget(key)), part, storage.nbytes())
        self.now[part] += storage.nbytes()
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    def forget(self, key: int) -> None:
        if key in self.live:
            _, part, size = self.live.pop(key)
            self.now[part] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two calls of three
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                self.put(tensor, "activations")
        return result

    def watch(self, module: torch.nn.Module) -> None:
        """Counts a module's parameters and buffers, and gradients as they come."""
        for buffer in module.buffers():
            self.put(buffer, "weights")
        for parameter in module.parameters():
            self.put(parameter, "weights")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.put(p.grad, "gradients"))


def float_norm(norm: Callable) -> Callable:
    """A norm as CUDA's autocast runs it: in float32."""

    def in_float(value):
        return value.float() if isinstance(value, torch.Tensor) else value

    def run(*args, **kwargs):
        return norm(*map(in_float, args), **{name: in_float(value) for name, value in kwargs.items()})

    return run


def make_fake(module: torch.nn.Module) -> None:
    """Turns a module's tensors on the meta device into fake ones on the CPU; what is shared stays shared."""
    made = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[parameter] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
                submodule._parameters[name] = made[parameter]
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, value in vars(submodule).items():
            if isinstance(value, torch.Tensor):  # a table that is no buffer
                setattr(submodule, name, torch.empty(value.shape, dtype=value.dtype))
