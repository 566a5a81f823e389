# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Per-sample metrics, averaged over all samples and processes when they are logged."""

from collections import defaultdict
from collections.abc import Callable

import torch


class Meters:
    """
    Collects per-sample values on the device. Nothing is gathered or copied before the averages are asked for.

    Args:
        reduce (`Callable`):
            Sums a tensor over all processes.
        device (`torch.device`):
            Device on which processes exchange tensors.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device):
        self.reduce = reduce
        self.device = device
        self.recorded: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def record(self, values: dict[str, torch.Tensor], where: torch.Tensor) -> None:
        """
        Collects values.

        Args:
            values (`dict[str, torch.Tensor]`):
                Tensors of shape `(B,)` by metric.
            where (`torch.Tensor` of shape `(B,)`, bool):
                The samples that have these values.
        """
        for name, value in values.items():
            self.recorded[name].append((value.detach().float(), where))

    def averages(self) -> dict[str, float]:
        """
        The mean of each metric since the last call, over the samples of all processes that have it.

        Returns:
            `dict[str, float]`: metrics that no sample has are left out.
        """
        names, sums = list(self.recorded), []
        for name in names:
            values, where = (torch.cat(parts).cpu() for parts in zip(*self.recorded[name], strict=True))
            sums.append(torch.stack([torch.where(where, values.double(), 0).sum(), where.sum().double()]))
        self.recorded.clear()
        if not names:
            return {}
        totals, counts = self.reduce(torch.stack(sums).float().to(self.device)).T.tolist()
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count > 0}
