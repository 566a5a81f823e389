# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card."""

import os
from importlib import resources
from importlib.metadata import version

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from .diffusion_config import DiffusionConfig


def diffusion_model_card(
    *,
    pipeline: DiffusionPipeline,
    is_lora: bool,
    is_reversed: bool,
    model_name: str,
    model_id: str | None,
    dataset_name: str | None,
    tags: list[str],
    method: str,
    paper: dict[str, str],
    example_prompt: str,
    hyperparameters: dict[str, object],
    resolution: int,
    global_step: int,
) -> ModelCard:
    """
    Writes the card of a trained model: what it is, how to sample with it, how it was trained.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline that was trained.
        is_lora (`bool`):
            Whether a LoRA was trained.
        is_reversed (`bool`):
            Whether the preference was reversed.
        model_name (`str`):
            Name of the model.
        model_id (`str` or `None`):
            Hub id of the model.
        dataset_name (`str` or `None`):
            Hub id of the dataset.
        tags (`list[str]`):
            Tags.
        method (`str`):
            Name of the method.
        paper (`dict[str, str]`):
            Its paper: title, citation, and where there is one `id` (arXiv) or `venue`.
        example_prompt (`str`):
            Prompt of the quick start.
        hyperparameters (`dict[str, object]`):
            What somebody needs to repeat the training, see [`trainer.model_card.hyperparameters_of`].
        resolution (`int`):
            Width and height in pixels of the training images.
        global_step (`int`):
            Number of optimizer steps.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    base_model = hub_id(pipeline.config.get("_name_or_path"))
    dataset_name = hub_id(dataset_name)
    card_data = ModelCardData(
        base_model=base_model,
        base_model_relation=("adapter" if is_lora else "finetune") if base_model else None,
        datasets=[dataset_name] if dataset_name else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        model_name=model_name,
        tags=sorted({"diffusers", *(["lora"] if is_lora else []), *tags}),
    )
    return ModelCard.from_template(
        card_data,
        template_str=resources.files("trl_diffusion").joinpath("templates/model_card.md").read_text(),
        model_name=model_name,
        model_id=model_id or model_name,
        base_model=base_model,
        dataset_name=dataset_name,
        is_lora=is_lora,
        is_reversed=is_reversed,
        example_prompt=example_prompt,
        method=method,
        paper=paper,
        hyperparameters=hyperparameters,
        resolution=resolution,
        global_step=global_step,
        versions={
            package: version(package)
            for package in ("trl-diffusion", "trl", "diffusers", "transformers", "peft", "torch", "datasets")
        },
    )


def hub_id(name: str | None) -> str | None:
    """The name, unless it is a folder of this machine, which means nothing to anybody else."""
    return name if name and not os.path.isdir(name) else None


def hyperparameters_of(
    args: DiffusionConfig, unit: str, resolution: int, global_step: int, further: dict[str, object]
) -> dict[str, object]:
    """
    What somebody needs to repeat a training: the trainer's own parameters, then those of every training.

    Args:
        args ([`DiffusionConfig`]):
            The configuration.
        unit (`str`):
            What a row is, such as `"pairs"`.
        resolution (`int`):
            Width and height in pixels of the training images.
        global_step (`int`):
            Number of optimizer steps.
        further (`dict[str, object]`):
            Parameters that are not in `args`, or that the card states in another way.

    Returns:
        `dict[str, object]`
    """
    own = {name: getattr(args, name) for name in type(args).__annotations__ if not name.startswith("_")}
    shared = {
        "learning_rate": args.learning_rate,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.warmup_steps,
        f"{unit} per optimizer step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "optimizer steps": global_step,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "resolution": resolution,
        "aspect_ratio_buckets": args.aspect_ratio_buckets,
        "prompt_dropout": args.prompt_dropout,
        "seed": args.seed,
    }
    return own | further | shared
