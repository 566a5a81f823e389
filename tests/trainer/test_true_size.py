# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math
import resource
import time

import pytest
import torch
from peft import LoraConfig
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests import tiny
from tests.benchmark.models import sd15_pipeline, sd35_medium_transformer, sd35_pipeline, text_config
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


def sd35_medium_without_large_encoders():
    """
    Stable Diffusion 3.5 medium, its transformer in bfloat16 as a LoRA's base is loaded. Text encoders of one layer take the place
    of CLIP and T5-XXL: their embeddings have the true widths, 768 + 1280 pooled and 4096 in the sequence.
    """
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tiny.t5_tokenizer()),
            d_model=4096,
            d_kv=64,
            d_ff=64,
            num_layers=1,
            num_heads=1,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
        )
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = sd35_medium_transformer()
    finally:
        torch.set_default_dtype(torch.float32)
    clips = [CLIPTextModelWithProjection(text_config(width, 1, 1, "gelu")) for width in (768, 1280)]
    return sd35_pipeline(transformer, t5, clips)


@pytest.mark.slow
def test_one_step_at_the_size_of_stable_diffusion_35_medium(tmp_path):
    """An optimizer step on a precomputed 256x256 pair in bfloat16: ln 2 and margin 0, then a LoRA that has moved."""
    torch.manual_seed(0)
    pipeline = sd35_medium_without_large_encoders()
    assert sum(p.numel() for p in pipeline.transformer.parameters()) == 2_243_171_520
    trainer = InstanceDPOTrainer(
        pipeline,
        args=InstanceDPOConfig(
            str(tmp_path),
            beta=100,
            resolution=256,
            max_sequence_length=77,
            precompute=True,
            precompute_dir=str(tmp_path / "precomputed"),
            max_steps=1,
            per_device_train_batch_size=1,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=True,
        ),
        train_dataset=tiny.pairs(2).select([1]),  # with an instance that contradicts the label
        peft_config=LoraConfig(r=64, lora_alpha=64),
    )
    trained = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}
    # 24 blocks of 8 projections, but the last has none out of the text; 13 blocks have a second attention of 4
    assert sum(p.numel() for p in trained.values()) == (24 * 8 - 1 + 13 * 4) * 2 * 64 * 1536
    assert {p.dtype for p in trained.values()} == {torch.float32}
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    first = trainer.state.log_history[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{seconds:.0f} s the step, peak {peak:.1f} GiB, first {first}")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0
    assert first["grad_norm"] > 0 and math.isfinite(first["grad_norm"])
    assert first["masks/area"] > 0
    # Zero before. What the last block's text asks for goes nowhere
    unmoved = [name for name, p in trained.items() if "lora_B" in name and p.abs().max() == 0]
    assert unmoved == ["base_model.model.transformer_blocks.23.attn.add_q_proj.lora_B.default.weight"]
