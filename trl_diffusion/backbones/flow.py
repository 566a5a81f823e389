# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What families of flow transformers share: the scheduler's shift, sizes in patches, prompts as long as T5 reads them."""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from ..process import RectifiedFlow
from .base import Backbone
from .flow_checks import check_flow_pipeline, check_flow_reference, check_scheduler


def shift_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, sigmas: torch.Tensor, mu: float) -> torch.Tensor:
    """
    Shifts levels of noise as a pipeline shifts its schedule, by the methods of its scheduler: by its constant, or by a `mu`;
    then stretched to the terminal level, if there is one.

    Args:
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]):
            The pipeline's scheduler.
        sigmas (`torch.Tensor` of shape `(N,)`):
            Levels in [0, 1].
        mu (`float`):
            What the pipeline gives its scheduler for the size of the image; it counts with `use_dynamic_shifting` only.

    Returns:
        `torch.Tensor` of shape `(N,)`
    """
    config = scheduler.config
    sigmas = torch.cat([sigmas, torch.zeros(1)])  # the stretch refers to the last level
    if config.use_dynamic_shifting:
        sigmas = scheduler.time_shift(mu, 1.0, sigmas)
    else:
        sigmas = scheduler.shift * sigmas / (1 + (scheduler.shift - 1) * sigmas)
    if config.shift_terminal:
        sigmas = scheduler.stretch_shift_to_terminal(sigmas)
    return sigmas[:-1]


class FlowBackbone(Backbone):
    """
    A pipeline with a flow transformer as training sees it. See [`backbones.base.Backbone`]. A family says what it is made of, by the
    attributes below and by [`~FlowBackbone.check_parts`].

    Attributes:
        transformer_class (`type`):
            Class of the transformer.
        text_encoder_classes (`dict[str, str]`):
            Names of the text encoders, and of their classes.
        attention_processors (`tuple[str, ...]`):
            Names of the attention processors that compute plain attention by the layers that are trained and saved.
        transformer_inputs (`tuple[str, ...]`):
            Settings of the transformer that its inputs depend on.
        vae_settings (`tuple[str, ...]`):
            Settings of the VAE that the scale of latents depends on.
    """

    denoiser_name = "transformer"
    lora_target_modules = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    transformer_class: type[torch.nn.Module]
    text_encoder_classes: dict[str, str]
    attention_processors: tuple[str, ...]
    transformer_inputs: tuple[str, ...]
    vae_settings: tuple[str, ...] = ("scaling_factor", "shift_factor")
    check_scheduler = staticmethod(check_scheduler)  # a family's own where its pipeline comes with another one

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        encoders = cls.text_encoders_of(pipeline)
        check_flow_pipeline(pipeline, cls.transformer_class, encoders, cls.attention_processors, cls.check_scheduler)
        cls.check_parts(pipeline)

    @classmethod
    def text_encoders_of(cls, pipeline: DiffusionPipeline) -> dict[str, str]:
        """The text encoders that a pipeline must have."""
        return cls.text_encoder_classes

    @classmethod
    @abstractmethod
    def check_parts(cls, pipeline: DiffusionPipeline) -> None:
        """Raises a `ValueError` where the parts of a pipeline do not belong together."""

    def check_reference(self, pipeline: DiffusionPipeline) -> None:
        check_flow_reference(
            *(self.pipeline, pipeline, self.transformer_inputs, self.text_encoder_names),
            *(self.vae_settings, self.posterior_moments),
        )

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Number of latent positions along a side of a patch."""

    def make_process(self) -> RectifiedFlow:
        scheduler = self.pipeline.scheduler

        def shift(sigmas: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            mu = self.shift_for((size[0] // self.patch_size) * (size[1] // self.patch_size))
            return shift_sigmas(scheduler, sigmas, mu)

        return RectifiedFlow(scheduler.config.num_train_timesteps, shift=shift)

    def shift_for(self, num_patches: int) -> float:
        """The `mu` that the pipeline gives its scheduler for an image of so many patches."""
        config = self.pipeline.scheduler.config
        lengths = config.base_image_seq_len, config.max_image_seq_len
        return calculate_shift(num_patches, *lengths, config.base_shift, config.max_shift)

    def set_timestep_density(self, density: str, **settings: float) -> None:
        scheme = "none" if density == "uniform" else density
        sample = partial(compute_density_for_timestep_sampling, scheme, **settings)
        self.process.density = lambda num, generator: sample(num, generator=generator)

    @property
    def prompt_limits(self) -> dict[str, int]:
        # CLIP, where there is one, gives no more than a summary of the prompt's beginning; the last encoder reads all of it
        return {self.tokenizer_names[-1]: self.max_sequence_length}

    @staticmethod
    def guidance_branches(pipeline, context, arguments) -> tuple[str, ...]:
        # Most pipelines call the transformer once for each branch, and name it
        return ("unconditional",) if context == "uncond" else ("conditional",)

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
