# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The pipelines that come with the quickstart, and how images are generated with them."""

from importlib import resources

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..sampling import sample_images
from .models import model_of


SAMPLING = {"num_inference_steps": 10, "guidance_scale": 2.0, "batch_size": 256}


def shipped(name: str) -> str:
    """Path of a file or folder that comes with the quickstart."""
    return str(resources.files("trl_diffusion").joinpath("quickstart", name))


def load_pipeline(name: str) -> DiffusionPipeline:
    """Loads a pipeline that comes with the quickstart, see `examples/tiny_pipelines`."""
    pipeline = DiffusionPipeline.from_pretrained(shipped(name), dtype=torch.float32)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def generate(pipeline: DiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    """Generates an image for each prompt. The noise depends on the seed and the position only, not on the model."""
    model = model_of(pipeline)
    getattr(pipeline, model.denoiser).eval()
    return sample_images(pipeline, prompts, seed=seed, disable_tqdm=True, **SAMPLING, **model.conditions)
