# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math
import resource
import time

import pytest
import torch
from peft import LoraConfig

from tests import tiny
from tests.benchmark.models import sd15_pipeline
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [LoraConfig(r=64, lora_alpha=64), None], ids=["lora", "full"])
def test_one_step_at_the_size_of_stable_diffusion_15(tmp_path, peft_config):
    """Two optimizer steps on a 512x512 pair: ln 2 and margin 0 at first, then a policy that has moved."""
    torch.manual_seed(0)
    pipeline = sd15_pipeline()
    assert round(sum(p.numel() for p in pipeline.unet.parameters()) / 1e6) == 860
    trainer = InstanceDPOTrainer(
        pipeline,
        args=InstanceDPOConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=1,
            learning_rate=1e-5,
            optim="adafactor",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=tiny.pairs(2),
        peft_config=peft_config,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    first, second = trainer.state.log_history[:2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{seconds / 2:.0f} s a step, peak {peak:.1f} GiB, first {first}, second {second}")
    assert trainer.resolution == 512
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0
    # Not the margin: both rewards are multiples of the rounding of errors near 1, and may be the same one
    assert second["rewards/chosen"] != 0 and math.isfinite(second["grad_norm"])


@pytest.mark.slow
def test_both_stages_of_cpo_at_the_size_of_stable_diffusion_15(tmp_path):
    """An expert, then two optimizer steps that ask it, on one base, never two: ln 2 at first, then a policy that has moved."""
    torch.manual_seed(0)
    pipeline = sd15_pipeline()
    (tmp_path / "criteria.yaml").write_text(tiny.CRITERIA)
    settings = {
        "criteria": str(tmp_path / "criteria.yaml"),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "optim": "adafactor",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    start = time.perf_counter()
    expert = AttributeSFTTrainer(
        pipeline,
        args=AttributeSFTConfig(str(tmp_path), learning_rate=1e-3, **settings),
        train_dataset=tiny.paintings(4),
    )
    expert.train()
    expert_seconds = time.perf_counter() - start
    trainer = ComplexPOTrainer(
        pipeline,
        expert,
        args=ComplexPOConfig(str(tmp_path), learning_rate=1e-4, target_strength=1.5, **settings),
        train_dataset=tiny.paintings(4),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    first, second = trainer.state.log_history[:2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{expert_seconds / 2:.0f} s a step of the expert, {seconds / 2:.0f} s of CPO, peak {peak:.1f} GiB, first {first}, "
        f"second {second}"
    )
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(second["rewards/margins"]) > 10 * abs(first["rewards/margins"]) and math.isfinite(second["grad_norm"])
