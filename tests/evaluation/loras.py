# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRAs with random weights, in the format of diffusers."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict


def save_lora(
    pipeline: DiffusionPipeline,
    folder: Path,
    seed: int = 0,
    size: float = 0.3,
    r: int = 4,
    alpha: int = 8,
    targets: tuple[str, ...] = ("to_q", "to_v", "conv1"),
):
    """Adds a LoRA to the denoiser of a pipeline and saves it; with size 0, it changes nothing."""
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, name)
    model = get_peft_model(denoiser, LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key.removeprefix("base_model.model."): size * torch.randn(weight.shape, generator=generator)
        for key, weight in get_peft_model_state_dict(model).items()
    }
    metadata = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(
        str(folder), **{f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": metadata}
    )
