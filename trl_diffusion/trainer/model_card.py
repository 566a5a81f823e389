# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a model card says of a training, and the files of a card in the output directory."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftModel
from transformers import CLIPTokenizer, PreTrainedModel
from trl.trainer.base_trainer import _BaseTrainer

from ..backbones import Backbone, backbone_class_of
from ..backbones.quantization import describe_quantization
from ..backbones.source import read_index
from ..cards.facts import (
    EVALUATION_NAME,
    FACTS_NAME,
    RECIPE_NAME,
    ModelFacts,
    read_evaluation_facts,
    write_facts,
)
from ..cards.methods import METHODS
from ..cards.model import model_card
from ..cards.text import HUB, is_hub_id, yaml_text
from ..files import write_file
from ..hub import hub_id
from ..lora_export import NOT_EXPORTED
from ..sampling import default_guidance
from .card_pictures import write_card_pictures
from .diffusion_config import DENSITY_SETTINGS, DiffusionConfig
from .provenance import command_line, data_facts, hardware, recipe_of, tracker_urls, training_seconds
from .run_record import NO_MATTER


PACKAGES = ("trl-diffusion", "trl", "diffusers", "transformers", "peft", "torch", "datasets", "tokenizers")
NOT_PUBLISHED = "not published"
# Of a repository in the Hub's cache, and of a file in it
SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)(?:[/\\](.+))?$")


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


def write_model_card(
    trainer: _BaseTrainer, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> None:
    """
    Writes the card of a training into its output directory, with what belongs to it: `README.md`, the facts (`training.json`), the
    recipe (`training.yaml`) and pictures. An evaluation that lies there (`evaluation.json`) is in the card.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        model_name (`str` or `None`):
            Name of the model, by default that of its repository or output directory.
        dataset_name (`str` or `None`):
            Hub id of the dataset.
        tags (`str`, `list[str]` or `None`):
            Further tags.
    """
    folder = Path(trainer.args.output_dir)
    facts = model_facts(trainer, model_name, dataset_name, [tags] if isinstance(tags, str) else tags or [])
    evaluation = folder / EVALUATION_NAME
    card = model_card(facts, read_evaluation_facts(evaluation) if evaluation.exists() else None)
    write_facts(facts, folder / FACTS_NAME)
    write_file(folder / RECIPE_NAME, yaml_text(facts.recipe).encode())
    write_file(folder / "README.md", str(card).encode())


def model_facts(
    trainer: _BaseTrainer, model_name: str | None, dataset_name: str | None, tags: list[str]
) -> ModelFacts:
    """
    Collects what the card of a training says, and writes its pictures.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        model_name (`str` or `None`):
            Name of the model.
        dataset_name (`str` or `None`):
            Hub id of the dataset.
        tags (`list[str]`):
            Further tags.

    Returns:
        [`cards.facts.ModelFacts`]
    """
    args, backbone, method, logs = trainer.args, trainer.backbone, trainer.method, trainer.state.log_history
    pipeline, family, policy = backbone.pipeline, backbone_class_of(backbone.pipeline), trainer.policy
    is_lora = isinstance(policy, PeftModel)
    is_reversed = getattr(args, "reverse_preference", False)
    lora = policy.peft_config["default"] if is_lora else None
    named = named_base(backbone)
    base = named["base"]
    data = data_facts(trainer.rows, dataset_name)
    trainer_name = type(trainer).__name__
    script = METHODS[trainer_name].script if trainer_name in METHODS else ""
    vae = _given_vae(args)
    pictures = write_card_pictures(args.output_dir, logs, trainer.state.global_step)
    model_id = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
    expert = trainer._card_parameters.get("expert")
    sample_model, sample_arguments = _other_model(trainer) if is_lora else (None, None)
    # A file's own link has the commit
    file = f"{HUB}/{base}/blob/{named['base_revision']}/{named['base_file']}" if named["base_file"] else None
    return ModelFacts(
        name=model_name or model_id.split("/")[-1],
        model_id=model_id,
        trainer=trainer_name,
        method=method.name,
        unit=method.unit,
        tags=[*method.tags, *tags],
        paper=dict(method.paper),
        **named,
        base_changes=changes_of_base(pipeline) if base or named["base_folder"] else [],
        initial_lora=hub_id(args.initial_lora),
        has_initial_lora=args.initial_lora is not None,
        pipeline_class=family.pipeline_class.__name__,
        is_flow=predicts_velocity(family),
        is_lora=is_lora,
        is_exported=is_lora and family.has_comfyui_names and not any(getattr(lora, name) for name in NOT_EXPORTED),
        is_reversed=is_reversed,
        resolution=trainer.resolution,
        loading_arguments=loading_arguments(family, left_out(pipeline)),
        call_arguments=call_arguments(
            *(family, pipeline.config, trainer.resolution, _prompt_settings(trainer)),
            needs_guidance=is_reversed and is_lora,
        ),
        vae=vae if is_lora else None,
        vae_class=pipeline.config["vae"][1],
        vae_subfolder=_vae_subfolder(vae),
        sample_model=sample_model,
        sample_arguments=sample_arguments,
        example_prompt=pictures.samples[0].prompt if pictures.samples else trainer._example_prompt,
        expert=expert,
        data=data,
        samples=pictures.samples,
        teaser=pictures.teaser,
        curves=pictures.curves,
        masks=pictures.masks,
        hyperparameters=_in_json(
            hyperparameters(args, method.unit, trainer.resolution, trainer.state.global_step, lora)
            | _held_in(pipeline)
            | trainer._card_parameters
        ),
        recipe=trainer._recipe_parameters
        | recipe_of(
            *(args, file or base or pipeline.config.get("_name_or_path"), None if file else named["base_revision"]),
            *(is_lora, lora, data),
            None if expert == NOT_PUBLISHED else expert,
        ),
        command=command_line(script) if script else None,
        script=script,
        last_logs=_last_logs(logs),
        trackers=tracker_urls(args.report_to),
        hardware=hardware(args),
        seconds=training_seconds(trainer.state),
        versions={package: version(package) for package in PACKAGES},
    )


def named_base(backbone: Backbone) -> dict[str, str | None]:
    """
    How the base is named to others.

    Args:
        backbone ([`backbones.base.Backbone`]):
            The backbone.

    Returns:
        `dict[str, str | None]`: `base`, `base_revision`, `base_file` and `base_folder` of [`cards.facts.ModelFacts`].
    """
    name = backbone.pipeline.config.get("_name_or_path")
    where = str(name if backbone.source is None else backbone.source.folder)
    cached = SNAPSHOT.search(where.rstrip("/\\"))
    base = hub_id(name) or (cached[1].replace("--", "/", 1) if cached else None)
    if is_hub_id(base):
        revision, file = (cached[2], cached[3]) if cached else (None, None)
        return {"base": base, "base_revision": revision, "base_file": file, "base_folder": None}
    folder = Path(name).absolute().name if name else None
    return {"base": None, "base_revision": None, "base_file": None, "base_folder": folder}


def predicts_velocity(family: type[Backbone]) -> bool:
    """Whether a family is one of flow transformers, whatever it is sampled with."""
    return family.denoiser_name == "transformer"


def left_out(pipeline: DiffusionPipeline) -> list[str]:
    """Text encoders and tokenizers that a pipeline is without."""
    family = backbone_class_of(pipeline)
    names = *family.text_encoder_names, *family.tokenizer_names
    return [name for name in names if getattr(pipeline, name) is None]


def loading_arguments(family: type[Backbone], without: Iterable[str] = ()) -> str:
    """
    How a pipeline is loaded: T5 and flow transformers need the range of bfloat16, and what is not there is not looked for.

    Args:
        family (`type`):
            The backbone's class.
        without (`Iterable[str]`, *optional*):
            Components that the pipeline is without.

    Returns:
        `str`: arguments as Python code.
    """
    dtype = "bfloat16" if predicts_velocity(family) else "float16"
    return ", ".join([f"dtype=torch.{dtype}", *(f"{name}=None" for name in without)])


def call_arguments(
    family: type[Backbone],
    config: Mapping[str, Any],
    resolution: int,
    prompt_settings: Mapping[str, Any],
    needs_guidance: bool = False,
    chosen: Mapping[str, Any] | None = None,
) -> str:
    """
    How a pipeline samples as it was trained.

    Args:
        family (`type`):
            The backbone's class.
        config (`Mapping[str, Any]`):
            The pipeline's configuration, the content of `model_index.json`.
        resolution (`int`):
            Width and height in pixels.
        prompt_settings (`Mapping[str, Any]`):
            Arguments by which prompts are encoded as in the training, see [`backbones.base.Backbone.sampling_settings`].
        needs_guidance (`bool`, *optional*, defaults to `False`):
            Whether it must have an unconditional branch.
        chosen (`Mapping[str, Any]`, *optional*):
            Further arguments.

    Returns:
        `str`: arguments as Python code.
    """
    scale = default_guidance(family.pipeline_class, config)
    guidance = family.true_guidance if needs_guidance else {}
    if scale is not None and len(written := family.guidance_arguments(scale)) > 1:  # a scale alone has no effect
        guidance = written
    arguments = {"height": resolution, "width": resolution, **prompt_settings, **guidance, **(chosen or {})}
    return ", ".join(
        f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in arguments.items()
    )


def _prompt_settings(trainer: _BaseTrainer) -> dict[str, Any]:
    settings = dict(trainer.backbone.sampling_settings)
    if trainer.args.max_sequence_length is None:
        settings.pop("max_sequence_length", None)
    return settings


def _other_model(trainer: _BaseTrainer) -> tuple[str | None, str | None]:
    """The Hub id of the model that drew the samples in place of the base, and the arguments of its call."""
    args, other, family = trainer.args, trainer.samples.other, backbone_class_of(trainer.backbone.pipeline)
    name = hub_id(args.sample_model)
    if other is None or not is_hub_id(name):
        return None, None
    index = read_index(other.source.folder, {})
    defaults = family.sampling_defaults(index)
    steps = args.num_inference_steps or defaults.get("num_inference_steps")
    scale = defaults.get("guidance_scale") if args.guidance_scale is None else args.guidance_scale
    chosen = {"num_inference_steps": steps} if steps else {}
    chosen |= {} if scale is None else family.guidance_arguments(scale)
    return name, call_arguments(family, index, trainer.resolution, _prompt_settings(trainer), chosen=chosen)


def _last_logs(logs: list[dict[str, Any]]) -> dict[str, float]:
    """The last log of the training itself, without what is not finite: the loss, then by name, as a checkpoint has another order."""
    last = next((log for log in reversed(logs) if "loss" in log), {})
    ordered = sorted(last.items(), key=lambda item: (item[0] != "loss", item[0]))
    return {name: float(value) for name, value in ordered if math.isfinite(value)}


def _in_json(value: Any) -> Any:
    """A setting as JSON has it, with the last part of each path of this machine only."""
    if isinstance(value, dict):
        return {str(name): _in_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(each) for each in value]
    if isinstance(value, bool | int | float | None):
        return value
    is_path = str(value).startswith((os.sep, "~", f".{os.sep}", f"..{os.sep}"))
    return Path(str(value)).name if is_path else str(value)


def _vae_subfolder(name: str | None) -> str | None:
    """The folder of a VAE that is that of a pipeline on the Hub."""
    is_pipelines = is_hub_id(name) and isinstance(try_to_load_from_cache(name, "vae/config.json"), str)
    return "vae" if is_pipelines else None


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


def hyperparameters(
    args: DiffusionConfig, unit: str, resolution: int, global_step: int, lora: LoraConfig | None
) -> dict[str, Any]:
    """What somebody needs to repeat a training: the trainer's own parameters, then those of every training."""
    set_on_purpose = ["max_sequence_length", "embedded_guidance", "timestep_range"]
    if args.timestep_density != "uniform":
        set_on_purpose += ["timestep_density", *DENSITY_SETTINGS[args.timestep_density]]
    if args.noise_source == "inversion":
        set_on_purpose += ["inversion_steps", "inversion_model", "inversion_eta"]
    if args.initial_lora is not None:
        set_on_purpose.append("initial_lora_in_reference")
    names = [name for name in type(args).__annotations__ if not name.startswith("_") and name not in NO_MATTER]
    values = {name: getattr(args, name) for name in names}
    # Of a separator, the space at its end matters
    own = {name: repr(x) if isinstance(x, str) and x != x.strip() else x for name, x in values.items()}
    return own | {
        **_lora_settings(lora),
        "learning_rate": args.learning_rate,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "adam betas": [args.adam_beta1, args.adam_beta2],
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.warmup_steps,
        f"{unit} per optimizer step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        f"{unit} at a time on a device": args.per_device_train_batch_size,
        "devices": args.world_size,
        "optimizer steps": global_step,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "resolution": resolution,
        "aspect_ratio_buckets": args.aspect_ratio_buckets,
        "center_crop": args.center_crop,
        "random_flip": args.random_flip,
        "prompt_dropout": args.prompt_dropout,
        "size_conditions": args.size_conditions,
        "noise_source": args.noise_source,
        **({"vae": _given_vae(args)} if _given_vae(args) else {}),
        "seed": args.seed,
        **{name: getattr(args, name) for name in set_on_purpose if getattr(args, name) is not None},
    }


def _lora_settings(lora: LoraConfig | None) -> dict[str, Any]:
    if lora is None:
        return {}
    targets = lora.target_modules
    return {
        "LoRA rank": lora.r,
        "LoRA alpha": lora.lora_alpha,
        "LoRA dropout": lora.lora_dropout,
        "LoRA modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        **{name: True for name in ("use_rslora", "use_dora") if getattr(lora, name)},
    }
