# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""How often the images of one model score higher than those of another."""

import inspect
import math
from collections.abc import Hashable, Sequence
from numbers import Real
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value


def win_rate(
    scores: Sequence[float | None],
    references: Sequence[float | None],
    higher_is_better: bool = True,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """
    The share of pairs that the first model wins, ties one half, with a percentile bootstrap interval.

    Images of one prompt are not independent. With several seeds a prompt, give `groups`: whole prompts are then resampled
    (a cluster bootstrap), and the interval is about the share over prompts such as these. The interval comes from what was
    seen: it has no width where all pairs came out alike, and is too narrow for a dozen prompts.

    Args:
        scores (`Sequence[float | None]` of length `N`):
            Scores of the model in question, `None` where an image has none.
        references (`Sequence[float | None]` of length `N`):
            Scores of the other model for the same prompts and seeds, in the same order.
        higher_is_better (`bool`, *optional*, defaults to `True`):
            Whether the higher score wins.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        num_resamples (`int`, *optional*, defaults to `10000`):
            Bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Of the bootstrap.
        groups (`Sequence[Hashable]` of length `N`, *optional*):
            What belongs together, such as the pairs' prompts. Left out, the pairs are taken as independent.

    Returns:
        `dict`: `win_rate`; `lower` and `upper`, `None` where there is one pair or one group only; `num_pairs` and
        `num_ties` of the compared pairs; `left_out`, the number of pairs in which an image has no score.

    Raises:
        `ValueError`: If the lengths differ, a score is no finite number, no pair has both scores, or an option is out of
            range.
    """
    if len(scores) != len(references) or groups is not None and len(groups) != len(scores):
        raise ValueError(
            f"There are {len(scores)} scores, {len(references)} references"
            f"{'' if groups is None else f' and {len(groups)} groups'}: each pair needs one of each, in the same order."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    for name, values in (("scores", scores), ("references", references)):
        for place, value in enumerate(values):
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                raise ValueError(
                    f"`{name}[{place}]` is {value!r}: a score is a finite number, or None where there is none."
                )
    places = [place for place in range(len(scores)) if scores[place] is not None and references[place] is not None]
    if not places:
        raise ValueError(f"Of {len(scores)} pairs none has two scores: there is nothing to compare.")

    better, worse = (scores, references) if higher_is_better else (references, scores)
    signs = np.sign([float(better[place]) - float(worse[place]) for place in places])
    outcomes = (1 + signs) / 2  # 1 won, 1/2 tied, 0 lost
    numbers = {}
    members = [numbers.setdefault(place if groups is None else groups[place], len(numbers)) for place in places]
    lower, upper = bootstrap_interval(
        np.bincount(members, outcomes), np.bincount(members), confidence, num_resamples, seed
    )
    return {
        "win_rate": float(outcomes.mean()),
        "lower": lower,
        "upper": upper,
        "num_pairs": len(places),
        "num_ties": int((signs == 0).sum()),
        "left_out": len(scores) - len(places),
    }


def bootstrap_interval(
    sums: np.ndarray, sizes: np.ndarray, confidence: float, num_resamples: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """
    The percentile interval of a mean over the members of groups that are resampled whole (Field and Welsh, Bootstrapping
    clustered data, 2007).

    Groups of one sum and one size cannot be told apart. So a resample is how often each kind of group comes up, which is
    multinomial: a handful of numbers, however many groups there are.

    Args:
        sums (`np.ndarray` of shape `(G,)`):
            Each group's sum over its members.
        sizes (`np.ndarray` of shape `(G,)`):
            Its number of members.
        confidence (`float`):
            Coverage of the interval.
        num_resamples (`int`):
            Bootstrap resamples.
        seed (`int`):
            Of the draws.

    Returns:
        `tuple[float, float]`, or `(None, None)` where a single group tells nothing of how groups differ.
    """
    if len(sums) < 2:
        return None, None
    kinds, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)  # (2, K), (K,)
    draws = np.random.default_rng(seed).multinomial(len(sums), counts / len(sums), size=num_resamples)  # (R, K)
    of_sums, of_sizes = kinds @ draws.T  # (R,) each
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(of_sums / of_sizes, [tail, 1 - tail])
    return float(lower), float(upper)


class WinRate(evaluate.Metric):
    """
    [`win_rate`] as a module of `evaluate`: `metric.compute(predictions=[...], references=[...], groups=prompts)`, where the
    predictions are scores of the model in question and the references those of the other one; and the options of
    [`win_rate`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of pairs of images, of one prompt and seed, in which the first model's image scores higher.",
            citation="",
            inputs_description=inspect.cleandoc(self.__doc__),
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def _compute(
        self,
        predictions: list[float | None],
        references: list[float | None],
        higher_is_better: bool = True,
        confidence: float = 0.95,
        num_resamples: int = 10_000,
        seed: int = 0,
        groups: Sequence[Hashable] | None = None,
    ) -> dict[str, Any]:
        return win_rate(predictions, references, higher_is_better, confidence, num_resamples, seed, groups)
