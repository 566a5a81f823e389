# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from .diffusion_config import DiffusionConfig, check_choice


@dataclass(repr=False)  # it shows no token
class DiffusionKTOConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DiffusionKTOTrainer`].

    This class only contains the parameters that are specific to Diffusion-KTO. See [`DiffusionConfig`] for those of all trainers of
    this library, and [`~transformers.TrainingArguments`] for the others.

    Parameters:
        beta (`float`, *optional*, defaults to `2000.0`):
            How strongly the policy is kept near the reference, as in [`InstanceDPOConfig`]: half of it multiplies the
            difference of mean squared errors, see [`losses.diffusion_kto_rewards`]. The published run of Diffusion-KTO on
            Stable Diffusion 1.5 has this value, which its script calls 1000. Rectified flows need a much smaller one.
        loss_type (`str`, *optional*, defaults to `"kto"`):
            The utility that is maximised, of a gain `x`: `"kto"` is `sigma(x)`, the paper's choice; `"log_sigmoid"` is
            `log sigma(x)`, which the paper calls loss-averse; `"risk_seeking"` is `-log sigma(-x)`. See [`losses.diffusion_kto_loss`].
        desirable_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the losses of desirable images. Raise it, or lower the other, where one label is much rarer.
        undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the losses of undesirable images.
        reverse_preference (`bool`, *optional*, defaults to `False`):
            Swap the labels, for a model that is used in [`negative_preference_guidance`] (Diffusion-NPO). In the logs, chosen
            then means undesirable.

    Raises:
        `ValueError`: If a parameter has a value that it cannot have; the message names the parameter and what it can be.
    """

    beta: float = field(
        default=2000.0,
        metadata={
            "help": "How strongly the policy is kept near the reference: half of it multiplies the difference of mean squared errors."
        },
    )
    loss_type: str = field(
        default="kto",
        metadata={
            "help": "The utility that is maximised: a sigmoid, its logarithm (loss-averse), or the risk-seeking one.",
            "choices": ["kto", "log_sigmoid", "risk_seeking"],
        },
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of the losses of desirable images."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of the losses of undesirable images."})
    reverse_preference: bool = field(
        default=False,
        metadata={"help": "Swap the labels, for the unconditional branch of guidance."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        check_choice(self, "loss_type", ("kto", "log_sigmoid", "risk_seeking"))
        weights = {name: getattr(self, name) for name in ("desirable_weight", "undesirable_weight")}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {weight}.")
        if not any(weights.values()):
            raise ValueError(
                "`desirable_weight` and `undesirable_weight` are both 0, so that nothing is learned: raise one."
            )
