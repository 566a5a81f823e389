# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Prompts that have lost some of their words, for targets that a model should move away from (DDSPO, arXiv 2512.23426)."""

import re

import torch

from .randomness import keyed_generator


DROPPED_WORDS = (0.4, 0.7)  # as published
# Chinese and Japanese characters and their punctuation, but for the ideographic space
IDEOGRAPHS = "\u2e80-\u2fff\u3001-\u312f\u3190-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
WORD = re.compile(rf"\s*(?:[{IDEOGRAPHS}]|[^\s{IDEOGRAPHS}]+)")  # with the white space before it


def degraded_prompt(prompt: str, dropped_words: list[float], seed: int) -> str:
    """
    Drops some words of a prompt. Which ones depends on the prompt and the seed alone: a prompt loses the same words in every epoch
    and every process, so that the text that is left can be encoded before the training.

    Args:
        prompt (`str`):
            The prompt. Words are what white space separates; of Chinese and Japanese, which do without, each character is one.
        dropped_words (`list[float]`):
            The smallest and the largest share of words to drop. The share is sampled between them, and rounded to whole words.
        seed (`int`):
            The seed.

    Returns:
        `str`: the other words in their order, with single spaces where there was white space. At least one word is dropped, and one
        stays if there are several, so that a prompt of one word becomes the empty text.
    """
    words = WORD.findall(prompt)
    if len(words) < 2:
        return ""
    generator = keyed_generator(seed, prompt, "degraded")
    low, high = dropped_words
    share = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
    num_dropped = min(max(round(share * len(words)), 1), len(words) - 1)
    dropped = set(torch.randperm(len(words), generator=generator)[:num_dropped].tolist())
    left = "".join(word for place, word in enumerate(words) if place not in dropped)
    return " ".join(left.split())


def check_dropped_words(dropped_words: list[float]) -> None:
    """Raises a `ValueError` unless `dropped_words` are two shares in order."""
    is_list = isinstance(dropped_words, list | tuple) and all(
        isinstance(share, int | float) for share in dropped_words
    )
    if not is_list or len(dropped_words) != 2 or not 0 <= dropped_words[0] <= dropped_words[1] <= 1:
        raise ValueError(
            f"`dropped_words` must be the smallest and the largest share of words to drop, two numbers with 0 <= low <= high <= 1, got "
            f"{dropped_words}."
        )
