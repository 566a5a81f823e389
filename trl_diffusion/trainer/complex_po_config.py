# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from accelerate.logging import get_logger

from ..degraded_prompts import DROPPED_WORDS, check_dropped_words
from .attribute_sft_config import check_attribute_prompts
from .diffusion_config import DiffusionConfig, check_choice


logger = get_logger(__name__)

# What a training with degraded prompts cannot have, and why
NOT_DEGRADED = {
    "attribute_order": ("tree", "attributes are not asked for"),
    "attribute_separator": (", ", "attributes are not asked for"),
    "attribute_targets": ("present", "attributes are not asked for"),
    "max_attributes": (None, "attributes are not asked for"),
    "policy_condition": ("prompt", "the positive target already is that of the plain prompt"),
    "prompt_dropout": (0.0, "a prompt that is dropped has no words to lose, so both targets are equal"),
}


@dataclass(repr=False)  # it shows no token
class ComplexPOConfig(DiffusionConfig):
    r"""
    Configuration class for [`ComplexPOTrainer`].

    This class only contains the parameters that are specific to complex preference optimisation. See [`DiffusionConfig`] for those
    of all trainers of this library, and [`~transformers.TrainingArguments`] for the others.

    Parameters:
        criteria (`str`, *optional*, defaults to `"painting"`):
            The criteria tree of the expert: a YAML file, or the name of a tree that comes with the package.
        attribute_order (`str`, *optional*, defaults to `"tree"`):
            Order of the attributes in the prompts of the expert, `"tree"` or `"given"`, see [`AttributeSFTConfig`]. Must be
            as in the training of the expert.
        attribute_separator (`str`, *optional*, defaults to `", "`):
            Text between prompt and attributes, and between attributes. Must be as in the training of the expert.
        max_attributes (`int`, *optional*):
            Maximum number of attributes in a prompt, spread over the dimensions of the tree. Defaults to as many as fit into
            the text encoders.
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is kept near the reference, as in [`InstanceDPOConfig`]: half of it multiplies the
            difference of mean squared errors.
        loss_type (`str`, *optional*, defaults to `"stabilized"`):
            `"stabilized"`, the paper's CPO-S, or `"unstabilized"`, its CPO. See [`losses.complex_po_loss`].
        reflection_weight (`float`, *optional*, defaults to `1.0`):
            How far the negative target is reflected through the reference in the stabilised loss. With 1, training starts
            like with the unstabilised loss, which has no reflection: there, it must be left out.
        target_strength (`float`, *optional*, defaults to `1.0`):
            Scale of the distance between the targets and the expert's prediction for the plain prompt (ours). 1 uses the
            predictions of the expert as they are. Any other value adds one row to its forward pass.
        attribute_targets (`str`, *optional*, defaults to `"present"`):
            The attributes in the prompts of the expert. `"present"`, as in the paper: the positive attributes of the row for
            the positive target, its negative ones for the negative target. `"paired"` (ours): all attributes of the row, in
            their positive form for the positive target and in their negative form for the negative target.
        timestep_weighting (`str`, *optional*, defaults to `"constant"`):
            Weight of a timestep as a function of its signal-to-noise ratio: `"constant"`, `"min_snr"` or `"sigmoid"`. See
            [`noising.timestep_weights`].
        policy_condition (`str`, *optional*, defaults to `"prompt"`):
            The prompt of policy and reference: `"prompt"`, the plain prompt as in the paper, or `"positive"`, the expert's
            prompt for the positive target, for a model that will be used with such prompts.
        target_prompts (`str`, *optional*):
            What the reference is asked for the targets, in a training without an expert. `"attributes"`: what an expert would be
            asked. `"degraded"`, as in DDSPO: the prompt for the positive target, and for the negative one the prompt without some of
            its words; attributes, and the parameters that are about them, are then not used. Must be given without an expert, and
            left out with one.
        dropped_words (`list[float]`, *optional*):
            The smallest and the largest share of words that a degraded prompt loses, see [`degraded_prompts.degraded_prompt`].
            Defaults to `[0.4, 0.7]` if `target_prompts` is `"degraded"`.
        reverse_preference (`bool`, *optional*, defaults to `False`):
            Train towards the negative target and away from the positive one, for a model that is used in
            [`negative_preference_guidance`] (Diffusion-NPO).

    Raises:
        `ValueError`: If a parameter has a value that it cannot have; the message names the parameter and what it can be.
    """

    criteria: str = field(
        default="painting",
        metadata={
            "help": "The criteria tree of the expert: a YAML file, or the name of a tree that comes with the package."
        },
    )
    attribute_order: str = field(
        default="tree",
        metadata={
            "help": "Order of the attributes in the prompts of the expert, as in its training.",
            "choices": ["tree", "given"],
        },
    )
    attribute_separator: str = field(
        default=", ", metadata={"help": "Text between prompt and attributes, as in the training of the expert."}
    )
    max_attributes: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of attributes in a prompt. Defaults to as many as fit into the text encoders."
        },
    )
    beta: float = field(
        default=2000.0,
        metadata={
            "help": "How strongly the policy is kept near the reference, as defined in the papers: half of it multiplies "
            "the difference of mean squared errors."
        },
    )
    loss_type: str = field(
        default="stabilized",
        metadata={"help": "The paper's CPO-S or its CPO.", "choices": ["stabilized", "unstabilized"]},
    )
    reflection_weight: float = field(
        default=1.0,
        metadata={"help": "How far the negative target is reflected through the reference in the stabilised loss."},
    )
    target_strength: float = field(
        default=1.0,
        metadata={
            "help": "Scale of the distance between the targets and the expert's prediction for the plain prompt."
        },
    )
    attribute_targets: str = field(
        default="present",
        metadata={
            "help": "The attributes in the prompts of the expert: the positive ones of the row against its negative ones, or all "
            "of them in positive against negative form.",
            "choices": ["present", "paired"],
        },
    )
    timestep_weighting: str = field(
        default="constant",
        metadata={
            "help": "Weight of a timestep as a function of its signal-to-noise ratio.",
            "choices": ["constant", "min_snr", "sigmoid"],
        },
    )
    policy_condition: str = field(
        default="prompt",
        metadata={
            "help": "The prompt of policy and reference: the plain prompt, or the expert's prompt for the positive target.",
            "choices": ["prompt", "positive"],
        },
    )
    target_prompts: str | None = field(
        default=None,
        metadata={
            "help": "What the reference is asked for the targets where there is no expert: the prompt with attributes as an expert "
            "would be asked, or the prompt without some of its words for the negative target. Needed without an expert.",
            "choices": ["attributes", "degraded"],
        },
    )
    dropped_words: list[float] | None = field(
        default=None,
        metadata={
            "help": "The smallest and the largest share of words that a degraded prompt loses. Defaults to 0.4 0.7."
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
        if self.loss_type == "unstabilized" and self.reflection_weight != 1:
            raise ValueError(
                f"`reflection_weight={self.reflection_weight}` has no effect with `loss_type='unstabilized'`, which moves away from the "
                "negative target itself. Leave it out, or use 'stabilized'."
            )
        if self.target_prompts is not None:
            check_choice(self, "target_prompts", ("attributes", "degraded"))
        if self.target_prompts == "degraded":
            self.dropped_words = list(DROPPED_WORDS) if self.dropped_words is None else self.dropped_words
            check_dropped_words(self.dropped_words)
            for name, (value, reason) in NOT_DEGRADED.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` is not possible with `target_prompts='degraded'`: {reason}. Leave it out."
                    )
            if self.criteria != type(self).criteria:
                logger.warning(
                    f"`criteria={self.criteria!r}` has no effect with `target_prompts='degraded'`, which asks for no attributes."
                )
        elif self.dropped_words is not None:
            raise ValueError(
                "`dropped_words` has no effect without `target_prompts='degraded'`. Set this, or leave it out."
            )
