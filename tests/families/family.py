# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the laws need to know of a family."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from trl_diffusion.backbones import Backbone


class Call(NamedTuple):
    """
    A call of the transformer while its pipeline samples, as the library counts.

    Attributes:
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            The noised latents.
        prediction (`torch.Tensor` of shape `(B, C, h, w)`):
            What it predicts: noise minus image.
    """

    latents: torch.Tensor
    prediction: torch.Tensor


@dataclass(frozen=True)
class Family:
    """
    A family with a tiny pipeline of real classes on random weights.

    Attributes:
        make (`Callable`):
            Makes the pipeline, always with the same weights: `make(**settings_of_the_scheduler)`.
        read_call (`Callable`):
            `read_call(backbone, arguments, output, (height, width))` from the transformer's arguments by name and its output, for an
            image of so many pixels, to a [`Call`].
        settings (`dict`):
            What a training's configuration must say of the tiny pipeline, such as `resolution` and `max_sequence_length`.
        call (`dict`):
            Arguments of the pipeline's call for images without classifier-free guidance.
        guided (`dict` or `None`):
            ... with it; `None` where the pipeline has none.
        branches (`tuple`):
            The branches in each call of the transformer in one guided step, in the order of their rows.
        schedules (`tuple`):
            Settings of the scheduler whose timesteps are compared.
        full_schedule (`Callable`):
            A context in which the pipeline's schedule of 1,000 steps is shifted as the one of the steps that it is used with.
        half_tolerance (`float`):
            By how much predictions may differ in bfloat16, where sums have other lengths than the pipeline's.
        lora_target (`str`):
            A module that a LoRA must adapt by default.
    """

    make: Callable[..., DiffusionPipeline]
    read_call: Callable[[Backbone, dict[str, Any], Any, tuple[int, int]], Call]
    settings: dict[str, Any]
    call: dict[str, Any]
    guided: dict[str, Any] | None
    branches: tuple[tuple[str, ...], ...]
    schedules: tuple[dict[str, Any], ...] = ({},)
    full_schedule: Callable[[], AbstractContextManager] = field(default=nullcontext)
    half_tolerance: float = 1e-5
    lora_target: str = "to_q"
