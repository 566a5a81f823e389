# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The arm that an evaluation needs: a model that was trained alike, without what the method adds."""

from typing import Any

from .facts import ModelFacts


W_NEG, SFT = "w_neg=1", "SFT"
IAPO_TRAINER, CPO_TRAINER, SFT_TRAINER = "InstanceDPOTrainer", "ComplexPOTrainer", "AttributeSFTTrainer"
# Settings that do not bear on the weights
NOT_COMPARED = {
    *("output_dir", "run_name", "project", "report_to", "push_to_hub", "resume_from_checkpoint", "precompute_dir"),
    *("disable_tqdm", "use_cpu", "num_inference_steps", "guidance_scale", "torch_compile", "channels_last"),
    *("activation_checkpointing", "gradient_checkpointing", "dataloader_num_workers", "precompute"),
    # What is compared are the rows of an optimizer step
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "devices"),
    *("pairs at a time on a device", "images at a time on a device"),
}
NOT_COMPARED_PREFIXES = ("hub_", "logging_", "log_", "save_", "eval_", "sample_", "trackio_")
# Keys of a recipe that a card says by another name
SAID_AS = {
    **{"lora_r": "LoRA rank", "lora_alpha": "LoRA alpha", "lora_dropout": "LoRA dropout"},
    **{"lora_target_modules": "LoRA modules", "optim": "optimizer", "lr_scheduler_type": "lr_scheduler"},
    **{"adam_beta1": "adam betas", "adam_beta2": "adam betas", "bf16": "precision", "fp16": "precision"},
    **{"model_name_or_path": "base", "model_revision": "base_revision"},
    **{"dataset_name": "dataset", "dataset_train_split": "dataset_split"},
}
# What the arm must differ in: where all weights of a mask are 1, how they are combined has no effect
OF_THE_MASK = {"w_neg", "mask_overlap", "box_margin", "grouped_instances"}


def training_record(facts: ModelFacts) -> dict[str, Any]:
    """
    What an evaluation keeps of a model's training, to compare it with that of another model.

    Args:
        facts ([`cards.facts.ModelFacts`]):
            What was written beside the model.

    Returns:
        `dict[str, Any]`: `trainer` and `method`, `base` by its Hub id or folder, and `settings`, the recipe without names and places
        of output.
    """
    data = facts.data
    settings = {
        **facts.recipe,
        **facts.hyperparameters,
        "base": facts.base or facts.base_folder,
        "base_revision": facts.base_revision,
        "base_changes": facts.base_changes,
        "initial_lora": (facts.initial_lora or "not published") if facts.has_initial_lora else None,
        "dataset": data.name,
        "dataset_config": data.config,
        "dataset_split": data.split,
        "dataset_revision": data.revision,
        "rows": data.num_rows,
    }
    twice = {name for name, other in SAID_AS.items() if settings.get(other) is not None}
    return {
        "trainer": facts.trainer,
        "method": facts.method,
        "base": settings["base"],
        "settings": {
            name: value
            for name, value in settings.items()
            if name not in NOT_COMPARED | twice and not name.startswith(NOT_COMPARED_PREFIXES)
        },
    }


def needed_arm(training: dict[str, Any]) -> str | None:
    """The arm that a model must be seen beside: `"w_neg=1"` for IAPO, `"SFT"` for CPO, `None` for what adds nothing to either."""
    if is_iapo(training):
        return None if is_arm(training, W_NEG) else W_NEG
    return SFT if training["trainer"] == CPO_TRAINER else None


def is_iapo(training: dict[str, Any]) -> bool:
    """Whether a training has a mask, by its trainer or, for a class of the user's own, by its settings."""
    is_another = training["trainer"] in (CPO_TRAINER, SFT_TRAINER)
    return training["trainer"] == IAPO_TRAINER or ("w_neg" in training["settings"] and not is_another)


def is_arm(training: dict[str, Any], kind: str) -> bool:
    """Whether a model was trained as an arm of this kind is."""
    if kind == W_NEG:
        return is_iapo(training) and training["settings"].get("w_neg") == 1
    return training["trainer"] == SFT_TRAINER


def differences(own: dict[str, Any], arm: dict[str, Any], kind: str) -> dict[str, list[Any]]:
    """
    What sets an arm's training apart, besides what makes it the arm.

    Args:
        own (`dict[str, Any]`), arm (`dict[str, Any]`):
            [`cards.arms.training_record`] of the model and of the arm.
        kind (`str`):
            `"w_neg=1"`: all settings but those of the mask are compared. `"SFT"`: those that both trainers have; and an arm whose
            prompts held attributes was not trained on the images alone.

    Returns:
        `dict[str, list[Any]]`: the arm's value and the model's, by name; `None` where one is not known.
    """
    ours, theirs = own["settings"], arm["settings"]
    if kind == W_NEG:
        ours, theirs = ({"trainer": each["trainer"]} | each["settings"] for each in (own, arm))
        names = [name for name in {**ours, **theirs} if name not in OF_THE_MASK]
    else:
        names = [name for name in ours if name in theirs]
    found = {name: [theirs.get(name), ours.get(name)] for name in names if theirs.get(name) != ours.get(name)}
    if kind == SFT and theirs.get("attribute_dropout", 1) != 1:
        found["attribute_dropout"] = [theirs["attribute_dropout"], 1]
    return found
