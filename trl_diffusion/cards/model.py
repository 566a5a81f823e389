# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card: facts in, Markdown with metadata out."""

import datetime
from functools import cache
from importlib import resources
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from .facts import RECIPE_NAME, EvaluationFacts, ModelFacts
from .licenses import license_of
from .methods import (
    GROUPED,
    METHODS,
    NO_MASK,
    PAIR_LOSSES,
    PLAIN_DPO,
    SWAPPED,
    SWAPPED_LABELS,
    WITHOUT_EXPERT,
    WITHOUT_REFERENCE,
    citations_of,
)
from .quick_start import WEIGHTS, evaluation_command, export_command, export_path, other_start, quick_start
from .results import eval_results, evaluation_section
from .text import (
    HUB,
    address,
    code_span,
    fenced,
    hub_link,
    is_beside,
    is_hub_id,
    one_line,
    picture,
    plain,
    quoted,
    shortened,
    with_code,
    yaml_text,
)


# As the training scripts of diffusers tag their models
FAMILY_TAGS = {
    "StableDiffusionPipeline": ("stable-diffusion", "stable-diffusion-diffusers"),
    "StableDiffusionXLPipeline": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "StableDiffusion3Pipeline": ("sd3", "sd3-diffusers"),
    "FluxPipeline": ("flux", "flux-diffusers"),
    "Flux2Pipeline": ("flux2", "flux2-diffusers"),
    "Flux2KleinPipeline": ("flux2-klein", "flux2-diffusers"),
    "ZImagePipeline": ("z-image", "z-image-diffusers"),
    "QwenImagePipeline": ("qwen-image", "qwen-image-diffusers"),
    "Krea2Pipeline": ("krea-2", "krea-2-diffusers"),
    "SanaPipeline": ("sana", "sana-diffusers"),
}
SHOWN_BY_TEASER = 3  # prompts
# The trackers' names, and the badges of TRL's cards
BADGES = {
    "wandb": (
        "Weights & Biases",
        "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg",
    ),
    "trackio": (
        "Trackio",
        "https://raw.githubusercontent.com/gradio-app/trackio/refs/heads/main/trackio/assets/badge.png",
    ),
    "comet": (
        "Comet",
        "https://raw.githubusercontent.com/comet-ml/comet-examples/master/logo/comet_badge.png",
    ),
}


def model_card(facts: ModelFacts, evaluation: EvaluationFacts | None = None) -> ModelCard:
    """
    Renders the card of a model: what it is, how to sample with it, how it was trained, what was measured.

    Args:
        facts ([`cards.facts.ModelFacts`]):
            The facts of the training.
        evaluation ([`cards.facts.EvaluationFacts`], *optional*):
            Those of an evaluation.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    samples = [sample for sample in facts.samples if is_beside(sample.image) and is_beside(sample.base_image)]
    teaser = picture(facts.teaser, "Images by the base and by this model from the same noise")
    body = _template().render(
        facts=facts,
        title=plain(facts.name) or "model",
        has_samples=bool(samples),
        samples=samples if teaser is None or len(samples) > SHOWN_BY_TEASER else [],
        teaser=teaser,
        curves=picture(facts.curves, "What was logged over the steps of the training"),
        masks=picture(facts.masks, "Masks over images of the data"),
        method_text=_method_text(facts),
        arm=_arm(facts),
        base_commit=_commit(facts.base, facts.base_revision),
        data_commit=_commit(f"datasets/{facts.data.name}", facts.data.revision),
        quick_start=quick_start(facts),
        other_start=other_start(facts),
        weights=WEIGHTS,
        export_command=export_command(facts),
        export_path=export_path(facts),
        badges=_badges(facts.trackers),
        beta_is_of_velocity=facts.is_flow and "beta" in facts.hyperparameters,
        duration=None if facts.seconds is None else str(datetime.timedelta(seconds=round(facts.seconds))),
        recipe=yaml_text(facts.recipe) if facts.recipe else None,
        recipe_name=RECIPE_NAME,
        missing=_missing_flags(facts),
        last_logs={name: f"{value:.4g}" for name, value in facts.last_logs.items()},
        evaluation=evaluation_section(evaluation, facts).strip() if evaluation else None,
        evaluation_command=evaluation_command(facts),
        license=license_of(facts.base),
        has_wild_prompts="pickapic" in (facts.data.name or "").lower().replace("-", "").replace("_", ""),
        citations=citations_of(
            facts.trainer, facts.paper.get("citation", ""), facts.is_reversed, facts.hyperparameters
        ),
    )
    return ModelCard(f"---\n{card_data(facts, evaluation).to_yaml()}\n---\n\n{body}")


@cache
def _template() -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "line": one_line,
        "code": code_span,
        "with_code": with_code,
        "cell": lambda value: one_line(shortened(value, 500)),
        "short": lambda value: one_line(shortened(value)),
        "link": hub_link,
        "dataset_link": lambda name: hub_link(name, "dataset"),
        "fenced": fenced,
        "quoted": quoted,
    }
    source = resources.files("trl_diffusion").joinpath("templates/model_card.md")
    return environment.from_string(source.read_text(encoding="utf-8"))


def card_data(facts: ModelFacts, evaluation: EvaluationFacts | None = None) -> ModelCardData:
    """
    The metadata of a card.

    Args:
        facts ([`cards.facts.ModelFacts`]):
            The facts of the training.
        evaluation ([`cards.facts.EvaluationFacts`], *optional*):
            Those of an evaluation.

    Returns:
        [`~huggingface_hub.ModelCardData`]
    """
    # A LoRA on a base that was changed would draw other images on the base of that name
    has_base = is_hub_id(facts.base) and not (facts.is_lora and facts.base_changes)
    # The first one is the one that the Hub's widget draws with
    bases = [facts.base, *([facts.initial_lora] if is_hub_id(facts.initial_lora) else [])] if has_base else []
    name, license = plain(facts.name) or "model", license_of(facts.base)
    widget = [
        {"text": plain(sample.prompt), "output": {"url": sample.image}}
        for sample in facts.samples
        if is_beside(sample.image)
    ]
    return ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=("adapter" if facts.is_lora else "finetune") if bases else None,
        datasets=[facts.data.name] if is_hub_id(facts.data.name) else None,
        eval_results=(eval_results(evaluation, name) or None) if evaluation else None,
        language="en",
        library_name="diffusers",
        license=license.id if license else None,
        license_name=license.name if license else None,
        license_link=license.link if license else None,
        model_name=name,
        pipeline_tag="text-to-image",
        tags=_tags(facts),
        widget=widget or None,
    )


def _tags(facts: ModelFacts) -> list[str]:
    family = FAMILY_TAGS.get(facts.pipeline_class, ())
    lora = "template:sd-lora" if facts.pipeline_class.startswith("StableDiffusion") else "template:diffusion-lora"
    own = map(plain, facts.tags)
    common = ("diffusers", "diffusers-training", "text-to-image", "trl-diffusion")
    return sorted({*common, *family, *(("lora", lora) if facts.is_lora else ()), *own} - {""})


def _method_text(facts: ModelFacts) -> str:
    """The two sentences on the method, and what this training makes of it."""
    if facts.trainer not in METHODS:
        return ""
    description = WITHOUT_EXPERT.get(facts.hyperparameters.get("target_prompts"), METHODS[facts.trainer].description)
    if facts.hyperparameters.get("loss_type") == "mapo":
        description = WITHOUT_REFERENCE
    swapped = SWAPPED_LABELS if facts.trainer == "DiffusionKTOTrainer" else SWAPPED
    return " ".join([description, *_of_pairs(facts), *([swapped] if facts.is_reversed else [])])


def _of_pairs(facts: ModelFacts) -> list[str]:
    """What the settings of a training on pairs make of IAPO."""
    if facts.trainer != "InstanceDPOTrainer":
        return []
    loss = PAIR_LOSSES.get(facts.hyperparameters.get("loss_type"))
    if facts.hyperparameters.get("grouped_instances"):
        mask = [GROUPED]
    elif facts.hyperparameters.get("w_neg") == 1:
        mask = [f"{NO_MASK}." if loss else PLAIN_DPO]
    else:
        mask = []
    return [*([f"The two images are compared by the loss of {loss}."] if loss else []), *mask]


def _arm(facts: ModelFacts) -> str | None:
    """What to compare the model with, besides its base; what draws only where guidance subtracts has no arm."""
    is_arm = facts.trainer == "InstanceDPOTrainer" and facts.hyperparameters.get("w_neg") == 1
    if facts.trainer not in METHODS or facts.is_reversed or is_arm:
        return None
    arm, has_another_loss = METHODS[facts.trainer].arm, facts.hyperparameters.get("loss_type") in PAIR_LOSSES
    return arm.partition(",")[0] if has_another_loss else arm


def _missing_flags(facts: ModelFacts) -> str:
    """The flags that the command needs besides the recipe, where a model or data are not published."""
    needed = {
        "model_name_or_path": facts.base is None,
        "dataset_name": "dataset_name" not in facts.recipe,
        "expert": facts.expert is not None and "expert" not in facts.recipe,
    }
    return " and ".join(f"`--{name}`" for name, is_missing in needed.items() if is_missing)


def _commit(repository: str | None, revision: str | None) -> str | None:
    """A commit of a repository as a link, or a revision that is none as it is."""
    if not revision:
        return None
    if repository and is_hub_id(repository.removeprefix("datasets/")) and revision.isalnum():
        return f"[`{revision[:10]}`]({HUB}/{repository}/tree/{revision})"
    return code_span(shortened(revision, 60))


def _badges(trackers: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"title": title, "image": image, "url": url}
        for name, (title, image) in BADGES.items()
        if name in trackers and (url := address(trackers[name]))
    ]
