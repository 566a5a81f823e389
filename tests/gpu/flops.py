# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the arms of the benchmark compute, counted without computing it, and what GPUs can.

python -m tests.gpu.flops        counts `COUNTED` and `FORWARD` again, in minutes
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmark import models
from tests.benchmark.arms import FLOOR_ARMS, PAIR_SCRIPT_ARMS, TRAINER_ARMS
from tests.benchmark.families import FAMILIES, empty_conditions, empty_latents
from tests.benchmark.live_bytes import make_fake
from tests.benchmark.recipe import fake_tensors, tflop
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
# TFLOP of a pair at the models' own sizes, with LoRAs of rank 64 on the attention projections, by `count_tflop`
COUNTED = {
    "sd15": {"forward": 1.60654688256, "full": 4.81354612736, "lora": 3.529973858304},
    "sdxl": {"forward": 13.52247279616, "full": 40.46168489984, "lora": 29.11497027584},
    "sd35_medium": {"forward": 22.499147415552, "full": 67.487437258752, "lora": 54.703717318656},
}
# TFLOP of a forward on one image, by `count_forward`
FORWARD = {
    "sd15": {512: 0.803273, 1024: 4.674006},
    "sdxl": {512: 1.588779, 1024: 6.761236},
    "sana_600m": {512: 0.315621, 1024: 1.121488},
    "sana": {512: 0.836616, 1024: 2.966661},
    "sd35_medium": {512: 2.442643, 1024: 11.249574},
    "flux2_klein_4b": {512: 10.172971, 1024: 34.820178},
    "z_image": {512: 18.533626, 1024: 62.506373},
    "sd35_large": {512: 7.977786, 1024: 31.121115},
    "flux2_klein_9b": {512: 22.73172, 1024: 75.514721},
    "flux": {512: 21.5026, 1024: 74.384653},
    "krea2": {512: 41.313484, 1024: 128.987189},
    "qwen_image": {512: 22.63873, 1024: 78.303922},
    "flux2_dev": {512: 87.770171, 1024: 282.599551},
}
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FLOW_TARGETS = [*UNET_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
# The denoiser, the shape of an image's latents and those of its conditions, and the modules that a LoRA adapts
SHAPES = {
    "sd15": (models.sd15_unet, (4, 64, 64), {"prompt_embeds": (77, 768)}, UNET_TARGETS),
    "sdxl": (
        *(models.sdxl_unet, (4, 128, 128)),
        {"prompt_embeds": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        UNET_TARGETS,
    ),
    "sd35_medium": (
        *(models.sd35_medium_transformer, (16, 128, 128)),
        {"prompt_embeds": (77 + 256, 4096), "pooled_prompt_embeds": (2048,)},
        FLOW_TARGETS,
    ),
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


def count_model(name: str) -> dict[str, float]:
    """Counts the TFLOP of one pair of a model at its own size."""
    make_denoiser, shape, conditions, targets = SHAPES[name]
    with torch.device("meta"):
        latents, timesteps = torch.empty(2, *shape), torch.empty(2)
        given = Given(latents, timesteps, latents, {name: torch.empty(2, *of) for name, of in conditions.items()})
        return count_tflop(make_denoiser(), given, LoraConfig(r=64, lora_alpha=64, target_modules=targets))


def count_forward(name: str, resolution: int) -> float:
    """Counts the TFLOP of a family's forward on one image, with the longest prompt that its pipeline reads by default."""
    family = FAMILIES[name]
    with torch.device("meta"):
        denoiser = family.make_denoiser().to(torch.bfloat16)
    with fake_tensors(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        make_fake(denoiser)
        given = empty_latents(family, 1, resolution), torch.zeros(1), empty_conditions(family, 1)
        return tflop(lambda: family.predict(denoiser, *given))


def share_of_peak(tflop: float | None, seconds: float, device: str) -> float | None:
    """The share of a GPU's peak that was used; `None` where either is not known."""
    peak = PEAKS.get(device)
    return None if tflop is None or peak is None else tflop / seconds / peak


if __name__ == "__main__":
    for name in SHAPES:
        print(f"{name}: {count_model(name)}", flush=True)
    for name in FAMILIES:
        print(f"{name}: { ({side: count_forward(name, side) for side in (512, 1024)}) }", flush=True)
