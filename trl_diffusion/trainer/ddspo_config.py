# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass, field

from ..degraded_prompts import DROPPED_WORDS, check_dropped_words
from .diffusion_config import DiffusionConfig


@dataclass(repr=False)  # it shows no token
class DDSPOConfig(DiffusionConfig):
    r"""
    Configuration class for the [`DDSPOTrainer`].

    This class only contains the parameters that are specific to DDSPO. See [`DiffusionConfig`] for those of all trainers of this
    library, and [`~transformers.TrainingArguments`] for the others.

    Parameters:
        beta (`float`, *optional*, defaults to `16000.0`):
            How strongly the policy is kept near the reference, as in [`InstanceDPOConfig`]. The authors use 16000 for Stable
            Diffusion and SDXL, 2000 for Stable Diffusion 3 and Sana.
        dropped_words (`list[float]`, *optional*):
            The smallest and the largest share of words that a degraded prompt loses, see [`degraded_prompts.degraded_prompt`].
            Defaults to `[0.4, 0.7]`.

    Raises:
        `ValueError`: If a parameter has a value that it cannot have; the message names the parameter and what it can be.
    """

    beta: float = field(
        default=16000.0,
        metadata={
            "help": "How strongly the policy is kept near the reference, as defined in the papers: half of it multiplies "
            "the difference of mean squared errors."
        },
    )
    dropped_words: list[float] | None = field(
        default=None,
        metadata={
            "help": "The smallest and the largest share of words that a degraded prompt loses. Defaults to 0.4 0.7."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}.")
        self.dropped_words = list(DROPPED_WORDS) if self.dropped_words is None else self.dropped_words
        check_dropped_words(self.dropped_words)
        if self.prompt_dropout > 0:
            raise ValueError(
                f"`prompt_dropout={self.prompt_dropout}` is not possible here: a prompt that is dropped has no words to lose, so both "
                "targets are for the same prompt. Leave it out."
            )
