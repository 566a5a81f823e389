# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Prompts that have lost some of their words, for targets that a model should move away from (DDSPO, arXiv 2512.23426)."""

import torch

from .randomness import keyed_generator


DROPPED_WORDS = (0.4, 0.7)  # as published


def degraded_prompt(prompt: str, dropped_words: list[float], seed: int) -> str:
    """
    Drops some words of a prompt. Which ones depends on the prompt and the seed alone: a prompt loses the same words in every epoch
    and every process, so that the text that is left can be encoded before the training.

    Args:
        prompt (`str`):
            The prompt. Words are what white space separates.
        dropped_words (`list[float]`):
            The smallest and the largest share of words to drop. The share is sampled between them, and rounded to whole words.
        seed (`int`):
            The seed.

    Returns:
        `str`: the other words in their order, with single spaces between them. At least one word is dropped, and one stays if there
        are several, so that a prompt of one word becomes the empty text.
    """
    words = prompt.split()
    if len(words) < 2:
        return ""
    generator = keyed_generator(seed, prompt, "degraded")
    low, high = dropped_words
    share = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
    num_dropped = min(max(round(share * len(words)), 1), len(words) - 1)
    dropped = set(torch.randperm(len(words), generator=generator)[:num_dropped].tolist())
    return " ".join(word for place, word in enumerate(words) if place not in dropped)


def check_dropped_words(dropped_words: list[float]) -> None:
    """Raises a `ValueError` unless `dropped_words` are two shares in order."""
    if len(dropped_words) != 2 or not 0 <= dropped_words[0] <= dropped_words[1] <= 1:
        raise ValueError(
            f"`dropped_words` must be the smallest and the largest share of words to drop, two numbers with 0 <= low <= high <= 1, got "
            f"{dropped_words}."
        )
