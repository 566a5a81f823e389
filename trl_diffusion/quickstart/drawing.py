# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What both halves of the quickstart draw with."""

from importlib import resources

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..sampling import sample_images


SAMPLING = {"num_inference_steps": 10, "guidance_scale": 2.0, "batch_size": 256}
# Trainings of half a minute: no checkpoints, no trackers, nothing that pays on large models only
FAST = {
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 20,
    "activation_checkpointing": False,
    "bf16": False,
    "dataloader_pin_memory": False,
}


def shipped(name: str) -> str:
    """Path of a file or folder that comes with the quickstart."""
    return str(resources.files("trl_diffusion").joinpath("quickstart", name))


def load_pipeline(name: str) -> StableDiffusionPipeline:
    """A pipeline that the package carries, see `make_base_pipeline.py`."""
    pipeline = StableDiffusionPipeline.from_pretrained(shipped(name), dtype=torch.float32)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    """The same prompts from the same noise for every model."""
    pipeline.unet.eval()
    return sample_images(pipeline, prompts, seed=seed, **SAMPLING)
