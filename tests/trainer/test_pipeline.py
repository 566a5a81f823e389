# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A trainer gives a pipeline to sample with."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("by_name", [True, False], ids=["name", "pipeline"])
def test_the_pipeline_of_a_trainer_is_what_is_saved(tmp_path, family, is_lora, precompute, by_name):
    """`trainer.pipeline()` draws what plain diffusers draws with the saved weights, also after encoders were freed."""
    pipeline = tiny.PIPELINES[family]()
    pipeline.save_pretrained(tmp_path / "base")
    args = InstanceDPOConfig(
        str(tmp_path / "out"),
        **{**tiny.FAST, **tiny.settings(pipeline), "use_cpu": True, "precompute": precompute},
        precompute_dir=str(tmp_path / "cache"),
    )
    trainer = InstanceDPOTrainer(
        str(tmp_path / "base") if by_name else pipeline,
        args=args,
        train_dataset=tiny.pairs(4),
        peft_config=tiny.lora() if is_lora else None,
    )
    trainer.train()
    trainer.save_model()
    saved = DiffusionPipeline.from_pretrained(tmp_path / ("base" if is_lora else "out"))
    if is_lora:
        saved.load_lora_weights(tmp_path / "out")

    def draw(pipeline: DiffusionPipeline) -> np.ndarray:
        arguments = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
        arguments |= trainer.backbone.sampling_settings
        return pipeline("a cat", generator=torch.Generator().manual_seed(0), **arguments).images

    base = draw(DiffusionPipeline.from_pretrained(tmp_path / "base"))
    drawn = draw(trainer.pipeline())
    assert np.abs(drawn - draw(saved)).max() < 1e-6 < np.abs(drawn - base).max()
