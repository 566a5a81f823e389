# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Common code of both stages of complex preference optimisation: prompts with attributes, and the expert."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel

from ..backbones.base import Backbone
from ..backbones.folder_checks import read_json
from ..backbones.quantization import describe_quantization
from ..criteria import Criteria, render_prompt
from .attribute_sft_config import AttributeSFTConfig
from .complex_po_config import ComplexPOConfig
from .diffusion_config import DiffusionConfig
from .fingerprints import same_base, same_quantized_base
from .lora import check_lora_config, check_mixes, load_lora_into, read_lora


logger = get_logger(__name__)

DEFAULT_PEFT_CONFIG = LoraConfig(r=64, lora_alpha=64)
EXPERT_FILE_NAME = "attribute_expert.json"
DESCRIBED = ("criteria", "attribute_order", "attribute_separator")


def without_default(peft_config: LoraConfig | None, args: DiffusionConfig) -> LoraConfig | None:
    """The settings, `None` where the user left them out and the training starts at a LoRA that has its own."""
    return None if peft_config is DEFAULT_PEFT_CONFIG and args.initial_lora is not None else peft_config


class AttributePrompts:
    """
    Joins prompts with attributes according to `args`, and logs a warning if they do not all fit into the text encoders.

    Args:
        criteria ([`Criteria`]):
            The criteria tree.
        args ([`AttributeSFTConfig`] or [`ComplexPOConfig`]):
            `attribute_order`, `attribute_separator` and `max_attributes` are used.
        backbone ([`backbones.base.Backbone`]):
            Checks which prompts fit into the text encoders.
    """

    def __init__(self, criteria: Criteria, args: AttributeSFTConfig | ComplexPOConfig, backbone: Backbone):
        self.criteria = criteria
        self.args = args
        self.backbone = backbone
        self.places = {attribute.id: place for place, attribute in enumerate(criteria.attributes)}
        self.warned = False

    @property
    def settings(self) -> tuple:
        """What the prompts depend on besides the rows and the tokenizers."""
        args = self.args
        words = attribute_words(self.criteria)
        dimensions = [attribute.dimension for attribute in self.criteria.attributes]
        return args.attribute_order, args.attribute_separator, args.max_attributes, words, dimensions

    def __call__(self, prompt: str | None, positive: list[str], negative: list[str]) -> tuple[str | None, int]:
        """
        Args:
            prompt (`str` or `None`):
                The prompt; `None` is the unconditional branch, which is returned if there are no attributes.
            positive (`list[str]`):
                Ids of the attributes in positive form.
            negative (`list[str]`):
                Ids of the attributes in negative form.

        Returns:
            `tuple[str, int]`: the prompt with attributes, and the number of attributes that were left out.
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
                f"The attributes of a row do not all fit into the text encoders: of {len(forms)}, {left_out} are left out of "
                f"{text!r}. The others are spread over the dimensions of the criteria. `attributes/left_out` in the logs is the "
                "average number per row. This warning is only logged once."
            )
        return text, left_out


# ----- the expert -----


def attribute_words(criteria: Criteria) -> dict[str, list[str]]:
    """The positive and the negative form of each attribute, by its id."""
    return {leaf.id: [leaf.positive, leaf.negative] for leaf in criteria.attributes}


def describe_expert(
    model: torch.nn.Module, base: list[float], criteria: Criteria, args: AttributeSFTConfig | ComplexPOConfig
) -> dict[str, Any]:
    """
    Describes the training data of an expert and the form of its prompts. The description is saved with the weights.

    Args:
        model (`torch.nn.Module`):
            The denoiser, whose base is described.
        base (`list[float]`):
            [`trainer.fingerprints.base_fingerprint`] of it, before the training.
        criteria ([`Criteria`]):
            The criteria tree.
        args ([`AttributeSFTConfig`] or [`ComplexPOConfig`]):
            `attribute_order` and `attribute_separator` are used.

    Returns:
        `dict[str, Any]`
    """
    quantization = describe_quantization(model)
    return {
        "criteria": criteria.name,
        "attributes": attribute_words(criteria),
        "attribute_order": args.attribute_order,
        "attribute_separator": args.attribute_separator,
        "base_fingerprint": base,
        **({} if quantization is None else {"base_quantization": quantization}),
    }


def read_expert(expert: str | Path) -> tuple[dict, LoraConfig, dict | None]:
    """
    Reads an expert.

    Args:
        expert (`str` or `Path`):
            A folder or a Hub id.

    Returns:
        `tuple[dict, LoraConfig, dict | None]`: weights and configuration of its LoRA, and its description from
        [`trainer.attributes.describe_expert`], or `None` for a LoRA of another library.

    Raises:
        `ValueError`: If it is not a valid LoRA.
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
    return weights, config, _read_description(path) if path.exists() else None


def _read_description(path: Path) -> dict[str, Any]:
    """What an expert says of itself, each part of it of its kind."""
    described = read_json(path)
    attributes = described.get("attributes")
    is_right = isinstance(attributes, dict) and all(isinstance(described.get(key), str) for key in DESCRIBED)
    is_right = is_right and all(isinstance(words, list) for words in attributes.values())
    numbers = described.get("base_fingerprint")
    if not is_right or not (isinstance(numbers, list) and all(isinstance(number, int | float) for number in numbers)):
        raise ValueError(
            f"`expert` cannot be read: {path} does not describe an expert. Train it again, or remove the file."
        )
    return described


def check_expert(described: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """
    Checks that an expert fits the training that uses it.

    Args:
        described (`dict` or `None`):
            Description of the expert, see [`trainer.attributes.describe_expert`].
        wanted (`dict`):
            The same for the trainer that uses it.

    Raises:
        `ValueError`: If it was trained on other criteria, on another base, or with prompts of another form.
    """
    if described is None:
        logger.warning(
            f"`expert` comes without {EXPERT_FILE_NAME}, so its base and its criteria cannot be compared with those of this "
            "training."
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
            f"{ours[reworded[0]]} in `criteria`. Use the tree of its training."
        )
    for name in ("attribute_order", "attribute_separator"):
        if described[name] != wanted[name]:
            raise ValueError(
                f"`expert` was trained with `{name}={described[name]!r}`, and would not understand prompts with "
                f"`{name}={wanted[name]!r}`. Use the setting of the expert."
            )
    then, now = described.get("base_quantization"), wanted.get("base_quantization")
    is_same = same_base if then == now else same_quantized_base
    if then != now:
        logger.warning(
            f"`expert` was trained on a base in {then or 'full precision'}, and `model` is held in {now or 'full precision'}: its "
            "predictions are slightly others than they were in its training."
        )
    if not is_same(described["base_fingerprint"], wanted["base_fingerprint"]):
        raise ValueError(
            "`expert` was trained on another base than `model`. A LoRA only works on the weights that it was trained on: pass "
            "the base of the expert as `model`, or train the expert again on this one."
        )


def add_expert(model: PeftModel, weights: dict[str, torch.Tensor], config: LoraConfig) -> None:
    """
    Adds an expert to a model as its frozen adapter `"expert"`.

    Args:
        model ([`~peft.PeftModel`]):
            The policy. Its own adapter stays active.
        weights (`dict[str, torch.Tensor]`):
            The LoRA of the expert.
        config ([`~peft.LoraConfig`]):
            The configuration of this LoRA.

    Raises:
        `ValueError`: If the LoRA does not fit the model.
    """
    check_mixes(config, "`expert`")
    check_mixes(model.peft_config["default"], "`peft_config`")
    config = check_lora_config(config, model, "`expert`", loaded=True)
    try:
        model.add_adapter("expert", config)
        load_lora_into(model, weights, "`expert`", "expert")
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"`expert` was trained on another base than `model`, and does not fit it: {error}") from error
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if ".expert." in name:
            parameter.requires_grad_(False)
