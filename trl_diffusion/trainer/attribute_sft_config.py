# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from .diffusion_config import DiffusionConfig


@dataclass(repr=False)  # it shows no token
class AttributeSFTConfig(DiffusionConfig):
    r"""
    Configuration class for [`AttributeSFTTrainer`].

    This class only contains the parameters that are specific to attribute SFT. See [`DiffusionConfig`] for those of all trainers
    of this library, and [`~transformers.TrainingArguments`] for the others.

    Parameters:
        criteria (`str`, *optional*, defaults to `"painting"`):
            The criteria tree: a YAML file, or the name of a tree that comes with the package.
        attribute_order (`str`, *optional*, defaults to `"tree"`):
            Order of the attributes in a prompt: `"tree"` is that of the criteria tree, `"given"` that of the row, positive
            attributes first.
        attribute_separator (`str`, *optional*, defaults to `", "`):
            Text between prompt and attributes, and between attributes.
        max_attributes (`int`, *optional*):
            Maximum number of attributes in a prompt, spread over the dimensions of the tree. Defaults to as many as fit into
            the text encoders.
        attribute_dropout (`float`, *optional*, defaults to `0.0`):
            Probability of leaving out an attribute, sampled for each attribute in every step. So the expert also learns prompts
            with only some of the attributes, as they are used in the second stage. 1 trains on the prompts alone.

    Raises:
        `ValueError`: If a parameter has a value that it cannot have; the message names the parameter and what it can be.
    """

    criteria: str = field(
        default="painting",
        metadata={"help": "The criteria tree: a YAML file, or the name of a tree that comes with the package."},
    )
    attribute_order: str = field(
        default="tree",
        metadata={
            "help": "Order of the attributes in a prompt: that of the criteria tree, or that of the row.",
            "choices": ["tree", "given"],
        },
    )
    attribute_separator: str = field(
        default=", ", metadata={"help": "Text between prompt and attributes, and between attributes."}
    )
    max_attributes: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of attributes in a prompt. Defaults to as many as fit into the text encoders."
        },
    )
    attribute_dropout: float = field(
        default=0.0, metadata={"help": "Probability of leaving out an attribute, sampled for each in every step."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_attribute_prompts(self)
        if self.precompute_ref_preds:
            raise ValueError(
                "`precompute_ref_preds=True` is not possible here: attribute SFT compares with no reference."
            )
        if not 0 <= self.attribute_dropout <= 1:
            raise ValueError(f"`attribute_dropout` must be between 0 and 1, got {self.attribute_dropout}.")


def check_attribute_prompts(args) -> None:
    """Checks the parameters of both stages of CPO."""
    if args.attribute_order not in ("tree", "given"):
        raise ValueError(f"`attribute_order` must be 'tree' or 'given', got {args.attribute_order!r}.")
    if args.max_attributes is not None and args.max_attributes < 1:
        raise ValueError(f"`max_attributes` must be at least 1, got {args.max_attributes}.")
