# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The tiny models that come with the quickstart, and the settings that each is trained and sampled with."""

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline


@dataclass(frozen=True)
class TinyModel:
    """
    A kind of model: a pipeline for each world, made by the scripts of `examples/tiny_pipelines`.

    Args:
        pipeline_class (`type`):
            The class of its pipelines.
        title (`str`):
            What it is called in a report.
        denoiser (`str`):
            Name of the component that is trained.
        scenes (`str`), paintings (`str`), expert (`str`):
            Folders of the pipelines of these two worlds, and of the expert on the paintings.
        crowds (`str`, *optional*):
            Folder of the pipeline of the crowds, if there is one.
        pair_training (`dict[str, Any]`), painting_training (`dict[str, Any]`):
            Settings of every training on pairs of scenes, of all weights, and on paintings, of a LoRA.
        pair_beta (`float`), painting_beta (`float`):
            `beta` of those that learn from a preference.
        target_modules (`list[str]`):
            The modules that this LoRA adapts.
        conditions (`dict[str, Any]`):
            How prompts are encoded, in training and in sampling.
    """

    pipeline_class: type[DiffusionPipeline]
    title: str
    denoiser: str
    scenes: str
    paintings: str
    expert: str
    pair_training: dict[str, Any]
    pair_beta: float
    painting_training: dict[str, Any]
    painting_beta: float
    target_modules: list[str]
    conditions: dict[str, Any]
    crowds: str | None = None


SHARED = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "per_device_train_batch_size": 32}
MODELS = {
    "unet": TinyModel(
        pipeline_class=StableDiffusionPipeline,
        title="Stable Diffusion",
        denoiser="unet",
        scenes="base_pipeline",
        paintings="painting_base",
        expert="painting_expert",
        pair_training={"learning_rate": 3e-5, **SHARED},
        pair_beta=2000.0,
        painting_training={"learning_rate": 3e-3, **SHARED},
        painting_beta=100.0,
        # A UNet this small has attention at 4x4 only, so the other layers have to learn too
        target_modules=[
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "time_emb_proj"),
        ],
        conditions={},
        crowds="crowd_pipeline",
    ),
    "flow": TinyModel(
        pipeline_class=StableDiffusion3Pipeline,
        title="Stable Diffusion 3",
        denoiser="transformer",
        scenes="flow_base_pipeline",
        paintings="flow_painting_base",
        expert="flow_painting_expert",
        pair_training={"learning_rate": 5e-5, **SHARED},
        pair_beta=100.0,
        painting_training={"learning_rate": 1e-3, **SHARED},
        painting_beta=5.0,
        target_modules=[
            *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "context_embedder"),
        ],
        conditions={"max_sequence_length": 16},
    ),
}


def model_of(pipeline: DiffusionPipeline) -> TinyModel:
    """The kind of a pipeline that comes with the quickstart."""
    return next(model for model in MODELS.values() if isinstance(pipeline, model.pipeline_class))
