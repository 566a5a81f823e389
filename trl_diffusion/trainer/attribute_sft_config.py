# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from .diffusion_config import DiffusionConfig


@dataclass
class AttributeSFTConfig(DiffusionConfig):
    r"""
    Configuration class for [`AttributeSFTTrainer`].

    This class includes only the parameters that are specific to attribute SFT. For those that all trainers share see
    [`DiffusionConfig`], and [`~transformers.TrainingArguments`] for the rest.

    Parameters:
        criteria (`str`, *optional*, defaults to `"painting"`):
            The tree of the attributes: a YAML file, or the name of a tree that the package ships.
        attribute_order (`str`, *optional*, defaults to `"tree"`):
            In which order attributes are written into a prompt. `"tree"` is that of the criteria, in which an attribute
            has its usual place among the others; `"given"` is that of the row, positive attributes first.
        attribute_separator (`str`, *optional*, defaults to `", "`):
            What stands between prompt and attributes, and between attributes.
        max_attributes (`int`, *optional*):
            How many attributes are written at most, spread over the dimensions of the criteria. Defaults to as many as
            the text encoders take.
        attribute_dropout (`float`, *optional*, defaults to `0.0`):
            Probability of leaving out an attribute, drawn for each attribute in every step. The expert is asked for some
            attributes at a time: dropout shows it such prompts. 1 trains on the prompts alone.
    """

    criteria: str = field(
        default="painting",
        metadata={"help": "The tree of the attributes: a YAML file, or the name of a tree that the package ships."},
    )
    attribute_order: str = field(
        default="tree",
        metadata={
            "help": "In which order attributes are written into a prompt: that of the criteria, or that of the row.",
            "choices": ["tree", "given"],
        },
    )
    attribute_separator: str = field(
        default=", ", metadata={"help": "What stands between prompt and attributes, and between attributes."}
    )
    max_attributes: int | None = field(
        default=None,
        metadata={"help": "How many attributes are written at most. Defaults to as many as the text encoders take."},
    )
    attribute_dropout: float = field(
        default=0.0, metadata={"help": "Probability of leaving out an attribute, drawn for each in every step."}
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
    """Checks the parameters that both stages of CPO have."""
    if args.attribute_order not in ("tree", "given"):
        raise ValueError(f"`attribute_order` must be 'tree' or 'given', got {args.attribute_order!r}.")
    if args.max_attributes is not None and args.max_attributes < 1:
        raise ValueError(f"`max_attributes` must be at least 1, got {args.max_attributes}.")
