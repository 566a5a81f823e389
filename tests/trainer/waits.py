# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Counts what a GPU would have to wait for, without one: on the meta device, which cannot answer what a host asks."""

from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer


META = torch.device("meta")
ASKED = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")


class HostTraffic(TorchDispatchMode):
    """
    Counts operations that make the host wait for a device, or copy to it.

    Attributes:
        waits: Operations whose result the host, or the shape of a tensor, depends on.
        blocking: Copies from the CPU that wait until the device has done all before them.
        copies: Copies from the CPU that do not.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.blocking, self.copies = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = str(operation).rsplit(".", 1)[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        is_on_device = any(tensor.device == META for tensor in (*given, *made))
        if name in ASKED and is_on_device:
            self.waits[name] += 1
        # A number that an operation takes from the CPU is passed on with it
        if is_on_device and any(tensor.device != META and tensor.ndim > 0 for tensor in given):
            is_free = kwargs.get("non_blocking") or (name == "aten.copy_" and len(args) > 2 and args[2])
            (self.copies if is_free else self.blocking)[name] += 1
        return result


class MadeOfLists(TorchFunctionMode):
    """Adds to the blocking copies the tensors that are made on the device out of numbers of Python; none need no copy."""

    def __init__(self, traffic: HostTraffic):
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = args[-1] if args else None
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.device == META:
            if not isinstance(given, torch.Tensor) and result.numel():
                self.traffic.blocking[function.__name__] += 1
        return result


def to_meta(trainer: DiffusionTrainer) -> None:
    """Moves all that a step touches to the meta device; the trainer cannot be used for anything else then."""
    trainer.policy.to(META)
    if trainer.reference is not None and trainer.reference.denoiser is not None:
        trainer.reference.denoiser.to(META)
    trainer.backbone.to(META)
    trainer.encoder.device = trainer.encoder.ahead.device = META
    trainer.accelerator.state.device = META


def micro_batch(trainer: DiffusionTrainer, rows: list[dict[str, Any]]) -> HostTraffic:
    """What a micro-batch after the first step would have a GPU wait for: forwards, loss, metrics and backward."""
    inputs = {
        name: value.to(META) if isinstance(value, torch.Tensor) else value
        for name, value in trainer.data_collator(rows).items()
    }
    trainer.model.train()
    trainer.state.global_step = 1
    trainer.meters.is_padding = None
    no_autocast = mock.patch.object(
        torch, "autocast", lambda *args, **kwargs: nullcontext()
    )  # the meta device has none
    with no_autocast, HostTraffic() as traffic, MadeOfLists(traffic):
        trainer.compute_loss(trainer.model, inputs).backward()
    return traffic
