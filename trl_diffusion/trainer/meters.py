# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Per-sample metrics, averaged over all samples and processes when they are logged."""

from collections import defaultdict

import torch
from accelerate import Accelerator


Metrics = dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]


MAX_RECORDED = 16  # batches whose values are kept before they are summed


class Meters:
    """
    Collects per-sample values on the device. Nothing is gathered or copied before the averages are asked for, and memory does
    not grow if nobody asks.

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
        self.sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "evaluation": {}}  # of what is recorded no more

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
            values, where = value if isinstance(value, tuple) else (value, None)
            if self.is_padding is not None:
                counts = ~self.is_padding.repeat(len(values) // len(self.is_padding))
                where = counts if where is None else where & counts
            recorded = self.recorded[mode][name]
            recorded.append((values.detach().float(), where))
            if len(recorded) == MAX_RECORDED:
                self._sum(mode, name)

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
        The mean of each metric since the last call, over the samples of all processes that have it: one sum over processes and
        one copy from the device for all metrics.

        Args:
            mode (`str`):
                `"train"` or `"evaluation"`.

        Returns:
            `dict[str, float]`: metrics that no sample has are left out.
        """
        names = list(self.recorded[mode])
        for name in names:
            self._sum(mode, name)
        sums = [self.sums[mode][name] for name in names]
        self.recorded[mode].clear()
        self.sums[mode].clear()
        if not names:
            return {}
        totals = self.accelerator.reduce(torch.stack(sums).float()).tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count > 0}

    def _sum(self, mode: str, name: str) -> None:
        """Puts the sum and the number of a metric's recorded values in place of them."""
        recorded = self.recorded[mode][name]
        if not recorded:
            return
        values = torch.cat([values for values, _ in recorded])
        where = torch.cat([torch.ones_like(v, dtype=torch.bool) if where is None else where for v, where in recorded])
        dtype = torch.float32 if values.device.type == "mps" else torch.float64  # which MPS does not have
        sums = torch.stack([torch.where(where, values.to(dtype), 0).sum(), where.sum().to(dtype)])
        self.sums[mode][name] = self.sums[mode].get(name, 0) + sums
        recorded.clear()
