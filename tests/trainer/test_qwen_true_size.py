# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Qwen-Image and Krea 2 at their true size, on tensors that have shapes and types and no memory."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from tests.benchmark.recipe import tflop
from tests.families import FAMILIES
from trl_diffusion.backbones import load_backbone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "num_weights", "embeds", "expected"),
    [
        ("qwen_image", 20_430_401_088, (120, 3584), 70.42),
        ("krea_2", 12_820_073_036, (64, 12, 2560), 113.34),
        ("krea_2", 12_820_073_036, (512, 12, 2560), 128.99),  # as the pipeline pads it
    ],
)
def test_a_prediction_of_the_true_size(family, num_weights, embeds, expected):
    """The classes of diffusers have the published sizes by default: their weights, and what a forward of 1024x1024 pixels computes."""
    backbone = load_backbone(FAMILIES[family].make())
    pipeline, given = backbone.pipeline, []
    with torch.device("meta"):
        pipeline.transformer = type(pipeline.transformer)().to(torch.bfloat16)
        pipeline.vae, pipeline.vae_scale_factor = AutoencoderKLQwenImage(), 8
        latents = torch.empty(1, backbone.latent_channels, 128, 128, dtype=torch.bfloat16)
        conditions = {"prompt_embeds": torch.empty(1, *embeds, dtype=torch.bfloat16)}
        timesteps = torch.empty(1)
    conditions["prompt_lengths"] = torch.tensor([embeds[0]])
    transformer = pipeline.transformer
    assert sum(weight.numel() for weight in transformer.parameters()) == num_weights
    transformer.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    predicted = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        computed = tflop(lambda: predicted.append(backbone.predict(transformer, latents, timesteps, conditions)))
    assert computed == pytest.approx(expected, rel=1e-3)
    assert given[0]["hidden_states"].shape == (1, 64 * 64, 16 * 2 * 2)
    assert predicted[0].shape == latents.shape == (1, 16, 128, 128)
