# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math
import time

import evaluate
import numpy as np
import pytest

from trl_diffusion.metrics import metric_path
from trl_diffusion.metrics.win_rate import win_rate


def pairs(wins: int, ties: int, losses: int) -> tuple[list[float], list[float]]:
    """Shuffled scores of two models with the given numbers of wins, ties and losses."""
    signs = np.random.default_rng(0).permutation([1.0] * wins + [0.0] * ties + [-1.0] * losses)
    references = np.random.default_rng(1).normal(size=len(signs)).tolist()
    return [reference + sign for reference, sign in zip(references, signs.tolist(), strict=True)], references


def interval(result: dict) -> tuple[float, float]:
    return result["lower"], result["upper"]


def binomial_interval(n: int, p: float, confidence: float = 0.95) -> tuple[float, float]:
    """The quantiles of a binomial share, from its probabilities in logarithms."""
    factorials = np.cumsum([0.0, *np.log(np.arange(1, n + 1))])
    won = np.arange(n + 1)
    logs = factorials[n] - factorials[won] - factorials[n - won] + won * math.log(p) + (n - won) * math.log(1 - p)
    below = np.cumsum(np.exp(logs))
    tail = (1 - confidence) / 2
    return float(np.searchsorted(below, tail) / n), float(np.searchsorted(below, 1 - tail) / n)


@pytest.mark.parametrize("wins, ties, losses", [(3, 0, 1), (0, 5, 0), (2, 3, 5), (1, 1, 0), (0, 0, 7)])
def test_a_tie_is_half_a_win(wins, ties, losses):
    """The win rate is wins plus half of the ties over the pairs."""
    result = win_rate(*pairs(wins, ties, losses))
    n = wins + ties + losses
    assert result["win_rate"] == (wins + ties / 2) / n
    assert (result["num_pairs"], result["num_ties"], result["left_out"]) == (n, ties, 0)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize("wins", [700, 500, 950])
def test_without_ties_the_bounds_are_binomial(wins, confidence):
    """For a thousand pairs without ties, the bounds are quantiles of the binomial share, up to two pairs."""
    result = win_rate(*pairs(wins, 0, 1000 - wins), confidence=confidence, num_resamples=20_000)
    assert interval(result) == pytest.approx(binomial_interval(1000, wins / 1000, confidence), abs=0.0021)


def test_ties_make_the_interval_narrower():
    """For many pairs, the interval is the normal one with the variance of the outcomes, up to 3 % of its width."""
    result = win_rate(*pairs(2000, 2000, 1000), num_resamples=20_000)
    mean = 0.6
    deviation = math.sqrt((2000 * (1 - mean) ** 2 + 2000 * (0.5 - mean) ** 2 + 1000 * mean**2) / 5000 / 5000)
    bounds = (mean - 1.959964 * deviation, mean + 1.959964 * deviation)
    assert interval(result) == pytest.approx(bounds, abs=0.03 * 2 * 1.959964 * deviation)
    without = win_rate(*pairs(3000, 0, 2000), num_resamples=20_000)
    assert result["upper"] - result["lower"] < 0.85 * (without["upper"] - without["lower"])


def test_a_resample_is_one_of_whole_prompts():
    """The bounds are those of a bootstrap over prompts with unequal numbers of pairs, up to chance."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 5, 60)
    groups = np.repeat(np.arange(60), sizes).tolist()
    outcomes = [rng.choice([0.0, 0.5, 1.0], size) for size in sizes]
    scores = np.concatenate(outcomes)
    rates = []
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        rates.append(np.concatenate([outcomes[group] for group in drawn]).mean())
    result = win_rate(scores, np.full(len(scores), 0.5), groups=groups)
    assert interval(result) == pytest.approx(tuple(np.quantile(rates, [0.025, 0.975])), abs=0.006)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_other_model_has_the_rest(grouped):
    """Swapping the models, or the direction, mirrors the rate and its bounds about one half."""
    scores, references = pairs(300, 60, 140)
    groups = [place // 4 for place in range(500)] if grouped else None
    first = win_rate(scores, references, groups=groups)
    second = win_rate(references, scores, groups=groups)
    assert first["win_rate"] + second["win_rate"] == 1
    assert first["lower"] + second["upper"] == pytest.approx(1, abs=0.004)  # two pairs of chance
    assert first["upper"] + second["lower"] == pytest.approx(1, abs=0.004)
    assert first["num_ties"] == second["num_ties"] == 60
    assert win_rate(scores, references, higher_is_better=False, groups=groups) == second


def test_the_order_of_the_pairs_does_not_count():
    """The rate and its bounds do not depend on the order of pairs."""
    scores, references = pairs(30, 10, 20)
    groups = [f"prompt {place // 3}" for place in range(60)]
    order = np.random.default_rng(0).permutation(60)
    shuffled = [[values[place] for place in order] for values in (scores, references, groups)]
    assert win_rate(*shuffled[:2], groups=shuffled[2]) == win_rate(scores, references, groups=groups)


def test_copies_of_a_pair_tell_nothing_new():
    """Four equal pairs per prompt give the interval of one pair per prompt; without groups it is half as wide."""
    scores, references = pairs(120, 0, 80)
    copies = [[value for value in values for _ in range(4)] for values in (scores, references, range(200))]
    single = win_rate(scores, references)
    grouped = win_rate(*copies[:2], groups=copies[2])
    ungrouped = win_rate(*copies[:2])
    assert interval(grouped) == interval(single)
    width, narrow = (result["upper"] - result["lower"] for result in (single, ungrouped))
    assert narrow == pytest.approx(width / 2, rel=0.1)


def test_the_interval_covers_the_truth():
    """With four seeds per prompt, the interval over prompts contains the true rate in 91 to 98 % of 400 experiments;
    the one over independent pairs much less often."""
    rng = np.random.default_rng(0)
    covered, covered_ungrouped = 0, 0
    for _ in range(400):
        # A prompt is won with a probability of its own, 0.6 on average
        chances = rng.beta(0.6, 0.4, 100).repeat(4)
        scores = (rng.random(400) < chances).astype(float)
        references = np.full(400, 0.5)
        grouped = win_rate(scores, references, num_resamples=1000, groups=np.arange(100).repeat(4).tolist())
        ungrouped = win_rate(scores, references, num_resamples=1000)
        covered += grouped["lower"] <= 0.6 <= grouped["upper"]
        covered_ungrouped += ungrouped["lower"] <= 0.6 <= ungrouped["upper"]
    assert 0.91 < covered / 400 < 0.98
    assert covered_ungrouped / 400 < 0.85


def test_independent_pairs_are_covered():
    """With independent pairs and some ties, the interval contains the true rate in 91 to 98 % of 400 experiments."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        scores = rng.choice([0.0, 1.0, 2.0], 300, p=[0.3, 0.2, 0.5])  # 0.5 + 0.2 / 2
        result = win_rate(scores, np.ones(300), num_resamples=1000)
        covered += result["lower"] <= 0.6 <= result["upper"]
    assert 0.91 < covered / 400 < 0.98


def test_an_interval_repeats_with_its_seed():
    """The bounds depend on the seed, and numpy's global generator is not used."""
    scores, references = pairs(300, 77, 200)
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first = win_rate(scores, references, num_resamples=500, seed=3)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(1)
    assert win_rate(scores, references, num_resamples=500, seed=3) == first
    assert interval(win_rate(scores, references, num_resamples=500, seed=4)) != interval(first)


def test_pairs_without_a_score_are_left_out():
    """A pair with a missing score counts only in `left_out`."""
    result = win_rate([1.0, None, 2.0, None, 0.0], [0.0, 0.0, None, None, 1.0], groups=["a", "b", "c", "d", "a"])
    assert result == {"win_rate": 0.5, "lower": None, "upper": None, "num_pairs": 2, "num_ties": 0, "left_out": 3}


def test_one_group_has_no_interval():
    """A single pair or prompt gives a rate without bounds; two of them give bounds."""
    assert interval(win_rate([1.0], [0.0])) == (None, None)
    assert interval(win_rate([1.0, 0.0, 1.0], [0.5] * 3, groups=["a"] * 3)) == (None, None)
    assert interval(win_rate([1.0, 0.0], [0.5] * 2)) == (0, 1)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0], [1.0, 2.0]), {}, "There are 1 scores, 2 references: each pair"),
        (([1.0], [1.0]), {"groups": []}, "There are 1 scores, 1 references and 0 groups"),
        (([], []), {}, "None of the 0 pairs has two scores"),
        (([None, 1.0], [1.0, None]), {}, "None of the 2 pairs has two scores"),
        (([1.0, math.nan], [1.0, 2.0]), {}, r"`scores\[1\]` is nan"),
        (([1.0, 2.0], [-math.inf, 2.0]), {}, r"`references\[0\]` is -inf"),
        ((["best"], [1.0]), {}, r"`scores\[0\]` is 'best'"),
        (([1.0], [1.0]), {"confidence": 95}, "`confidence` must be between 0 and 1, got 95"),
        (([1.0], [1.0]), {"num_resamples": 0}, "`num_resamples` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, options, message):
    """Different lengths, invalid scores and options out of range raise errors that name the place."""
    with pytest.raises(ValueError, match=message):
        win_rate(*arguments, **options)


def test_many_pairs_take_no_time():
    """Ten thousand resamples of 5000 pairs, with four seeds per prompt, take less than two seconds."""
    scores, references = pairs(2400, 500, 2100)
    start = time.perf_counter()
    win_rate(scores, references, groups=[place // 4 for place in range(5000)])
    assert time.perf_counter() - start < 2


def test_evaluate_loads_it():
    """The module of `evaluate` returns the result of the function, with and without options."""
    metric = evaluate.load(metric_path("win_rate"))
    scores, references = pairs(30, 5, 15)
    scores[7] = None
    assert metric.compute(predictions=scores, references=references) == win_rate(scores, references)
    options = {
        "higher_is_better": False,
        "confidence": 0.9,
        "num_resamples": 200,
        "seed": 5,
        "groups": [place // 2 for place in range(50)],
    }
    result = metric.compute(predictions=scores, references=references, **options)
    assert result == win_rate(scores, references, **options)
    assert result["left_out"] == 1
