# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from .diffusion_config import DiffusionConfig


@dataclass
class InstanceDPOConfig(DiffusionConfig):
    r"""
    Configuration class for the [`InstanceDPOTrainer`].

    This class includes only the parameters that are specific to instance-aware preference optimization. Those shared by
    the trainers of this library are described in [`DiffusionConfig`], those of every trainer in
    [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is held to the reference, as the papers define it: `0.5 * beta` multiplies the
            difference of mean squared errors, see [`losses.diffusion_dpo_loss`]. The IAPO paper uses 2000 for Stable
            Diffusion 1.5 and 5000 for SDXL.
        w_neg (`float`, *optional*, defaults to `0.0`):
            Weight of the loss inside the box of an instance that contradicts the image's label, at most 1. 1 is plain
            Diffusion-DPO, 0 takes the region out, a negative value turns the preference round there.
        mask_overlap (`str`, *optional*, defaults to `"mean"`):
            How the instances of an image combine into its mask. `"mean"` averages over all of them, as in the paper;
            `"covering"` (ours) averages, at each position, over the instances that cover it.
        noise_source (`str`, *optional*, defaults to `"random"`):
            Where the noise of a noised image comes from. `"random"` draws it, the same for both images of a pair.
            `"inversion"` carries each image to its timestep by DDIM inversion, with its prompt and without guidance, and
            takes the noise that explains the result, as InPO and, for SDXL, IAPO do.
        inversion_steps (`int`, *optional*, defaults to `10`):
            The most steps of an inversion, which is what the last timestep takes; earlier ones take fewer.
        inversion_model (`str`, *optional*, defaults to `"reference"`):
            Who inverts: `"reference"`, whose results can be precomputed, or `"policy"`, as in InPO's published run.
        inversion_eta (`float`, *optional*, defaults to `0.0`):
            Weight of a random term after each step of an inversion; 0.1 in InPO's published run. 0 is deterministic.
        precompute_ref_preds (`bool`, *optional*, defaults to `False`):
            With `precompute`, also compute the reference's predictions before the training, for the timestep and the noise of
            each row and epoch; a step then asks the policy alone. Where the reference inverts, `precompute` alone does so.
        reverse_preference (`bool`, *optional*, defaults to `False`):
            Train towards the rejected images, instances included, which gives the model for
            [`negative_preference_guidance`] (Diffusion-NPO). In the logs, chosen then means rejected.
    """

    beta: float = field(
        default=2000.0,
        metadata={
            "help": "How strongly the policy is held to the reference, as the papers define it: half of it multiplies "
            "the difference of mean squared errors."
        },
    )
    w_neg: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the loss inside the box of an instance that contradicts the image's label, at most 1. "
            "1 is plain Diffusion-DPO."
        },
    )
    mask_overlap: str = field(
        default="mean",
        metadata={
            "help": "How the instances of an image combine into its mask: average over all of them, or over those that "
            "cover the position.",
            "choices": ["mean", "covering"],
        },
    )
    noise_source: str = field(
        default="random",
        metadata={
            "help": "Where the noise of a noised image comes from: drawn, or from DDIM inversion of the image.",
            "choices": ["random", "inversion"],
        },
    )
    inversion_steps: int = field(
        default=10, metadata={"help": "The most steps of an inversion, which is what the last timestep takes."}
    )
    inversion_model: str = field(
        default="reference",
        metadata={
            "help": "Who inverts: the reference, whose results can be precomputed, or the policy.",
            "choices": ["reference", "policy"],
        },
    )
    inversion_eta: float = field(
        default=0.0, metadata={"help": "Weight of a random term after each step of an inversion."}
    )
    precompute_ref_preds: bool = field(
        default=False,
        metadata={"help": "With `precompute`, also compute the reference's predictions before the training."},
    )
    reverse_preference: bool = field(
        default=False,
        metadata={"help": "Train towards the rejected images, for the unconditional branch of guidance."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        if not self.w_neg <= 1:
            raise ValueError(
                f"`w_neg` must be at most 1, got {self.w_neg}: 1 is plain Diffusion-DPO, 0 takes contradicting regions "
                "out of the loss, and a negative value turns their preference round."
            )
        if self.mask_overlap not in ("mean", "covering"):
            raise ValueError(f"`mask_overlap` must be 'mean' or 'covering', got {self.mask_overlap!r}.")
        if self.noise_source not in ("random", "inversion"):
            raise ValueError(f"`noise_source` must be 'random' or 'inversion', got {self.noise_source!r}.")
        if self.inversion_model not in ("reference", "policy"):
            raise ValueError(f"`inversion_model` must be 'reference' or 'policy', got {self.inversion_model!r}.")
        if self.precompute_ref_preds and not self.precompute:
            raise ValueError(
                "`precompute_ref_preds=True` needs `precompute=True`, which encodes what they are made from."
            )
        if self.precompute_ref_preds and self.noise_source == "inversion" and self.inversion_model == "policy":
            raise ValueError(
                "`precompute_ref_preds=True` is not possible where the policy inverts: what the reference is asked then "
                "depends on the training. Use `inversion_model='reference'`, or leave it off."
            )
        if self.inversion_steps < 1:
            raise ValueError(f"`inversion_steps` must be at least 1, got {self.inversion_steps}.")
        if not self.inversion_eta >= 0:
            raise ValueError(f"`inversion_eta` must not be negative, got {self.inversion_eta}.")
