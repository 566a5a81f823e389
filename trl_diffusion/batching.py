# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Lists cut into batches, and work on images spread over the cores."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


CORES = os.cpu_count() or 1  # with more threads than that, they wait for one another


def batched(items: list, size: int) -> Iterator[list]:
    """Cuts a list into lists of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def in_threads(function: Callable, items: Iterable) -> list:
    """Applies a function to all items, side by side: PIL's work on pixels leaves the other cores free."""
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(function, items))
