# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Each method of training by a short name, for tests that train all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from datasets import Dataset

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    DDSPOConfig,
    DDSPOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    unpair_pairs,
)
from trl_diffusion.trainer.diffusion_config import DiffusionConfig
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer


class Method(NamedTuple):
    """A trainer, its config, its rows from their number, and settings that make it this method."""

    trainer: type[DiffusionTrainer]
    config: type[DiffusionConfig]
    rows: Callable[[int], Dataset]
    settings: dict[str, Any] = {}

    @property
    def reads_attributes(self) -> bool:
        return self.rows is tiny.paintings


def labelled(num_rows: int) -> Dataset:
    """Images with labels of both kinds."""
    return unpair_pairs(tiny.pairs(num_rows)).select(range(num_rows))


METHODS = {
    "iapo": Method(InstanceDPOTrainer, InstanceDPOConfig, tiny.pairs),
    "mapo": Method(InstanceDPOTrainer, InstanceDPOConfig, tiny.pairs, {"loss_type": "mapo"}),
    "safe": Method(InstanceDPOTrainer, InstanceDPOConfig, tiny.pairs, {"safeguard_mu": 0.5, "anchor_alpha": 0.1}),
    "ddspo": Method(DDSPOTrainer, DDSPOConfig, tiny.pairs),
    "kto": Method(DiffusionKTOTrainer, DiffusionKTOConfig, labelled),
    "sft": Method(AttributeSFTTrainer, AttributeSFTConfig, tiny.paintings),
    "cpo": Method(ComplexPOTrainer, ComplexPOConfig, tiny.paintings),
}
