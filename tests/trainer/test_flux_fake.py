# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A training step of FLUX.1 dev at its true size, on tensors that have shapes and types and no memory."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.benchmark.live_bytes import make_fake
from tests.benchmark.models import flux_dev_pipeline
from tests.benchmark.recipe import (
    compute,
    fake_tensors,
    make_backbone,
    make_encoders_fake,
    make_policy,
    make_trainer,
    noised_batch,
)
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


@pytest.mark.slow
def test_one_step_of_iapo_on_flux_dev():
    """
    A LoRA of rank 64 trains in float32 on a frozen base in bfloat16, on packed latents of 1024x1024 pixels: shapes and types of
    all that goes in and comes out, one more forward of each block by activation checkpointing, and a state for each weight.
    """
    backbone = make_backbone(flux_dev_pipeline)
    model = make_policy(backbone, LoraConfig(r=64, lora_alpha=64), has_expert=False)
    inputs, blocks = [], []
    transformer = model.base_model.model
    transformer.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda *args: blocks.append(torch.is_grad_enabled()))
    with fake_tensors():
        make_encoders_fake(backbone)
        make_fake(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trainer = make_trainer(InstanceDPOTrainer, InstanceDPOConfig("unused", use_cpu=True), backbone, model)
        noised = noised_batch(trainer, batch_size=1, resolution=1024)
        with torch.autocast("cpu", torch.bfloat16):
            noised = noised._replace(frozen=trainer.frozen_predictions(model, noised))
            losses, metrics = trainer.objective(model, noised)
        losses.mean().backward()
        optimizer = torch.optim.AdamW(trained.values())
        optimizer.step()

    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == 11_901_408_320 and {p.dtype for p in frozen} == {torch.bfloat16}
    # 19 blocks of 8 projections, four of them for the text, and 38 of 3: each has two matrices of 64 x 3072
    assert len(trained) == 2 * (19 * 8 + 38 * 3)
    assert sum(p.numel() for p in trained.values()) == (19 * 8 + 38 * 3) * 2 * 64 * 3072 == 104_595_456

    assert noised.latents.shape == noised.noisy_latents.shape == (2, 16, 128, 128)
    assert len(inputs) == 2  # reference, policy
    for given in inputs:
        assert {name: tuple(value.shape) for name, value in given.items() if isinstance(value, torch.Tensor)} == {
            "hidden_states": (2, 64 * 64, 16 * 2 * 2),
            "encoder_hidden_states": (2, 512, 4096),
            "pooled_projections": (2, 768),
            "timestep": (2,),
            "guidance": (2,),
            "img_ids": (64 * 64, 3),
            "txt_ids": (512, 3),
        }
    assert blocks == [False, True, True]  # reference, policy, policy again in the backward
    ref_pred = noised.frozen["ref_pred"]
    assert ref_pred.shape == (2, 16, 128, 128) and not ref_pred.requires_grad

    # Errors and what follows from them: one pair, float32
    assert losses.shape == (1,) and losses.dtype == torch.float32 and losses.requires_grad
    errors = [
        value
        for name, value in metrics.items()
        if name.startswith(("errors/", "rewards/")) and value.dtype != torch.bool
    ]
    assert len(errors) == 7 and {(value.shape, value.dtype) for value in errors} == {((1,), torch.float32)}

    for parameter in trained.values():
        state = optimizer.state[parameter]
        for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
            assert tensor.shape == parameter.shape and tensor.dtype == torch.float32
    assert all(p.grad is None for p in frozen)


@pytest.mark.slow
def test_a_recipe_is_computed_at_the_true_size():
    """Weights and optimizer of Stable Diffusion 3.5 medium are what they sum up to, and a forward has the FLOPs that are known."""
    recipe = Path(__file__).parents[2] / "examples/configs/iapo_sd35_medium.yaml"
    found = compute(recipe, per_device_train_batch_size=1)
    trained = found["trained_parameters"]
    assert trained == (24 * 8 - 1 + 13 * 4) * 2 * 64 * 1536
    # Two bytes for each weight and for each entry of the 384 x 384 positions, four for each weight of the LoRA
    weights = 2 * (2_243_171_520 + 384 * 384 * 1536) + 4 * trained
    assert found["training_gib"]["weights"] == weights / 2**30
    # AdamW: two moments in float32, and a number of steps for each of two matrices in 243 layers
    assert found["training_gib"]["optimizer"] == (8 * trained + 4 * 2 * 243) / 2**30
    # T5-XXL, CLIP ViT-L and bigG in bfloat16, the VAE in float32
    encoders = 2 * (4_762_310_656 + 123_650_304 + 694_659_840) + 4 * 83_819_683
    assert found["encoding_gib"]["weights"] == pytest.approx(
        encoders / 2**30, rel=1e-5
    )  # and the numbers of positions
    # Reference, policy, policy again, backward: for two images
    assert found["forward_tflop"] == pytest.approx(11.25, rel=1e-3)
    assert 2 * 3.9 < found["tflop_per_row"] / found["forward_tflop"] < 2 * 4.6
