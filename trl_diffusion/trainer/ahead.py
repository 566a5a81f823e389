# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Noise and precomputed rows of the next batch, made ready by a thread while the device works on the batch before it."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from transformers import TrainerState

from ..data.caching import TensorCache
from ..randomness import keyed_noise


class Need(NamedTuple):
    """
    What a batch draws and looks up.

    Attributes:
        noise (`list[list[tuple]]`):
            Keys of its noise, see [`randomness.keyed_noise`].
        shape (`tuple[int, ...]`):
            Shape of one row's noise.
        rows (`dict[TensorCache, list[str]]`):
            The different keys that are looked up in each cache.
    """

    noise: list[list[tuple]]
    shape: tuple[int, ...]
    rows: dict[TensorCache, list[str | None]]


class Ahead:
    """
    Makes what the next batch needs in a thread. What was not foreseen is made when it is asked for, with the same numbers.

    Args:
        device (`torch.device`):
            Device of the training. For CUDA, results wait in pinned memory.
        on_host (`tuple[str, ...]`, *optional*):
            Names of the cached tensors that stay on the CPU.
    """

    def __init__(self, device: torch.device, on_host: tuple[str, ...] = ()):
        self.device = device
        self.on_host = on_host
        self.is_pinned = device.type == "cuda"
        self.thread: ThreadPoolExecutor | None = None
        self._forget()

    def close(self) -> None:
        """Ends the thread, and forgets what it made and which batches were read."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
            self.thread = None
        self._forget()

    def _forget(self) -> None:
        self.reader: Reader | None = None
        self.coming: deque[Callable[[], Need]] = deque()
        self.made: tuple[Need, Future] | None = None

    def read(self, batches: Iterator[dict[str, Any]]) -> "Reader":
        """The [`trainer.ahead.Reader`] of an epoch's batches, the same one as long as they are."""
        if self.reader is None or self.reader.batches is not batches:
            self.reader, self.made = Reader(batches), None
        return self.reader

    def plan(
        self, need: Callable[[dict[str, Any], int], Need], batches: list[dict[str, Any]], state: TrainerState
    ) -> None:
        """
        Tells which batches a step has.

        Args:
            need (`Callable`):
                From a batch and the number of steps until its own to what it needs.
            batches (`list[dict]`):
                The batches of the step, which were read just now.
            state ([`~transformers.TrainerState`]):
                Tells whether another step follows, whose first batch is then read as well.
        """
        next_step = self.reader.peek() if state.global_step + 1 < state.max_steps else []
        steps = [(batch, 0) for batch in batches] + [(batch, 1) for batch in next_step]
        self.coming = deque(partial(need, batch, step) for batch, step in steps)
        if self.made is None:
            self.advance()
        else:  # begun in the step before
            self.coming.popleft()

    def advance(self) -> None:
        """Forgets what the last batch needed, and begins to make what the next one needs."""
        self.made = None
        if self.coming:
            self.thread = self.thread or ThreadPoolExecutor(1, "trl_diffusion_ahead")
            need = self.coming.popleft()()
            self.made = need, self.thread.submit(self._make, need)

    def _make(self, need: Need) -> tuple[list[torch.Tensor], dict[TensorCache, dict[str, torch.Tensor]]]:
        return (
            [keyed_noise(keys, need.shape, pin_memory=self.is_pinned) for keys in need.noise],
            {cache: cache.look_up(keys, self.is_pinned) for cache, keys in need.rows.items()},
        )

    def noise(self, keys: list[tuple], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """[`randomness.keyed_noise`], which may be ready."""
        if self.made is not None:
            need, made = self.made
            if keys in need.noise and tuple(shape) == need.shape:
                return made.result()[0][need.noise.index(keys)].to(device, non_blocking=True)
        return keyed_noise(keys, shape, device)

    def rows(self, cache: TensorCache, keys: list[str | None]) -> dict[str, torch.Tensor]:
        """Rows of a cache, which may be ready, on the device; see [`data.caching.TensorCache`]."""
        ready = [] if self.made is None else self.made[0].rows.get(cache, [])
        is_ready = set(keys) <= set(ready)
        tensors = self.made[1].result()[1][cache] if is_ready else cache.look_up(keys, self.is_pinned)
        tensors = {
            name: value if name in self.on_host else value.to(self.device, non_blocking=True)
            for name, value in tensors.items()
        }
        if not is_ready or keys == ready:
            return tensors
        return take_rows(tensors, torch.tensor([ready.index(key) for key in keys]))


def take_rows(tensors: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of tensors on several devices, by their indices on the CPU."""
    return {name: value[rows.to(value.device, non_blocking=True)] for name, value in tensors.items()}


class Reader:
    """
    An iterator that can tell what comes next.

    Args:
        batches (`Iterator`):
            The batches of an epoch.
    """

    def __init__(self, batches: Iterator[dict[str, Any]]):
        self.batches = batches
        self.seen: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return self.seen.pop() if self.seen else next(self.batches)

    def peek(self) -> list[dict[str, Any]]:
        """The next batch, which is read but not taken; none at the end."""
        self.seen = self.seen or list(islice(self.batches, 1))
        return self.seen
