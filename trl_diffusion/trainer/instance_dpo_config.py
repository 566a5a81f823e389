# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from ..losses import PAIR_LOSSES
from .diffusion_config import DiffusionConfig, check_choice


# What `beta` and `label_smoothing` are where the user says nothing
DEFAULT_BETA, DEFAULT_BETAS = 2000.0, {"mapo": 0.1, "dspo": 0.001}
DEFAULT_LABEL_SMOOTHING, DEFAULT_LABEL_SMOOTHINGS = 0.0, {"dmpo": 0.01}


@dataclass(repr=False)  # it shows no token
class InstanceDPOConfig(DiffusionConfig):
    r"""
    Configuration class for the [`InstanceDPOTrainer`].

    This class only contains the parameters that are specific to instance-aware preference optimization. See [`DiffusionConfig`]
    for those of all trainers of this library, and [`~transformers.TrainingArguments`] for the others.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            How two images are compared: `"sigmoid"`, as in Diffusion-DPO and IAPO, or `"ipo"`, `"hinge"`, `"mapo"`, `"dspo"` or
            `"dmpo"`. `"mapo"` has no reference, which halves the forward passes.
        beta (`float`, *optional*):
            How strongly the policy is kept near the reference, as defined in the papers: `0.5 * beta` multiplies the
            difference of mean squared errors, see [`losses.diffusion_dpo_loss`]. Defaults to 2000; to 0.1, the weight of the
            comparison, for `"mapo"`; and to 0.001 for `"dspo"`. The IAPO paper uses 2000 for Stable Diffusion 1.5 and 5000
            for SDXL. Rectified flows, whose errors are those of the velocity, need a much smaller one (100 in the quickstart).
        label_smoothing (`float`, *optional*):
            Share of the labels that are taken to be wrong, below 0.5. Only `"sigmoid"` (default 0) and `"dmpo"` (default 0.01)
            have it.
        safeguard_mu (`float`, *optional*):
            Scales the gradient of the rejected images down, pair by pair, so that a step still lowers the errors of the chosen
            ones by at least this share (Diffusion-SDPO), see [`losses.safeguard_scale`]. Between 0 and 1; off if left out.
        anchor_alpha (`float`, *optional*, defaults to `0.0`):
            Weight of a further loss, the mean squared distance of policy and reference on the chosen images, without masks.
        grouped_instances (`bool`, *optional*, defaults to `False`):
            Instead of masking the loss, compute one for each instance, with its own preference, and one for the background, and
            average them (ours).
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

    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "How two images are compared.", "choices": list(PAIR_LOSSES)},
    )
    beta: float = field(
        default=None,
        metadata={
            "help": "How strongly the policy is kept near the reference, as defined in the papers: half of it multiplies "
            "the difference of mean squared errors. Defaults to 2000, to 0.1 for mapo, to 0.001 for dspo."
        },
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={
            "help": "Share of the labels that are taken to be wrong. Defaults to 0, to 0.01 for dmpo. Only for sigmoid and dmpo."
        },
    )
    safeguard_mu: float | None = field(
        default=None,
        metadata={
            "help": "Scales the gradient of the rejected images down, so that a step still lowers the errors of the chosen "
            "ones by at least this share."
        },
    )
    anchor_alpha: float = field(
        default=0.0,
        metadata={"help": "Weight of the distance of policy and reference on the chosen images, added to the loss."},
    )
    grouped_instances: bool = field(
        default=False,
        metadata={"help": "One loss for each instance, with its own preference, and one for the background."},
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
        check_choice(self, "loss_type", tuple(PAIR_LOSSES))
        if self.beta is None:
            self.beta = DEFAULT_BETAS.get(self.loss_type, DEFAULT_BETA)
        if self.label_smoothing is None:
            self.label_smoothing = DEFAULT_LABEL_SMOOTHINGS.get(self.loss_type, DEFAULT_LABEL_SMOOTHING)
        if not self.beta > 0:
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
        self._check_loss()
        self._check_grouped_instances()

    def _check_loss(self) -> None:
        smoothing, is_smoothed = self.label_smoothing, self.loss_type in ("sigmoid", "dmpo")
        if not is_smoothed and smoothing != 0:
            raise ValueError(
                f"`label_smoothing` is {smoothing}, but `loss_type={self.loss_type!r}` computes no probability of a label that it "
                "could smooth. Leave it out, or use `loss_type='sigmoid'` or `'dmpo'`."
            )
        if not 0 <= smoothing < 0.5 or (self.loss_type == "dmpo" and smoothing == 0):
            low = "above 0" if self.loss_type == "dmpo" else "at least 0"
            raise ValueError(f"`label_smoothing` is a share of wrong labels, {low} and below 0.5, got {smoothing}.")
        if self.safeguard_mu is not None and not 0 <= self.safeguard_mu <= 1:
            raise ValueError(f"`safeguard_mu` must be between 0 and 1, got {self.safeguard_mu}.")
        if not self.anchor_alpha >= 0:
            raise ValueError(f"`anchor_alpha` must not be negative, got {self.anchor_alpha}.")
        if self.loss_type == "mapo":
            for name in ("anchor_alpha", "precompute_ref_preds"):
                if getattr(self, name):
                    raise ValueError(
                        f"`{name}` needs a reference, and `loss_type='mapo'` has none. Leave it out, or use another loss."
                    )

    def _check_grouped_instances(self) -> None:
        if not self.grouped_instances:
            return
        for name, default in (("w_neg", 0.0), ("mask_overlap", "mean"), ("mask_examples", 0)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, which is of the mask of an image, and `grouped_instances` computes a loss "
                    f"for each instance instead. Leave `{name}` out, or `grouped_instances`."
                )
