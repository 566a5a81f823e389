# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What families of flow transformers share: the scheduler's shift, sizes in patches, prompts as long as T5 reads them."""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from ..process import RectifiedFlow
from .base import Backbone


def shift_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, sigmas: torch.Tensor, num_patches: int) -> torch.Tensor:
    """
    Shifts levels of noise as a pipeline shifts its schedule, by the methods of its scheduler: by a constant, or by a `mu` that
    grows with the size of the image; then stretched to the terminal level, if there is one.

    Args:
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]):
            The pipeline's scheduler.
        sigmas (`torch.Tensor` of shape `(N,)`):
            Levels in [0, 1].
        num_patches (`int`):
            Length of the image's sequence.

    Returns:
        `torch.Tensor` of shape `(N,)`
    """
    config = scheduler.config
    sigmas = torch.cat([sigmas, torch.zeros(1)])  # the stretch refers to the last level
    if config.use_dynamic_shifting:
        lengths = config.base_image_seq_len, config.max_image_seq_len
        mu = calculate_shift(num_patches, *lengths, config.base_shift, config.max_shift)
        sigmas = scheduler.time_shift(mu, 1.0, sigmas)
    else:
        sigmas = scheduler.shift * sigmas / (1 + (scheduler.shift - 1) * sigmas)
    if config.shift_terminal:
        sigmas = scheduler.stretch_shift_to_terminal(sigmas)
    return sigmas[:-1]


class FlowBackbone(Backbone):
    """
    A pipeline with a flow transformer as training sees it. See [`backbones.base.Backbone`].
    """

    denoiser_name = "transformer"
    lora_target_modules = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Number of latent positions along a side of a patch."""

    def make_process(self) -> RectifiedFlow:
        scheduler = self.pipeline.scheduler

        def shift(sigmas: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            return shift_sigmas(scheduler, sigmas, (size[0] // self.patch_size) * (size[1] // self.patch_size))

        return RectifiedFlow(scheduler.config.num_train_timesteps, shift=shift)

    def set_timestep_density(self, density: str, **settings: float) -> None:
        scheme = "none" if density == "uniform" else density
        sample = partial(compute_density_for_timestep_sampling, scheme, **settings)
        self.process.density = lambda num, generator: sample(num, generator=generator)

    @contextmanager
    def clip_reads_the_beginning(self) -> Iterator[None]:
        """Where T5 reads a prompt's end, holds back the pipeline's warning of every batch that CLIP does not."""

        def is_told(record: logging.LogRecord) -> bool:
            return "tokenizer" in self.prompt_limits or "CLIP can only handle" not in record.getMessage()

        logger = logging.getLogger(type(self.pipeline).__module__)
        logger.addFilter(is_told)
        try:
            yield
        finally:
            logger.removeFilter(is_told)

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * self.patch_size

    def check_resolution(self, resolution: int | None) -> int:
        resolution = super().check_resolution(resolution)
        if resolution % self.size_multiple:
            raise ValueError(
                f"`resolution` is {resolution}, which is no multiple of {self.size_multiple}, the number of pixels along a side of "
                "a patch of this transformer."
            )
        return resolution
