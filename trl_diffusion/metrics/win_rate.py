# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The win rate: how often the images of one model score higher than those of another."""

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
    Computes the share of pairs that the first model wins, with ties counted as one half, and a percentile bootstrap
    interval.

    Images of the same prompt are not independent. With several seeds per prompt, pass the prompts as `groups`: the
    bootstrap then resamples whole prompts (a cluster bootstrap). The interval has no width if all pairs have the same
    outcome, and is too narrow for a dozen prompts.

    Args:
        scores (`Sequence[float | None]` of length `N`):
            Scores of the first model, `None` for an image without a score.
        references (`Sequence[float | None]` of length `N`):
            Scores of the other model for the same prompts and seeds, in the same order.
        higher_is_better (`bool`, *optional*, defaults to `True`):
            Whether the higher score wins.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        num_resamples (`int`, *optional*, defaults to `10000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        groups (`Sequence[Hashable]` of length `N`, *optional*):
            Group of each pair, such as its prompt. By default, all pairs are independent.

    Returns:
        `dict`: `win_rate`; `lower` and `upper`, `None` if there is only one pair or one group; `num_pairs` and
        `num_ties` of the compared pairs; `left_out`, the number of pairs in which an image has no score.

    Raises:
        `ValueError`: If the lengths differ, a score is not finite, no pair has both scores, or an option is out of
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
                    f"`{name}[{place}]` is {value!r}: a score must be a finite number, or None if it is missing."
                )
    places = [place for place in range(len(scores)) if scores[place] is not None and references[place] is not None]
    if not places:
        raise ValueError(f"None of the {len(scores)} pairs has two scores: there is nothing to compare.")

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
    Computes the percentile interval of a mean under a cluster bootstrap, which resamples whole groups (Field and
    Welsh, Bootstrapping clustered data, 2007).

    Groups with the same sum and size are interchangeable, so a resample is a multinomial sample of the counts of each
    kind of group. This needs few numbers for any number of groups.

    Args:
        sums (`np.ndarray` of shape `(G,)`):
            Sum of each group over its members.
        sizes (`np.ndarray` of shape `(G,)`):
            Number of members of each group.
        confidence (`float`):
            Coverage of the interval.
        num_resamples (`int`):
            Number of bootstrap resamples.
        seed (`int`):
            Seed of the resamples.

    Returns:
        `tuple[float, float]`, or `(None, None)` for a single group.
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
    [`win_rate`] as a module of `evaluate`: `metric.compute(predictions=[...], references=[...], groups=prompts)`,
    where `predictions` are the scores of the first model and `references` those of the other one. It accepts all
    options of [`win_rate`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of pairs of images, with the same prompt and seed, in which the first model scores higher.",
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
