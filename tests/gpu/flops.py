# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the arms of the benchmark compute, counted without computing it, and what GPUs can."""

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmark.arms import FLOOR_ARMS, PAIR_SCRIPT_ARMS, TRAINER_ARMS
from tests.benchmark.steps import Given, dpo_loss


# TFLOP a second in bfloat16, dense, of the maker's data sheets
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165,
}


def on_meta(given: Given) -> Given:
    """One pair of a batch, without values."""
    pairs = len(given.noise) // 2

    def one(value: torch.Tensor) -> torch.Tensor:
        return value[::pairs].float().to("meta")

    return Given(
        one(given.noisy_latents),
        one(given.timesteps),
        one(given.noise),
        {name: one(value) for name, value in given.conditions.items()},
    )


def count_tflop(denoiser: torch.nn.Module, given: Given, lora: LoraConfig) -> dict[str, float]:
    """
    Counts the TFLOP of one pair: matrix products, convolutions and attention, nothing that is computed twice.

    Args:
        denoiser (`torch.nn.Module`):
            The denoiser, of which the configuration is read.
        given ([`tests.benchmark.steps.Given`]):
            A batch.
        lora ([`~peft.LoraConfig`]):
            The LoRA of the arms that train one.

    Returns:
        `dict[str, float]`: `"forward"`, and forward and backward of `"full"` and `"lora"`.
    """
    given, counts = on_meta(given), {}
    with torch.device("meta"):
        policies = {
            "full": type(denoiser).from_config(denoiser.config),
            "lora": get_peft_model(type(denoiser).from_config(denoiser.config), lora),
        }
    # Attention is written out, because the counter does not know every kernel
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            prediction = given.ask(policies["full"])
        counts["forward"] = counter.get_total_flops() / 1e12
        for name, policy in policies.items():
            with FlopCounterMode(display=False) as counter:
                dpo_loss(given.ask(policy.train()), prediction, given.noise).backward()
            counts[name] = counter.get_total_flops() / 1e12
    return counts


def arm_tflop(arm: str, counts: dict[str, float]) -> float | None:
    """The denoiser's TFLOP of a pair in an arm's step; `None` where an inversion's depend on the timestep."""
    if arm in FLOOR_ARMS:
        return counts["lora" if FLOOR_ARMS[arm] else "full"] + counts["forward"]
    if arm == "diffusers_lora":
        return counts["lora"]
    if arm in PAIR_SCRIPT_ARMS:
        return counts["full"] + counts["forward"] if arm == "diffusion_dpo" else None
    is_lora, settings = TRAINER_ARMS[arm]
    if "noise_source" in settings:
        return None
    reference = 0 if settings.get("precompute_ref_preds") else counts["forward"]
    return counts["lora" if is_lora else "full"] + reference


def share_of_peak(tflop: float | None, seconds: float, device: str) -> float | None:
    """The share of a GPU's peak that was used; `None` where either is not known."""
    peak = PEAKS.get(device)
    return None if tflop is None or peak is None else tflop / seconds / peak
