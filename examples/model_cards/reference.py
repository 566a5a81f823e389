# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The cards of the reference recipes, which nobody has trained yet: what the YAML file says, and no figures."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import trl_diffusion
from trl_diffusion.backbones import BACKBONES, Backbone
from trl_diffusion.cards.facts import DataFacts, ModelFacts
from trl_diffusion.scripts.utils import get_peft_config
from trl_diffusion.trainer.complex_po_trainer import OF_ATTRIBUTES
from trl_diffusion.trainer.model_card import call_arguments, hyperparameters, loading_arguments, predicts_velocity


CONFIGS = Path(__file__).parents[1] / "configs"
# The recipe, the class of the trainer, the class of the base's pipeline, and the number of processes that the recipe is for
CARDS = {
    "iapo-sd15": ("iapo_sd15.yaml", "InstanceDPOTrainer", "StableDiffusionPipeline", 8),
    "iapo-sdxl": ("iapo_sdxl.yaml", "InstanceDPOTrainer", "StableDiffusionXLPipeline", 8),
    "painting-expert": ("attribute_sft_sdxl.yaml", "AttributeSFTTrainer", "StableDiffusionXLPipeline", 1),
    "cpo-sdxl": ("cpo_sdxl.yaml", "ComplexPOTrainer", "StableDiffusionXLPipeline", 1),
    "cpo-sdxl-reversed": ("npo_sdxl.yaml", "ComplexPOTrainer", "StableDiffusionXLPipeline", 1),
    "cpo-degraded-sd15": ("cpo_degraded_sd15.yaml", "ComplexPOTrainer", "StableDiffusionPipeline", 1),
    "cpo-flux": ("cpo_flux.yaml", "ComplexPOTrainer", "FluxPipeline", 1),
    "mapo-sdxl": ("mapo_sdxl.yaml", "InstanceDPOTrainer", "StableDiffusionXLPipeline", 1),
    "kto-sd15": ("kto_sd15.yaml", "DiffusionKTOTrainer", "StableDiffusionPipeline", 4),
    "ddspo-sd15": ("ddspo_sd15.yaml", "DDSPOTrainer", "StableDiffusionPipeline", 1),
}


def reference_facts(name: str) -> ModelFacts:
    """
    What a recipe says of a model that is not trained yet.

    Args:
        name (`str`):
            A key of [`CARDS`].

    Returns:
        [`cards.facts.ModelFacts`]: the same on every machine.
    """
    file, trainer_name, pipeline_class, num_processes = CARDS[name]
    trainer_class = getattr(trl_diffusion, trainer_name)
    family = family_of(pipeline_class)
    text = (CONFIGS / file).read_text(encoding="utf-8")
    script, flags = re.search(r"trl-diffusion (\S+) --config \S+ (.*)", text).groups()
    flags = dict(re.findall(r"--(\w+) (\S+)", flags))
    training_args, model_args = parse(script, file, flags)
    lora = get_peft_config(model_args)
    if lora is not None and lora.target_modules is None:
        lora.target_modules = set(family.lora_target_modules)
    resolution, length, unit = training_args.resolution, training_args.max_sequence_length, trainer_class.method.unit
    is_reversed = getattr(training_args, "reverse_preference", False)
    settings = hyperparameters(training_args, unit, resolution, 0, lora)
    if settings.get("target_prompts") == "degraded":
        settings |= dict.fromkeys(OF_ATTRIBUTES, "not used")  # as the trainer says
    return ModelFacts(
        name=name,
        model_id=f"user/{name}",
        trainer=trainer_name,
        method=trainer_class.method.name,
        unit=unit,
        tags=list(trainer_class.method.tags),
        paper=dict(trainer_class.method.paper),
        base=model_args.model_name_or_path,
        pipeline_class=pipeline_class,
        is_flow=predicts_velocity(family),
        is_lora=lora is not None,
        is_exported=lora is not None and family.has_comfyui_names,
        is_reversed=is_reversed,
        resolution=resolution,
        loading_arguments=loading_arguments(family),
        call_arguments=call_arguments(
            *(family, {}, resolution, {"max_sequence_length": length} if length else {}),
            needs_guidance=is_reversed,
        ),
        example_prompt=training_args.sample_prompts[0],
        expert=flags.get("expert"),
        data=DataFacts(name=flags["dataset_name"]),
        hyperparameters=planned(settings, training_args, unit, num_processes),
        recipe=flags | yaml.safe_load(text),
        script=script,
        recipe_file=f"examples/configs/{file}",
    )


def parse(script: str, file: str, flags: dict[str, str]) -> tuple[Any, Any]:
    """The trainer's config and the model's, as the command parses them."""
    module = import_module(f"trl_diffusion.scripts.{script.replace('-', '_')}")
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    parser = module.make_parser()
    _, training_args, model_args = parser.parse_args_and_config(["--config", str(CONFIGS / file), "--use_cpu", *given])
    return training_args, model_args


def planned(settings: dict[str, Any], args: Any, unit: str, num_processes: int) -> dict[str, Any]:
    """Settings with what the machine decides, and without what only a training knows."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    steps = (
        args.max_steps
        if args.max_steps > 0
        else f"{args.num_train_epochs:g} epoch{'s' if args.num_train_epochs > 1 else ''}"
    )
    known = {f"{unit} per optimizer step": rows, "devices": num_processes, "optimizer steps": steps}
    return settings | known | {"precision": "bf16 where the GPU has it, else fp32"}


def family_of(pipeline_class: str) -> type[Backbone]:
    """The backbone's class, by the name of its pipeline's class."""
    return next(family for family in BACKBONES if family.pipeline_class.__name__ == pipeline_class)
