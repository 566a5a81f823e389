# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from .attribute_sft_config import check_attribute_prompts
from .diffusion_config import DiffusionConfig, check_choice


@dataclass
class ComplexPOConfig(DiffusionConfig):
    r"""
    Configuration class for [`ComplexPOTrainer`].

    This class includes only the parameters that are specific to complex preference optimisation. For those that all
    trainers share see [`DiffusionConfig`], and [`~transformers.TrainingArguments`] for the rest.

    Parameters:
        criteria (`str`, *optional*, defaults to `"painting"`):
            The tree of the attributes, the expert's: a YAML file, or the name of a tree that the package ships.
        attribute_order (`str`, *optional*, defaults to `"tree"`):
            In which order attributes are written into the expert's prompts, `"tree"` or `"given"`, as it was trained. See
            [`AttributeSFTConfig`].
        attribute_separator (`str`, *optional*, defaults to `", "`):
            What stands between prompt and attributes, and between attributes, as the expert was trained.
        max_attributes (`int`, *optional*):
            How many attributes are written at most, spread over the dimensions of the criteria. Defaults to as many as
            the text encoders take.
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is held to the reference, as in [`InstanceDPOConfig`]: half of it multiplies the
            difference of mean squared errors.
        loss_type (`str`, *optional*, defaults to `"stabilized"`):
            `"stabilized"`, the paper's CPO-S, or `"unstabilized"`, its CPO. See [`losses.complex_po_loss`].
        reflection_weight (`float`, *optional*, defaults to `1.0`):
            How far the stabilised loss mirrors the negative target through the reference. 1 begins as the unstabilised
            loss does.
        target_strength (`float`, *optional*, defaults to `1.0`):
            How far the expert's targets lie from its prediction for the prompt alone. 1 takes them as they are, larger
            values further (ours). Any other value than 1 costs one more row of the expert's forward.
        attribute_targets (`str`, *optional*, defaults to `"present"`):
            What the expert is asked. `"present"`, as in the paper: the row's positive attributes for the positive target,
            its negative ones for the negative target. `"paired"` (ours): all attributes of the row in their positive form
            for the one, and in their negative form for the other.
        timestep_weighting (`str`, *optional*, defaults to `"constant"`):
            Weight of a timestep, a function of its signal-to-noise ratio: `"constant"`, `"min_snr"` or `"sigmoid"`. See
            [`noising.timestep_weights`].
        policy_condition (`str`, *optional*, defaults to `"prompt"`):
            What policy and reference are given: `"prompt"`, the prompt alone as in the paper, or `"positive"`, the same
            prompt as the expert's positive one, for a model that is drawn with such prompts.
        reverse_preference (`bool`, *optional*, defaults to `False`):
            Train towards the negative target and away from the positive one, which gives the model for
            [`negative_preference_guidance`] (Diffusion-NPO).
    """

    criteria: str = field(
        default="painting",
        metadata={"help": "The tree of the attributes, the expert's: a YAML file, or the name of a shipped tree."},
    )
    attribute_order: str = field(
        default="tree",
        metadata={
            "help": "In which order attributes are written into the expert's prompts, as it was trained.",
            "choices": ["tree", "given"],
        },
    )
    attribute_separator: str = field(
        default=", ", metadata={"help": "What stands between prompt and attributes, as the expert was trained."}
    )
    max_attributes: int | None = field(
        default=None,
        metadata={"help": "How many attributes are written at most. Defaults to as many as the text encoders take."},
    )
    beta: float = field(
        default=2000.0,
        metadata={
            "help": "How strongly the policy is held to the reference, as the papers define it: half of it multiplies "
            "the difference of mean squared errors."
        },
    )
    loss_type: str = field(
        default="stabilized",
        metadata={"help": "The paper's CPO-S or its CPO.", "choices": ["stabilized", "unstabilized"]},
    )
    reflection_weight: float = field(
        default=1.0,
        metadata={"help": "How far the stabilised loss mirrors the negative target through the reference."},
    )
    target_strength: float = field(
        default=1.0,
        metadata={
            "help": "How far the expert's targets lie from its prediction for the prompt alone; 1: as they are."
        },
    )
    attribute_targets: str = field(
        default="present",
        metadata={
            "help": "What the expert is asked: the row's positive against its negative attributes, or all of them in "
            "their positive against their negative form.",
            "choices": ["present", "paired"],
        },
    )
    timestep_weighting: str = field(
        default="constant",
        metadata={
            "help": "Weight of a timestep, a function of its signal-to-noise ratio.",
            "choices": ["constant", "min_snr", "sigmoid"],
        },
    )
    policy_condition: str = field(
        default="prompt",
        metadata={
            "help": "What policy and reference are given: the prompt alone, or the expert's positive prompt.",
            "choices": ["prompt", "positive"],
        },
    )
    reverse_preference: bool = field(
        default=False,
        metadata={"help": "Train towards the negative target, for the unconditional branch of guidance."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_attribute_prompts(self)
        for name in ("beta", "target_strength"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not self.reflection_weight >= 0:
            raise ValueError(f"`reflection_weight` must not be negative, got {self.reflection_weight}.")
        for name, values in (
            ("loss_type", ("stabilized", "unstabilized")),
            ("attribute_targets", ("present", "paired")),
            ("timestep_weighting", ("constant", "min_snr", "sigmoid")),
            ("policy_condition", ("prompt", "positive")),
        ):
            check_choice(self, name, values)
