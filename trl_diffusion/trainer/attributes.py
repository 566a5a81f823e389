# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the two stages of complex preference optimisation share: prompts with attributes, and the expert between them."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from ..backbones.base import Backbone
from ..criteria import Criteria, render_prompt
from .attribute_sft_config import AttributeSFTConfig
from .complex_po_config import ComplexPOConfig
from .lora import read_lora


logger = get_logger(__name__)

DEFAULT_PEFT_CONFIG = LoraConfig(r=64, lora_alpha=64)
EXPERT_FILE_NAME = "attribute_expert.json"
NUM_FINGERPRINTS = 64


class AttributePrompts:
    """
    Joins prompts with attributes as `args` says, and says so where the text encoders cannot take them all.

    Args:
        criteria ([`Criteria`]):
            The tree.
        args ([`AttributeSFTConfig`] or [`ComplexPOConfig`]):
            `attribute_order`, `attribute_separator` and `max_attributes` are read.
        backbone ([`backbones.base.Backbone`]):
            Knows which prompts fit.
    """

    def __init__(self, criteria: Criteria, args: AttributeSFTConfig | ComplexPOConfig, backbone: Backbone):
        self.criteria = criteria
        self.args = args
        self.backbone = backbone
        self.places = {attribute.id: place for place, attribute in enumerate(criteria.attributes)}
        self.warned = False

    def __call__(self, prompt: str | None, positive: list[str], negative: list[str]) -> tuple[str | None, int]:
        """
        Args:
            prompt (`str` or `None`):
                The prompt; `None` is the unconditional branch, which stays where there are no attributes.
            positive (`list[str]`):
                Ids of the attributes to write in their positive form.
            negative (`list[str]`):
                Ids of the attributes to write in their negative form.

        Returns:
            `tuple[str, int]`: the prompt with attributes, and the number of those that it had to leave out.
        """
        args = self.args
        if prompt is None and not positive and not negative:
            return None, 0
        forms = [(name, "positive") for name in positive] + [(name, "negative") for name in negative]
        if args.attribute_order == "tree":
            forms.sort(key=lambda item: self.places[item[0]])
        attributes = [(self.criteria.find(name), form) for name, form in forms]
        text, left_out = render_prompt(
            prompt or "", attributes, args.attribute_separator, args.max_attributes, self.backbone.fits
        )
        asked_to_leave_out = max(0, len(forms) - args.max_attributes) if args.max_attributes is not None else 0
        if left_out > asked_to_leave_out and not self.warned:
            self.warned = True
            logger.warning(
                f"The text encoders do not take all attributes of a row: of {len(forms)}, {left_out} are left out of "
                f"{text!r}. The rest is spread over the dimensions of the criteria. `attributes/left_out` in the logs is "
                "how many a row leaves out on average; this is said once."
            )
        return text, left_out


# ----- the expert -----


def base_fingerprint(denoiser: torch.nn.Module) -> list[float]:
    """
    Some numbers by which to tell one set of base weights from another, whatever precision they are held in.

    Args:
        denoiser (`torch.nn.Module`):
            The base, with or without adapters.

    Returns:
        `list[float]`: single weights from tensors spread over the model.
    """
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight
        for name, weight in denoiser.named_parameters()
        if "lora_" not in name and weight.ndim > 1
    }
    names = sorted(weights)
    names = names[:: max(1, len(names) // NUM_FINGERPRINTS)]
    picked = torch.stack([weights[name].detach().flatten()[weights[name].numel() // 2].float() for name in names])
    return [float(f"{value:.5g}") for value in picked.tolist()]


def describe_expert(
    model: torch.nn.Module, criteria: Criteria, args: AttributeSFTConfig | ComplexPOConfig
) -> dict[str, Any]:
    """
    What an expert was trained on, and which form its prompts have. It is saved beside the expert's weights.

    Args:
        model (`torch.nn.Module`):
            The denoiser, whose base is described.
        criteria ([`Criteria`]):
            The tree.
        args ([`AttributeSFTConfig`] or [`ComplexPOConfig`]):
            `attribute_order` and `attribute_separator` are read.

    Returns:
        `dict[str, Any]`
    """
    return {
        "criteria": criteria.name,
        "attributes": {leaf.id: [leaf.positive, leaf.negative] for leaf in criteria.attributes},
        "attribute_order": args.attribute_order,
        "attribute_separator": args.attribute_separator,
        "base_fingerprint": base_fingerprint(model),
    }


def read_expert(expert: str | Path) -> tuple[dict, LoraConfig, dict | None]:
    """
    Reads an expert.

    Args:
        expert (`str` or `Path`):
            A folder or a Hub id.

    Returns:
        `tuple[dict, LoraConfig, dict | None]`: weights and configuration of its LoRA, and the result of
        [`trainer.attributes.describe_expert`] for it, or `None` for a LoRA that another library trained.

    Raises:
        `ValueError`: If it is not a LoRA.
    """
    try:
        weights, config = read_lora(expert)
    except ValueError as error:
        raise ValueError(f"`expert` cannot be read: {error}") from error
    path = Path(expert) / EXPERT_FILE_NAME
    if not Path(expert).is_dir():
        try:
            path = Path(hf_hub_download(str(expert), EXPERT_FILE_NAME))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return weights, config, None
    return weights, config, json.loads(path.read_text()) if path.exists() else None


def check_expert(described: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """
    Checks that an expert fits the training that asks it.

    Args:
        described (`dict` or `None`):
            What is known of the expert, see [`trainer.attributes.describe_expert`].
        wanted (`dict`):
            The same of the trainer that asks it.

    Raises:
        `ValueError`: If it was trained on other criteria or another base, or reads prompts of another form.
    """
    if described is None:
        logger.warning(
            f"`expert` comes without {EXPERT_FILE_NAME}, so that its base and its criteria cannot be compared to those "
            "of this training."
        )
        return
    theirs, ours = described["attributes"], wanted["attributes"]
    if list(theirs) != list(ours):
        other = sorted(set(theirs) ^ set(ours))
        what = (
            f"only one of them has {', '.join(map(repr, other[:5]))}"
            if other
            else "their attributes are in another order"
        )
        raise ValueError(
            f"`expert` was trained on the criteria {described['criteria']!r}, and `criteria` names another tree, "
            f"{wanted['criteria']!r}: {what}."
        )
    if reworded := [name for name in ours if theirs[name] != ours[name]]:
        raise ValueError(
            f"`expert` was trained on other words: {reworded[0]!r} had the forms {theirs[reworded[0]]}, and has "
            f"{ours[reworded[0]]} in `criteria`. Name the tree that it was trained on."
        )
    for name in ("attribute_order", "attribute_separator"):
        if described[name] != wanted[name]:
            raise ValueError(
                f"`expert` was trained with `{name}={described[name]!r}`, and would not understand prompts with "
                f"`{name}={wanted[name]!r}`. Train with the expert's."
            )
    their_base, base = torch.tensor(described["base_fingerprint"]), torch.tensor(wanted["base_fingerprint"])
    # Half precision changes a weight by 0.4 % at most, a conversion between its kinds by as much again.
    if their_base.shape != base.shape or ((their_base - base).abs() > 0.01 * base.abs() + 1e-6).float().mean() > 0.1:
        raise ValueError(
            "`expert` was trained on another base than `model`. A LoRA means nothing on weights that it was not trained "
            "on: name the expert's base as `model`, or train the expert again on this one."
        )


def add_expert(model: PeftModel, weights: dict[str, torch.Tensor], config: LoraConfig) -> None:
    """
    Adds an expert to a model as its frozen adapter `"expert"`.

    Args:
        model ([`~peft.PeftModel`]):
            The policy; its own adapter stays the active one.
        weights (`dict[str, torch.Tensor]`):
            The expert's LoRA.
        config ([`~peft.LoraConfig`]):
            Its configuration.

    Raises:
        `ValueError`: If the LoRA does not fit the model.
    """
    if config.use_dora:
        raise ValueError(
            "`expert` is a DoRA, which cannot share a batch with other adapters. Train it as a plain LoRA."
        )
    try:
        model.add_adapter("expert", config)
        unexpected = set_peft_model_state_dict(model, weights, adapter_name="expert").unexpected_keys
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"`expert` was trained on another base than `model`, and does not fit it: {error}") from error
    if unexpected or set(weights) != set(get_peft_model_state_dict(model, adapter_name="expert")):
        raise ValueError(
            "`expert` was trained on another base than `model`: its LoRA adapts modules that `model` lacks."
        )
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if ".expert." in name:
            parameter.requires_grad_(False)
