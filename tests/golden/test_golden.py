# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import pytest
import torch

from .__main__ import difference
from .arms import ARMS, record


GOLDEN = json.loads(Path(__file__).with_name("losses.json").read_text(encoding="utf-8"))


def test_every_arm_is_recorded():
    """The file holds what `python -m tests.golden` compares."""
    assert GOLDEN.keys() == ARMS.keys()


@pytest.mark.parametrize(
    "name",
    [
        *("iapo-sdxl-lora-inversion", "sft-sd_v-full-random", "cpo-sd-lora-random"),
        *("iapo-flux-full-inversion", "cpo-sd3-lora-random", "iapo-flux_2-lora-random", "sft-flux_2_dev-lora-random"),
        *(
            "iapo-z_image-full-inversion",
            "cpo-qwen_image-lora-random",
            "cpo-krea_2-lora-random",
            "sft-sana-lora-random",
        ),
    ],
)
def test_losses_are_the_recorded_ones(name):
    """Twenty steps log the losses that were recorded; 1e-4 leaves room for the rounding of another processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recorded = record(name)
    finally:
        torch.set_num_threads(threads)
    for key in ("loss", "eval_loss"):
        assert difference(GOLDEN[name][key], recorded[key]) <= 1e-4
