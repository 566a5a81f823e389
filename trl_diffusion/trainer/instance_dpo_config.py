# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from .diffusion_config import DiffusionConfig, check_choice


@dataclass(repr=False)  # it shows no token
class InstanceDPOConfig(DiffusionConfig):
    r"""
    Configuration class for the [`InstanceDPOTrainer`].

    This class only contains the parameters that are specific to instance-aware preference optimization. See [`DiffusionConfig`]
    for those of all trainers of this library, and [`~transformers.TrainingArguments`] for the others.

    Parameters:
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is kept near the reference, as defined in the papers: `0.5 * beta` multiplies the
            difference of mean squared errors, see [`losses.diffusion_dpo_loss`]. The IAPO paper uses 2000 for Stable
            Diffusion 1.5 and 5000 for SDXL. Rectified flows, whose errors are those of the velocity, need a much smaller one
            (100 in the quickstart).
        w_neg (`float`, *optional*, defaults to `0.0`):
            Weight of the loss inside the box of an instance that contradicts the label of the image, at most 1. 1 is plain
            Diffusion-DPO, 0 removes the region from the loss, a negative value reverses the preference there.
        mask_overlap (`str`, *optional*, defaults to `"mean"`):
            How the instances of an image are combined to its mask. `"mean"` averages over all of them, as in the paper;
            `"covering"` (ours) averages at each position over the instances that cover it.
        box_margin (`float`, *optional*, defaults to `0.0`):
            Margin around boxes, as a share of the width of the box to the left and to the right, and of its height above and
            below, as far as the image reaches. Segmentation masks have none.
        reverse_preference (`bool`, *optional*, defaults to `False`):
            Train towards the rejected images, with the preferences of instances also reversed, for a model that is used in
            [`negative_preference_guidance`] (Diffusion-NPO). In the logs, chosen then means rejected.
        mask_examples (`int`, *optional*, defaults to `0`):
            Number of training pairs whose images and masks the model card shows; they are published with it. These are the first
            that have an instance which contradicts the label, as they are trained on.

    Raises:
        `ValueError`: If a parameter has a value that it cannot have; the message names the parameter and what it can be.
    """

    beta: float = field(
        default=2000.0,
        metadata={
            "help": "How strongly the policy is kept near the reference, as defined in the papers: half of it multiplies "
            "the difference of mean squared errors."
        },
    )
    w_neg: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the loss inside the box of an instance that contradicts the label of the image, at most 1. "
            "1 is plain Diffusion-DPO."
        },
    )
    mask_overlap: str = field(
        default="mean",
        metadata={
            "help": "How the instances of an image are combined to its mask: average over all of them, or over those that "
            "cover the position.",
            "choices": ["mean", "covering"],
        },
    )
    box_margin: float = field(
        default=0.0,
        metadata={
            "help": "Margin around boxes, as a share of the box's width and height on each side. Segmentation masks have none."
        },
    )
    reverse_preference: bool = field(
        default=False,
        metadata={"help": "Train towards the rejected images, for the unconditional branch of guidance."},
    )
    mask_examples: int = field(
        default=0,
        metadata={
            "help": "Number of training pairs whose images and masks the model card shows; they are published with it."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if not self.w_neg <= 1:
            raise ValueError(
                f"`w_neg` must be at most 1, got {self.w_neg}: 1 is plain Diffusion-DPO, 0 removes contradicting regions from "
                "the loss, and a negative value reverses their preference."
            )
        check_choice(self, "mask_overlap", ("mean", "covering"))
        if not 0 <= self.box_margin < float("inf"):
            raise ValueError(
                f"`box_margin` must be at least 0, got {self.box_margin}: 0.1 widens a box by a tenth of its width and height on each side."
            )
        if self.mask_examples < 0:
            raise ValueError(f"`mask_examples` is a number of training pairs, got {self.mask_examples}.")
