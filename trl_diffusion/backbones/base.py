# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What training asks of a diffusers pipeline, whatever its family."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DDPMScheduler, DiffusionPipeline


class Backbone(ABC):
    """
    Training's view of a diffusers pipeline: its denoiser, its encoders and its noise schedule.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The loaded pipeline. Its encoders are frozen.

    Attributes:
        pipeline_class (`type`):
            The pipeline family.
        denoiser_name (`str`):
            Name of the pipeline's component that is trained.
        encoder_names (`tuple[str, ...]`):
            Names of the frozen components that training needs.
        tokenizer_names (`tuple[str, ...]`):
            Names of the tokenizers that read a prompt.
        lora_target_modules (`tuple[str, ...]`):
            Module names that a LoRA targets if its configuration names none: the attention projections.
        alphas_cumprod (`torch.Tensor` of shape `(T,)`):
            The noise schedule, float32.
        prediction_type (`str`):
            What the denoiser predicts, `"epsilon"` or `"v_prediction"`.
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name: str
    encoder_names: tuple[str, ...]
    tokenizer_names: tuple[str, ...]
    lora_target_modules: tuple[str, ...]

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        for name in self.encoder_names:
            getattr(pipeline, name).requires_grad_(False).eval()
        # Whatever scheduler the pipeline samples with, its configuration holds the schedule that the model was trained
        # with, and DDPMScheduler computes that in float32.
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.alphas_cumprod = self.noise_scheduler.alphas_cumprod
        self.prediction_type = self.noise_scheduler.config.prediction_type
        self.device = torch.device("cpu")
        self.offloaded: tuple[str, ...] = ()

    @property
    def denoiser(self) -> torch.nn.Module:
        """The component that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def default_resolution(self) -> int:
        """Width and height in pixels that the denoiser was trained at."""
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        """What the sides of an image are multiples of, in pixels, so that VAE and denoiser halve them without rest."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def to(self, device: torch.device) -> None:
        """Moves the encoders and the noise schedule to a device; the denoiser is the Trainer's to move."""
        for name in self.encoder_names:
            getattr(self.pipeline, name).to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        self.device = device

    def offload(self, names: tuple[str, ...]) -> None:
        """
        Moves encoders that training needs no longer to the CPU. They are lent the device for drawing.

        Args:
            names (`tuple[str, ...]`):
                Names of these encoders.
        """
        self.offloaded = names
        for name in names:
            getattr(self.pipeline, name).to("cpu")

    def fits(self, prompt: str) -> bool:
        """
        Whether the text encoders see the whole of a prompt, and not only its first 77 tokens.

        Args:
            prompt (`str`):
                The prompt.

        Returns:
            `bool`
        """
        tokenizers = [getattr(self.pipeline, name) for name in self.tokenizer_names]
        return all(
            len(tokenizer(prompt, verbose=False).input_ids) <= tokenizer.model_max_length for tokenizer in tokenizers
        )

    @contextmanager
    def drawing_with(self, denoiser: torch.nn.Module) -> Iterator[DiffusionPipeline]:
        """
        Lends the pipeline with another denoiser in place of its own.

        Args:
            denoiser (`torch.nn.Module`):
                Policy or reference.

        Yields:
            [`~diffusers.DiffusionPipeline`]: the pipeline, which draws with `denoiser`.
        """
        own = self.denoiser
        setattr(self.pipeline, self.denoiser_name, denoiser)
        for name in self.offloaded:
            getattr(self.pipeline, name).to(self.device)
        try:
            yield self.pipeline
        finally:
            setattr(self.pipeline, self.denoiser_name, own)
            self.offload(self.offloaded)

    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes images to the moments of the VAE's posterior.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images in [-1, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, each of shape `(B, C, h, w)`: mean and standard deviation of the latents
            in the denoiser's scale, float32.
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """
        Encodes prompts to the denoiser's text conditions.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts; the empty string is the unconditional prompt.

        Returns:
            `dict[str, torch.Tensor]`: tensors whose first dimension is `B`.
        """

    @abstractmethod
    def image_conditions(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """
        The denoiser's conditions that describe how an image was made.

        Args:
            original_sizes (`torch.Tensor` of shape `(B, 2)`):
                (height, width) in pixels of the upright image before resizing.
            crop_top_lefts (`torch.Tensor` of shape `(B, 2)`):
                (top, left) in pixels of the crop in the resized image.
            target_size (`tuple[int, int]`):
                (height, width) in pixels of the crop.

        Returns:
            `dict[str, torch.Tensor]`: tensors whose first dimension is `B`; empty where the family has no such
            conditions.
        """

    @abstractmethod
    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """
        Calls a denoiser of this family.

        Args:
            denoiser (`torch.nn.Module`):
                Policy or reference, wrapped or not.
            noisy_latents (`torch.Tensor` of shape `(B, C, h, w)`):
                Noised latents `x_t`.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps.
            conditions (`dict[str, torch.Tensor]`):
                What [`~Backbone.encode_prompts`] and [`~Backbone.image_conditions`] returned, together.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: the prediction.
        """
