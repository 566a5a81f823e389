# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Reads ahead of what is computed, and writes behind it, in threads and with a bounded number of items in memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


CORES = os.cpu_count() or 1


def ahead(function: Callable, items: Iterable, number: int) -> Generator[Any]:
    """
    Applies a function to items in threads, in their order.

    Args:
        function (`Callable`):
            The function. What it raises is raised at the item's turn.
        items (`Iterable`):
            The items.
        number (`int`):
            How many items are taken before the one that is asked for.

    Yields:
        The results.
    """
    pending, threads = deque(), ThreadPoolExecutor(CORES)
    try:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > number:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def behind(number: int) -> Generator[Callable[..., None]]:
    """
    Lends a function that calls others in one thread, one after the other.

    Args:
        number (`int`):
            How many calls may wait. With more, the caller does.

    Yields:
        `Callable`: is given a function and its arguments. What a call raises is raised by a later one, or at the end, and no
        call is made after it. What the caller raises lets the calls before it end.
    """
    pending, thread, failures = deque(), ThreadPoolExecutor(1), []

    def run(function: Callable, *args: Any) -> None:
        if not failures:
            try:
                function(*args)
            except BaseException as error:
                failures.append(error)
                raise

    def call(function: Callable, *args: Any) -> None:
        pending.append(thread.submit(run, function, *args))
        while len(pending) > number:
            pending.popleft().result()

    try:
        yield call
        while pending:
            pending.popleft().result()
    finally:
        thread.shutdown()
