# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What frozen models are asked for the targets of CPO and of DDSPO: the prompt with its good or with its bad attributes, or the whole
prompt and a part of its words.
"""

from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..degraded_prompts import degraded_prompt
from .attributes import AttributePrompts
from .complex_po_config import ComplexPOConfig
from .ddspo_config import DDSPOConfig


logger = get_logger(__name__)


class ComplexPrompts(NamedTuple):
    """
    The prompts of a batch.

    Attributes:
        plain (`list[str]` of length `B`):
            The prompts alone.
        chosen (`list[str]` of length `B`):
            What the expert, or the reference in its place, is asked for the targets to go to.
        rejected (`list[str]` of length `B`):
            What it is asked for the targets to leave.
        has_chosen (`torch.Tensor` of shape `(B,)`):
            1 where there is a target to go to, else 0: float32.
        has_rejected (`torch.Tensor` of shape `(B,)`):
            1 where there is a target to leave, else 0: float32.
    """

    plain: list[str]
    chosen: list[str]
    rejected: list[str]
    has_chosen: torch.Tensor
    has_rejected: torch.Tensor

    def to(self, device: torch.device) -> "ComplexPrompts":
        """The same with its tensors on a device."""
        has_chosen, has_rejected = (has.to(device, non_blocking=True) for has in self[-2:])
        return self._replace(has_chosen=has_chosen, has_rejected=has_rejected)


def check_expert_or_prompts(has_expert: bool, target_prompts: str | None) -> None:
    """Raises a `ValueError` unless there is either an expert, or [`ComplexPOConfig`] says what the reference is asked in its place."""
    if not has_expert and target_prompts is None:
        raise ValueError(
            "`expert` is missing: give an expert that `AttributeSFTTrainer` trained. To train without one, say by `target_prompts` "
            "what the reference is asked in its place: 'attributes' or 'degraded'."
        )
    if has_expert and target_prompts is not None:
        raise ValueError(
            f"`target_prompts={target_prompts!r}` is what the reference is asked where there is no expert, and `expert` is given. "
            "Leave out one of the two."
        )


def why_targets_coincide(target_prompts: str | None, is_left_out: bool) -> str:
    """Why both targets of a row may be equal, and the way out. `is_left_out` says whether prompts leave out attributes."""
    if target_prompts == "degraded":
        return "A prompt without words has none to lose: remove such rows."
    if is_left_out:
        return "Their attributes do not fit into the prompt: shorten the prompts, or the forms of the attributes."
    if target_prompts == "attributes":
        return "The model does not tell the attributes apart by their words: train an expert."
    return "The expert does not tell the attributes apart: train it longer, or check that its prompts have the form of these."


# ----- prompts with attributes -----


def asked_attributes(
    positive: list[str], negative: list[str], args: ComplexPOConfig
) -> list[tuple[list[str], list[str]]]:
    """
    The attributes in the two prompts of a row.

    Args:
        positive (`list[str]`), negative (`list[str]`):
            The attributes that the row has.
        args ([`ComplexPOConfig`]):
            `attribute_targets` and `reverse_preference` are read.

    Returns:
        `list` of two `tuple[list[str], list[str]]`: for the chosen and for the rejected target, the attributes in positive and those
        in negative form.
    """
    if args.attribute_targets == "paired":
        positive = negative = [*positive, *negative]
    sides = [(positive, []), ([], negative)]
    return sides[::-1] if args.reverse_preference else sides


def check_has_attributes(inputs: dict[str, Any]) -> None:
    """Raises a `ValueError` if a row of a batch has no attributes. It is one of a stream: a dataset in memory is checked before."""
    for row_id, *attributes in zip(
        inputs["id"], inputs["positive_attributes"], inputs["negative_attributes"], strict=True
    ):
        if not any(attributes):
            raise ValueError(
                f"The row with id {row_id!r} has neither positive nor negative attributes, so that there is nothing "
                "to learn from it. Drop such rows with `dataset.filter`."
            )


def prompts_with_attributes(
    plain: list[str | None], inputs: dict[str, Any], write: AttributePrompts, args: ComplexPOConfig
) -> tuple[ComplexPrompts, torch.Tensor]:
    """
    The prompts of a batch, with the attributes of its rows.

    Args:
        plain (`list[str]` of length `B`):
            The prompts; `None` is the unconditional branch.
        inputs (`dict`):
            A batch of [`data.collators.AttributeCollator`].
        write ([`trainer.attributes.AttributePrompts`]):
            Joins a prompt with attributes.
        args ([`ComplexPOConfig`]):
            See [`trainer.target_prompts.asked_attributes`].

    Returns:
        `tuple[ComplexPrompts, torch.Tensor]`: the prompts, and the number of attributes `(B,)` that both prompts of a row leave out.
    """
    attributes = zip(inputs["positive_attributes"], inputs["negative_attributes"], strict=True)
    sides = [asked_attributes(positive, negative, args) for positive, negative in attributes]
    written = [[write(prompt, *side) for side in row] for prompt, row in zip(plain, sides, strict=True)]
    chosen, rejected = ([text for text, _ in column] for column in zip(*written, strict=True))
    left_out = torch.tensor([sum(number for _, number in row) for row in written])
    has_side = torch.tensor([[any(side) for side in row] for row in sides], dtype=torch.float32)
    return ComplexPrompts(plain, chosen, rejected, *has_side.T), left_out


# ----- degraded prompts -----


def degraded(prompt: str, args: ComplexPOConfig | DDSPOConfig) -> str:
    """What [`degraded_prompts.degraded_prompt`] leaves of a prompt in a training, in which this never changes."""
    return degraded_prompt(prompt, args.dropped_words, args.seed)


def degraded_prompts(plain: list[str], args: ComplexPOConfig) -> ComplexPrompts:
    """
    The prompts of a batch, and what degrading leaves of them.

    Args:
        plain (`list[str]` of length `B`):
            The prompts.
        args ([`ComplexPOConfig`]):
            `dropped_words`, `seed` and `reverse_preference` are read.

    Returns:
        [`trainer.target_prompts.ComplexPrompts`]: each row has both terms.
    """
    sides = [plain, [degraded(prompt, args) for prompt in plain]]
    chosen, rejected = sides[::-1] if args.reverse_preference else sides
    return ComplexPrompts(plain, chosen, rejected, *torch.ones(2, len(plain)))


def warn_of_prompts_without_words(dataset: Dataset | IterableDataset, name: str) -> None:
    """Says how many rows in memory have a prompt that has no words to lose."""
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":
        return
    prompts = dataset.with_format("arrow").select_columns(["prompt"])[:]["prompt"].cast(pa.large_string())
    number = pc.sum(pc.equal(pc.utf8_trim_whitespace(prompts), "")).as_py()
    if number:
        logger.warning(
            f"{number:,} of the {len(dataset):,} rows of `{name}` have a prompt without words, which has none to lose: the prediction "
            "that the policy should leave is the reference's own. Remove such rows."
        )
