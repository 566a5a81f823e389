# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images reach the device as bytes; a collator of the user's may give floating point numbers."""

import pytest
import torch

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.data.transforms import normalize_pixels


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(str(tmp_path_factory.mktemp("run")), per_device_train_batch_size=2, report_to="none")
    return InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(4))


def test_a_batch_that_reaches_the_device_holds_bytes(trainer):
    """What the data loader hands over has one byte a colour, a quarter of the numbers that the VAE takes."""
    batch = next(iter(trainer.get_train_dataloader()))
    for column in ("chosen", "rejected"):
        pixels = batch[f"{column}_pixel_values"]
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous() and pixels.shape[:2] == (2, 3)


@pytest.mark.parametrize("columns", [("chosen", "rejected"), ("chosen",)], ids=["both", "one"])
def test_floating_point_numbers_are_taken_as_they_are(trainer, columns):
    """Numbers in [-1, 1] of a user's own collator, in both columns or one, give the latents that bytes give."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])
    floats = {f"{column}_pixel_values": normalize_pixels(batch[f"{column}_pixel_values"]) for column in columns}
    keys = [(column, row) for column in ("chosen", "rejected") for row in range(2)]
    from_bytes = trainer.encoder.sample_latents(batch, keys)
    assert torch.equal(trainer.encoder.sample_latents(batch | floats, keys), from_bytes)
