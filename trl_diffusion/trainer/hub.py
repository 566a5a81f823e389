# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card."""

import os
from importlib import resources
from importlib.metadata import version
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel


if TYPE_CHECKING:
    from .diffusion_trainer import DiffusionTrainer


def diffusion_model_card(
    trainer: "DiffusionTrainer", model_name: str, dataset_name: str | None, tags: list[str]
) -> ModelCard:
    """
    Writes the card of a trained model: what it is, how to draw with it, how it was trained.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        model_name (`str`):
            Name of the model.
        dataset_name (`str` or `None`):
            Hub id of the dataset.
        tags (`list[str]`):
            Further tags.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    pipeline = trainer.backbone.pipeline
    base_model = hub_id(pipeline.config.get("_name_or_path"))
    dataset_name = hub_id(dataset_name)
    is_lora = isinstance(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False), PeftModel)
    card_data = ModelCardData(
        base_model=base_model,
        base_model_relation=("adapter" if is_lora else "finetune") if base_model else None,
        datasets=[dataset_name] if dataset_name else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        model_name=model_name,
        tags=sorted({"diffusers", *trainer._tag_names, *(["lora"] if is_lora else []), *tags}),
    )
    return ModelCard.from_template(
        card_data,
        template_str=resources.files("trl_diffusion").joinpath("templates/model_card.md").read_text(),
        model_name=model_name,
        model_id=trainer.hub_model_id or model_name,
        base_model=base_model,
        dataset_name=dataset_name,
        is_lora=is_lora,
        is_reversed=getattr(trainer.args, "reverse_preference", False),
        example_prompt=trainer._example_prompt,
        method=trainer._name,
        paper=trainer._paper,
        hyperparameters=_hyperparameters(trainer),
        resolution=trainer.resolution,
        global_step=trainer.state.global_step,
        versions={
            package: version(package)
            for package in ("trl-diffusion", "trl", "diffusers", "transformers", "peft", "torch", "datasets")
        },
    )


def hub_id(name: str | None) -> str | None:
    """The name, unless it is a folder of this machine, which means nothing to anybody else."""
    return name if name and not os.path.isdir(name) else None


def _hyperparameters(trainer: "DiffusionTrainer") -> dict[str, object]:
    """What somebody needs to repeat the training: the trainer's own parameters, then the optimizer's."""
    args = trainer.args
    own = {name: getattr(args, name) for name in type(args).__annotations__ if not name.startswith("_")}
    return (
        own
        | trainer._card_parameters
        | {
            "learning_rate": args.learning_rate,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warmup_steps": args.warmup_steps,
            f"{trainer._unit} per optimizer step": args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            "optimizer steps": trainer.state.global_step,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "resolution": trainer.resolution,
            "aspect_ratio_buckets": args.aspect_ratio_buckets,
            "prompt_dropout": args.prompt_dropout,
            "seed": args.seed,
        }
    )
