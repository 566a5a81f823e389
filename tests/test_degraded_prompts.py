# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import random
from collections import Counter
from itertools import combinations
from math import ceil, floor

import pytest

from trl_diffusion.degraded_prompts import DROPPED_WORDS, check_dropped_words, degraded_prompt


def prompt(length: int) -> str:
    """A prompt of so many different words."""
    return " ".join(f"w{index}" for index in range(length))


@pytest.mark.parametrize("shares", [DROPPED_WORDS, (0.0, 1.0), (0.25, 0.25), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("length", [2, 3, 5, 7, 20, 77])
def test_the_share_of_dropped_words_lies_within_its_bounds(length, shares):
    """Between both shares, up to the rounding to whole words; at least one word goes, and one stays."""
    numbers = set()
    for seed in range(200):
        words = prompt(length).split()
        left = degraded_prompt(prompt(length), shares, seed).split()
        assert left == [word for word in words if word in left]  # words of the prompt, in its order
        numbers.add(length - len(left))
    low, high = (min(max(bound, 1), length - 1) for bound in (floor(shares[0] * length), ceil(shares[1] * length)))
    assert low <= min(numbers) and max(numbers) <= high
    if length >= 20 and shares == DROPPED_WORDS:
        # every number between 40 and 70 percent: 8 to 14 of 20 words, 31 to 54 of 77
        assert numbers == set(range(round(0.4 * length), round(0.7 * length) + 1))


def test_every_word_is_dropped_alike():
    """Of 10 words, a share of one half drops 5; each word is among them in half of 4000 cases, to 5 standard deviations."""
    counts = Counter()
    for seed in range(4000):
        counts.update(set(prompt(10).split()) - set(degraded_prompt(prompt(10), (0.5, 0.5), seed).split()))
    assert sum(counts.values()) == 5 * 4000
    assert all(abs(count - 2000) < 5 * (4000 / 4) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("text", ["", "   ", "cat", "  cat\n"])
def test_a_prompt_of_one_word_or_none_becomes_the_empty_text(text):
    """Nothing is left that could be asked."""
    assert degraded_prompt(text, DROPPED_WORDS, 0) == ""


def test_the_key_decides():
    """The same prompt and seed give the same words, whatever was drawn elsewhere; another seed or prompt gives others."""
    first = [degraded_prompt(prompt(12), DROPPED_WORDS, seed) for seed in range(20)]
    random.seed(3)
    degraded_prompt(prompt(30), DROPPED_WORDS, 0)
    again = [degraded_prompt(prompt(12), DROPPED_WORDS, seed) for seed in reversed(range(20))]
    assert first == again[::-1] and len(set(first)) > 15
    places = {degraded_prompt(f"w {prompt(11)} {word}", (0.5, 0.5), 0) for word in ("a", "b", "c", "d", "e")}
    assert len({text.replace(" a", "").replace(" b", "") for text in places}) > 1


def test_equal_words_are_dropped_one_by_one():
    """A word that occurs several times is dropped by its place."""
    assert {degraded_prompt("a a a a", (0.5, 0.5), seed) for seed in range(20)} == {"a a"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("红色的猫坐在垫子", list("红色的猫坐在垫子")),
        ("赤い猫、白い犬", list("赤い猫、白い犬")),
        ("a cat 和一只 dog", ["a", "cat", "和", "一", "只", "dog"]),
        ("ｗｉｄｅ　猫", list("ｗｉｄｅ猫")),  # full-width letters and an ideographic space
        ("붉은 고양이 두 마리", ["붉은", "고양이", "두", "마리"]),  # Korean is written with spaces
    ],
)
def test_chinese_and_japanese_lose_characters(text, words):
    """Without white space, a prompt would be one word, and lose all. A share of one half leaves the other half, in its order."""
    possible = {"".join(left) for left in combinations(words, len(words) - round(len(words) / 2))}
    lefts = {degraded_prompt(text, (0.5, 0.5), seed) for seed in range(30)}
    assert {left.replace(" ", "") for left in lefts} <= possible and len(lefts) > 3
    assert all(left == " ".join(left.split()) for left in lefts)


def test_brackets_of_weights_are_words_like_others():
    """Nothing here reads them, and neither do the text encoders."""
    lefts = {degraded_prompt("(a red cat:1.3) on [a mat]", (0.5, 0.5), seed) for seed in range(50)}
    assert {word for left in lefts for word in left.split()} == {"(a", "red", "cat:1.3)", "on", "[a", "mat]"}


@pytest.mark.parametrize("shares", [0.5, "0.4", ["0.4", "0.7"], None])
def test_what_is_no_pair_of_numbers_is_refused(shares):
    """Such as one number in a YAML file."""
    with pytest.raises(ValueError, match="`dropped_words` must be"):
        check_dropped_words(shares)


@pytest.mark.parametrize("shares", [[0.5], [0.4, 0.7, 0.9], [0.7, 0.4], [-0.1, 0.5], [0.5, 1.1], [float("nan"), 0.5]])
def test_shares_that_mean_nothing_are_refused(shares):
    """Two numbers with 0 <= low <= high <= 1."""
    with pytest.raises(ValueError, match="`dropped_words` must be"):
        check_dropped_words(shares)
