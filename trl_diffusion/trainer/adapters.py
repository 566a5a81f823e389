# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Which adapter of a policy answers: none, another one, or different ones for different rows of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer


def adapter_layers(policy: torch.nn.Module) -> list[BaseTunerLayer]:
    """The layers of a policy that hold adapters, none where all weights are trained."""
    return [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def with_adapter(layers: list[BaseTunerLayer], adapter: str | None) -> Iterator[None]:
    """
    Switches layers to another adapter while the context lasts. peft's own `disable_adapter` and `set_adapter` search all modules
    several times: as long as a forward of a small model.

    Args:
        layers (`list[~peft.tuners.tuners_utils.BaseTunerLayer]`):
            The layers, whose adapters are on.
        adapter (`str` or `None`):
            The adapter; `None` for the base alone.
    """
    attributes = [vars(layer) for layer in layers]  # to set those of a module takes ten times as long
    active = [layer._active_adapter for layer in layers]
    for own in attributes:
        own["_disable_adapters"] = adapter is None
        if adapter is not None:
            own["_active_adapter"] = adapter
    try:
        yield
    finally:
        for own, name in zip(attributes, active, strict=True):
            own["_disable_adapters"], own["_active_adapter"] = False, name


class AdapterMixer:
    """
    Runs different adapters on different rows of one forward without gradient. Each takes a slice of the batch, which is a view:
    peft's `adapter_names` indexes with lists, which are copied to the device for each layer, and needs the evaluation mode.

    Args:
        policy (`torch.nn.Module`):
            The policy, not wrapped.
    """

    def __init__(self, policy: torch.nn.Module):
        self.policy = policy
        self.layers = [layer for layer in adapter_layers(policy) if isinstance(layer, LoraLayer)]
        self.slices: list[tuple[str, slice]] = []
        self.num_rows = 0
        for layer in self.layers:
            layer.register_forward_hook(self._add)

    @contextmanager
    def mixing(self, rows: list[tuple[str | None, int]]) -> Iterator[None]:
        """
        Mixes adapters while the context lasts.

        Args:
            rows (`list[tuple[str | None, int]]`):
                The adapters in the order of their rows, `None` for the base, each with its number of rows.

        Raises:
            `ValueError`: In a forward, if an adapter is in a layer that is not given the rows of the batch, but the tokens of all of
                them in one sequence, as the embedders of Z-Image are.
        """
        start = 0
        for adapter, size in rows:
            if adapter is not None:
                self.slices.append((adapter, slice(start, start + size)))
            start += size
        self.num_rows = start
        try:
            with torch.no_grad(), with_adapter(self.layers, None):
                yield
        finally:
            self.slices.clear()

    def _add(self, layer: LoraLayer, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # A layer may be given each row as several, such as one for each token in the text blocks of Krea 2
        number, rest = divmod(len(args[0]), max(self.num_rows, 1))
        is_by_row = rest == 0 and (number == 1 or args[0].ndim > 2)
        for adapter, rows in self.slices:
            rows = slice(rows.start * number, rows.stop * number)
            if adapter in layer.lora_A:
                if not is_by_row:
                    name = next(name for name, module in self.policy.named_modules() if module is layer)
                    raise ValueError(
                        f"The LoRA {adapter!r} adapts `{name.removeprefix('base_model.model.')}`, which is given the tokens of all rows "
                        "in one sequence, so that it cannot share a batch with other adapters. Train it without this layer in "
                        "`target_modules`."
                    )
                lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
                added = lora_B(lora_A(args[0][rows].to(lora_A.weight.dtype))) * layer.scaling[adapter]
                output[rows].add_(added.to(output.dtype))
