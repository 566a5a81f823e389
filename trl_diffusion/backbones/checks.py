# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Placeholder until the checks of the models are merged."""

import torch
from diffusers import DDPMScheduler


def check_pipeline(pipeline):
    denoiser = pipeline.unet
    if getattr(denoiser, "peft_config", None):
        raise ValueError(
            "The pipeline's denoiser carries LoRA adapters already. Call `pipeline.fuse_lora()` and "
            "`pipeline.unload_lora_weights()` to train on top of them, or only the latter to train without them."
        )


def training_schedule(scheduler) -> tuple[torch.Tensor, str]:
    scheduler = DDPMScheduler.from_config(scheduler.config)
    return scheduler.alphas_cumprod, scheduler.config.prediction_type
