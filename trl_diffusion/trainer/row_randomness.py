# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is random about the rows of a batch: keys, timesteps, dropped prompts."""

from collections.abc import Callable, Iterator

import torch

from ..process import Process
from ..randomness import keyed_generator


NUM_EVAL_TIMESTEPS = 8


class RowRandomness:
    """
    The randomness of rows, as a function of the seed, the moment and the row's id.

    Args:
        seed (`int`):
            The seed.
        process ([`process.Process`]):
            Samples timesteps.
        prompt_dropout (`float`):
            Probability of replacing a prompt by the unconditional branch in training.
        moment (`Callable`):
            The moment: the global step or the epoch in training, `None` in an evaluation, where nothing changes with time.
    """

    def __init__(self, seed: int, process: Process, prompt_dropout: float, moment: Callable[[], int | str | None]):
        self.seed = seed
        self.process = process
        self.prompt_dropout = prompt_dropout
        self.moment = moment

    def later(self, steps: int) -> "RowRandomness":
        """The randomness of the same rows so many steps from now, within the epoch."""
        moment = self.moment()
        moment = moment + steps if isinstance(moment, int) else moment
        return RowRandomness(self.seed, self.process, self.prompt_dropout, lambda: moment)

    def key(self, row_id: str, column: str = "") -> tuple:
        """The key of a row, or of its image in a column, see [`randomness.keyed_generator`]."""
        moment = self.moment()
        return self.seed, "eval" if moment is None else moment, row_id, column

    def image_keys(self, ids: list[str], columns: tuple[str, ...]) -> list[tuple]:
        """The keys of the images of rows, one column after the other."""
        return [self.key(row_id, column) for column in columns for row_id in ids]

    def drop_prompts(self, prompts: list[str], ids: list[str]) -> list[str | None]:
        """
        Replaces each prompt by the unconditional branch, `None`, with the probability `prompt_dropout` in training.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts.
            ids (`list[str]` of length `B`):
                Ids of the rows.

        Returns:
            `list[str]` of length `B`
        """
        if self.moment() is None or self.prompt_dropout == 0:
            return prompts
        uniform = [torch.rand((), generator=keyed_generator(*self.key(row_id), "prompt")) for row_id in ids]
        return [None if u < self.prompt_dropout else prompt for u, prompt in zip(uniform, prompts, strict=True)]

    def timesteps(self, ids: list[str], size: tuple[int, int]) -> Iterator[tuple[torch.Tensor, list[tuple]]]:
        """
        Timesteps of rows: sampled once in training, 8 fixed ones in an evaluation.

        Args:
            ids (`list[str]` of length `B`):
                Ids of the rows.
            size (`tuple[int, int]`):
                Height and width of their latents.

        Yields:
            `tuple[torch.Tensor, list[tuple]]`: timesteps `(B,)` on the CPU, and the keys of the noise that belongs to them.
        """
        keys = [self.key(row_id) for row_id in ids]
        if self.moment() is not None:
            yield self.process.sample_timesteps(keys, size), keys
        else:
            for timestep in self.process.evaluation_timesteps(NUM_EVAL_TIMESTEPS, size):
                yield torch.full((len(ids),), timestep), [(*key, timestep) for key in keys]
