# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card."""

import json
import os
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCard, ModelCardData
from transformers import CLIPTokenizer, PreTrainedModel

from ..backbones import backbone_class_of
from ..backbones.quantization import describe_quantization
from ..hub import hub_id
from ..sampling import default_guidance
from .diffusion_config import DENSITY_SETTINGS, DiffusionConfig


class Method(NamedTuple):
    """
    What a card says of a training method.

    Attributes:
        name (`str`):
            Its name.
        unit (`str`):
            What a row is, such as `"pairs"`.
        tags (`tuple[str, ...]`):
            Tags on the Hub.
        paper (`dict[str, str]`):
            Its paper: `title`, `citation`, and where there is one `id` (arXiv) or `venue`.
    """

    name: str
    unit: str
    tags: tuple[str, ...]
    paper: dict[str, str]


def diffusion_model_card(
    method: Method,
    args: DiffusionConfig,
    pipeline: DiffusionPipeline,
    *,
    is_lora: bool,
    resolution: int,
    sampling_settings: dict[str, Any],
    global_step: int,
    example_prompt: str,
    further: dict[str, object],
    model_name: str | None,
    model_id: str | None,
    dataset_name: str | None,
    tags: list[str],
) -> ModelCard:
    """
    Writes the card of a trained model: what it is, how to sample with it, how it was trained.

    Args:
        method ([`trainer.model_card.Method`]):
            The method.
        args ([`DiffusionConfig`]):
            The configuration.
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline that was trained.
        is_lora (`bool`):
            Whether a LoRA was trained.
        resolution (`int`):
            Width and height in pixels of the training images.
        sampling_settings (`dict[str, Any]`):
            See [`backbones.base.Backbone.sampling_settings`].
        global_step (`int`):
            Number of optimizer steps.
        example_prompt (`str`):
            Prompt of the quick start.
        further (`dict[str, object]`):
            Parameters that are not in `args`, or that the card states in another way.
        model_name (`str` or `None`):
            Name of the model, by default that of its repository or output directory.
        model_id (`str` or `None`):
            Hub id of the model.
        dataset_name (`str` or `None`):
            Hub id of the dataset.
        tags (`list[str]`):
            Further tags.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    model_name = model_name or (args.hub_model_id or Path(args.output_dir).absolute().name).split("/")[-1]
    base_name = hub_id(pipeline.config.get("_name_or_path"))
    changes = changes_of_base(pipeline) if base_name else []
    # A LoRA on a base that was changed would draw other images on the base of that name
    base_model = None if is_lora and changes else base_name
    is_reversed = getattr(args, "reverse_preference", False)
    is_flow = "transformer" in pipeline.components  # whatever it is sampled with
    dataset_name = hub_id(dataset_name)
    card_data = ModelCardData(
        base_model=base_model,
        base_model_relation=("adapter" if is_lora else "finetune") if base_model else None,
        datasets=[dataset_name] if dataset_name else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        model_name=model_name,
        tags=sorted({"diffusers", *(["lora"] if is_lora else []), *method.tags, *tags}),
    )
    return ModelCard.from_template(
        card_data,
        template_str=resources.files("trl_diffusion").joinpath("templates/model_card.md").read_text(),
        model_name=model_name,
        model_id=model_id or model_name,
        base_model=base_name,
        base_changes=" and ".join(changes),
        has_initial_lora=args.initial_lora is not None,
        initial_lora=hub_id(args.initial_lora),
        dataset_name=dataset_name,
        is_lora=is_lora,
        is_exported=is_lora and backbone_class_of(pipeline).has_comfyui_names,
        is_reversed=is_reversed,
        example_prompt=example_prompt,
        method=method.name,
        paper=method.paper,
        hyperparameters=_hyperparameters(args, method.unit, resolution, global_step) | _held_in(pipeline) | further,
        beta_is_of_velocity=is_flow and hasattr(args, "beta"),
        loading_arguments=_loading_arguments(pipeline, is_flow),
        vae=_given_vae(args) if is_lora else None,
        vae_class=pipeline.config["vae"][1],
        call_arguments=_call_arguments(
            *(args, pipeline, resolution, sampling_settings), needs_guidance=is_reversed and is_lora
        ),
        versions={
            package: version(package)
            for package in ("trl-diffusion", "trl", "diffusers", "transformers", "peft", "torch", "datasets")
        },
    )


def _given_vae(args: DiffusionConfig) -> str | None:
    """The VAE that `model_init_kwargs` names in place of the pipeline's."""
    name = (args.model_init_kwargs or {}).get("vae")
    return (hub_id(str(name)) or "another VAE") if isinstance(name, str | os.PathLike) else None


def _held_in(pipeline: DiffusionPipeline) -> dict[str, str]:
    """How the denoiser's frozen weights were quantised, if they were."""
    name = backbone_class_of(pipeline).denoiser_name
    how = describe_quantization(getattr(pipeline, name))
    return {f"`{name}` while training": f"held in {how}"} if how else {}


def changes_of_base(pipeline: DiffusionPipeline) -> list[str]:
    """
    What was done to a pipeline after it was loaded, so that its name alone does not say what it is. Weights that were changed by
    hand cannot be told.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.

    Returns:
        `list[str]`: such as `"a LoRA fused into it"`.
    """
    backbone, number = backbone_class_of(pipeline), pipeline.num_fused_loras
    changes = []
    if number:
        changes.append("a LoRA fused into it" if number == 1 else f"{number} LoRAs fused into it")
    origin = _origin(getattr(pipeline, backbone.denoiser_name))
    others = [_origin(getattr(pipeline, name)) for name in ("vae", *backbone.text_encoder_names)]
    folders = {os.path.dirname(other) for other in others if other}
    if folders and os.path.dirname(origin or "") not in folders:
        changes.append(f"another {backbone.denoiser_name}")
    tokenizers = [getattr(pipeline, name) for name in backbone.tokenizer_names]
    if any(isinstance(each, CLIPTokenizer) and len(each) > each.vocab_size for each in tokenizers):
        changes.append("textual inversions loaded into it")
    return changes


def _origin(module: torch.nn.Module | None) -> str | None:
    """Where a component was loaded from; those of one pipeline lie in one folder."""
    if isinstance(module, ModelMixin):
        return module.config.get("_name_or_path")
    return module.config._name_or_path if isinstance(module, PreTrainedModel) else None


def _loading_arguments(pipeline: DiffusionPipeline, is_flow: bool) -> str:
    """How the pipeline is loaded: T5 and flow transformers need the range of bfloat16, and what is not there is not looked for."""
    backbone = backbone_class_of(pipeline)
    names = *backbone.text_encoder_names, *backbone.tokenizer_names
    left_out = [f"{name}=None" for name in names if getattr(pipeline, name) is None]
    return ", ".join([f"dtype=torch.{'bfloat16' if is_flow else 'float16'}", *left_out])


def _call_arguments(
    args: DiffusionConfig,
    pipeline: DiffusionPipeline,
    resolution: int,
    sampling_settings: dict[str, Any],
    needs_guidance: bool,
) -> str:
    """How the pipeline samples as it was trained; `needs_guidance` is whether it must have an unconditional branch."""
    family, scale = backbone_class_of(pipeline), default_guidance(type(pipeline), pipeline.config)
    guidance = family.true_guidance if needs_guidance else {}
    if scale is not None and len(written := family.guidance_arguments(scale)) > 1:  # a scale alone has no effect
        guidance = written
    arguments = {"height": resolution, "width": resolution} | sampling_settings | guidance
    if args.max_sequence_length is None:
        arguments.pop("max_sequence_length", None)
    return ", ".join(
        f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in arguments.items()
    )


def _hyperparameters(args: DiffusionConfig, unit: str, resolution: int, global_step: int) -> dict[str, object]:
    """What somebody needs to repeat a training: the trainer's own parameters, then those of every training."""
    set_on_purpose = ["max_sequence_length", "embedded_guidance"]
    if args.timestep_density != "uniform":
        set_on_purpose += ["timestep_density", *DENSITY_SETTINGS[args.timestep_density]]
    own = {name: getattr(args, name) for name in type(args).__annotations__ if not name.startswith("_")}
    return own | {
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
        "size_conditions": args.size_conditions,
        "noise_source": args.noise_source,
        **({"vae": _given_vae(args)} if _given_vae(args) else {}),
        "seed": args.seed,
        **{name: getattr(args, name) for name in set_on_purpose if getattr(args, name) is not None},
    }
