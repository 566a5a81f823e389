# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Splits lists into batches, and applies functions in threads."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


CORES = os.cpu_count() or 1  # more threads than this would wait for each other


def batched(items: list, size: int) -> Iterator[list]:
    """Splits a list into batches of at most `size` items, which must be positive."""
    if size < 1:  # with -1, there would be no batch at all
        raise ValueError(f"A batch size must be at least 1, got {size}.")
    return (items[start : start + size] for start in range(0, len(items), size))


def in_threads(function: Callable, items: Iterable) -> list:
    """Applies a function to all items in parallel threads. PIL releases the global interpreter lock."""
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(function, items))
