# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Per-sample metrics, averaged over all samples and processes when they are logged."""

from collections import defaultdict

import torch
from accelerate import Accelerator


Metrics = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


class Meters:
    """
    Collects per-sample values on the device. Nothing is gathered or copied before the averages are asked for.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Sums over processes.

    Attributes:
        is_padding (`torch.Tensor` of shape `(B,)`, bool, *optional*):
            The rows of the current batch that count nothing.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.is_padding: torch.Tensor | None = None
        self.recorded: dict[str, dict[str, list]] = {"train": defaultdict(list), "evaluation": defaultdict(list)}

    def record(self, mode: str, metrics: Metrics) -> None:
        """
        Collects metrics.

        Args:
            mode (`str`):
                `"train"` or `"evaluation"`.
            metrics (`dict`):
                By name, values of shape `(B,)` or `(n * B,)`, or a tuple of values and of which samples have them, a bool
                tensor of the same shape.
        """
        for name, value in metrics.items():
            values, where = value if isinstance(value, tuple) else (value, torch.ones_like(value, dtype=torch.bool))
            if self.is_padding is not None:
                where = where & ~self.is_padding.repeat(len(where) // len(self.is_padding))
            self.recorded[mode][name].append((values.detach().float(), where))

    def add_averages(self, mode: str, logs: dict[str, float], prefix: str = "") -> None:
        """
        Adds the averages to what the Trainer logs. The loss is then the mean over rows; the Trainer's is over steps, which may
        differ in their rows.

        Args:
            mode (`str`):
                `"train"` or `"evaluation"`.
            logs (`dict[str, float]`):
                What is logged, changed in place. The loss is left out where it has none.
            prefix (`str`, *optional*, defaults to `""`):
                Before each name.
        """
        averages = {f"{prefix}{name}": value for name, value in self.averages(mode).items()}
        logs.update({name: value for name, value in averages.items() if name != "loss" or "loss" in logs})

    def averages(self, mode: str) -> dict[str, float]:
        """
        The mean of each metric since the last call, over the samples of all processes that have it.

        Args:
            mode (`str`):
                `"train"` or `"evaluation"`.

        Returns:
            `dict[str, float]`: metrics that no sample has are left out.
        """
        recorded = self.recorded[mode]
        names, sums = list(recorded), []
        for name in names:
            values, where = (torch.cat(parts).cpu() for parts in zip(*recorded[name], strict=True))
            sums.append(torch.stack([torch.where(where, values.double(), 0).sum(), where.sum().double()]))
        recorded.clear()
        if not names:
            return {}
        totals = self.accelerator.reduce(torch.stack(sums).float().to(self.accelerator.device)).tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count > 0}
