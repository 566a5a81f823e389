# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Latents and conditions of a batch: encoded in the step, or looked up where they were precomputed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from ..backbones.base import Backbone
from ..data.caching import TensorCache, check_encoded
from ..data.transforms import normalize_pixels
from .ahead import Ahead, Need, take_rows
from .fingerprints import module_fingerprint
from .row_randomness import RowRandomness


class BatchEncoder:
    """
    Encodes the images and prompts of batches, without gradient.

    Args:
        backbone ([`backbones.base.Backbone`]):
            The backbone.
        device (`torch.device`):
            Device of the training.
        half_dtype (`torch.dtype` or `None`):
            The type of mixed precision, if any.
        image_columns (`tuple[str, ...]`):
            The `n` image columns of a row. Their latents are in one batch, one column after the other.
        size_conditions (`str`):
            See [`DiffusionConfig`].

    Attributes:
        prompt_cache ([`data.caching.TensorCache`], *optional*):
            Text conditions by prompt, where prompts were precomputed.
        ahead ([`trainer.ahead.Ahead`]):
            Has noise and conditions of the batch at hand ready.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        half_dtype: torch.dtype | None,
        image_columns: tuple[str, ...],
        size_conditions: str,
    ):
        self.backbone = backbone
        self.device = device
        self.half_dtype = half_dtype
        self.image_columns = image_columns
        self.size_conditions = size_conditions
        self.prompt_cache: TensorCache | None = None
        self.ahead = Ahead(device, backbone.host_conditions)
        self.fingerprints: dict[str, str] = {}
        self.borrowed: ExitStack | None = None

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes images to the moments of the VAE's posterior.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images: uint8, or floating point numbers in [-1, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, each of shape `(B, C, h, w)`: float32 mean and standard deviation.
        """
        with self._borrow("vae"):
            is_autocast = not self.backbone.pipeline.vae.config.get("force_upcast", False)
            with self._autocast(is_autocast):
                return self.backbone.encode_images(normalize_pixels(pixel_values))

    def sample_latents(self, inputs: dict[str, Any], keys: list[tuple]) -> torch.Tensor:
        """
        Samples latents of a batch's images from the VAE's posterior with keyed noise.

        Args:
            inputs (`dict`):
                A batch of the collator.
            keys (`list[tuple]` of length `n * B`):
                Keys of the noise, see [`randomness.keyed_generator`].

        Returns:
            `torch.Tensor` of shape `(n * B, C, h, w)`: float32 latents in the denoiser's scale.

        Raises:
            `ValueError`: If a row was not encoded that should have been, see [`data.caching.check_encoded`].
        """
        check_encoded(inputs)
        columns = self.image_columns
        if f"{columns[0]}_latents_mean" in inputs:
            mean, std = (
                torch.cat(
                    [inputs[f"{column}_latents_{what}"].float() for column in columns]
                )  # autocast joins no float16
                for what in ("mean", "std")
            )
        else:
            mean, std = self.encode_images(
                torch.cat([normalize_pixels(inputs[f"{column}_pixel_values"]) for column in columns])
            )
        return mean + std * self.ahead.noise(keys, mean.shape[1:], mean.device)

    def need(
        self,
        randomness: RowRandomness,
        prompts_of: Callable[[dict[str, Any]], list[str | None]],
        is_noised: bool,
        noised_caches: list[TensorCache],
        inputs: dict[str, Any],
        steps: int,
    ) -> Need:
        """
        What a batch draws and looks up in training, as far as it is known beforehand.

        Args:
            randomness ([`trainer.row_randomness.RowRandomness`]):
                The randomness of rows.
            prompts_of (`Callable`):
                From a row to all prompts that may be looked up for it.
            is_noised (`bool`):
                Whether rows are noised by random noise.
            noised_caches (`list[TensorCache]`):
                The cache of noised rows that the epoch reads, if there is one. It may lack rows, which are noised live.
            inputs (`dict`):
                A batch of the collator.
            steps (`int`):
                The number of steps until it is trained on.

        Returns:
            [`trainer.ahead.Need`]
        """
        check_encoded(inputs)
        randomness, ids = randomness.later(steps), inputs["id"]
        noised_caches = with_rows(noised_caches, ids)
        noise = [randomness.image_keys(ids, self.image_columns)]
        if is_noised and not noised_caches:
            noise.append([randomness.key(row_id) for row_id in ids])
        rows = dict.fromkeys(noised_caches, ids)
        if self.prompt_cache is not None:
            texts = {name: values for name, values in inputs.items() if isinstance(values, list)}
            examples = [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]
            rows[self.prompt_cache] = list(dict.fromkeys(prompt for row in examples for prompt in prompts_of(row)))
        return Need(noise, self.latent_shape(inputs), rows)

    def latent_shape(self, inputs: dict[str, Any]) -> tuple[int, ...]:
        """Shape `(C, h, w)` of the latents of a batch's images."""
        column = self.image_columns[0]
        if f"{column}_latents_mean" in inputs:
            return tuple(inputs[f"{column}_latents_mean"].shape[1:])
        sides = (side // self.backbone.vae_scale_factor for side in inputs[f"{column}_pixel_values"].shape[2:])
        return self.backbone.latent_channels, *sides

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        """
        Encodes prompts, each once however often it occurs, or looks them up.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts; `None` is the unconditional branch.

        Returns:
            `dict[str, torch.Tensor]`: text conditions whose first dimension is `B`.
        """
        if self.prompt_cache is not None and all(prompt in self.prompt_cache.places for prompt in prompts):
            return self.ahead.rows(self.prompt_cache, prompts)
        different = list(dict.fromkeys(prompts))
        with self._autocast(), self._borrow(*self.backbone.text_encoder_names):
            conditions = self.backbone.encode_prompts(different)
        if len(different) == len(prompts):
            return conditions
        return take_rows(conditions, torch.tensor([different.index(prompt) for prompt in prompts]))

    def conditions(
        self, prompts: list[str | None], inputs: dict[str, Any], latents: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        The denoiser's conditions: those of the text, and those that describe how each image was made.

        Args:
            prompts (`list[str]` of length `B`, or `m * B`):
                The prompts. Each is encoded once for all images of its row; `m` prompts a row are `m` copies of the batch.
            inputs (`dict`):
                A batch of the collator.
            latents (`torch.Tensor` of shape `(n * B, C, h, w)`):
                The latents of its images.

        Returns:
            `dict[str, torch.Tensor]`: tensors whose first dimension is `n * m * B`.
        """
        height, width = (side * self.backbone.vae_scale_factor for side in latents.shape[2:])
        if self.size_conditions == "original":
            original_sizes, crop_top_lefts = (
                torch.cat([inputs[f"{column}_{what}"] for column in self.image_columns])
                for what in ("original_sizes", "crop_top_lefts")
            )
        else:
            sides = [torch.full((len(latents), 1), side, device=latents.device) for side in (height, width)]
            original_sizes = torch.cat(sides, dim=1)
            crop_top_lefts = torch.zeros_like(original_sizes)
        of_images = self.backbone.image_conditions(original_sizes, crop_top_lefts, (height, width))
        of_text = self.encode_prompts(prompts)
        copies = len(prompts) // len(inputs["id"])
        return {name: torch.cat([value] * len(self.image_columns)) for name, value in of_text.items()} | {
            name: torch.cat([value] * copies) for name, value in of_images.items()
        }

    def fingerprint(self, name: str) -> str:
        """The [`trainer.fingerprints.module_fingerprint`] of an encoder, which is remembered once it is offloaded."""
        if name not in self.backbone.offloaded:
            self.fingerprints[name] = module_fingerprint(getattr(self.backbone.pipeline, name))
        return self.fingerprints[name]

    @contextmanager
    def keeping_encoders(self) -> Iterator[None]:
        """While the context lasts, offloaded encoders stay once a batch has brought them back."""
        try:
            with ExitStack() as self.borrowed:
                yield
        finally:
            self.borrowed = None

    def _borrow(self, *names: str) -> AbstractContextManager:
        """Where rows were not precomputed, such as those of `evaluate(dataset)`, offloaded encoders come back."""
        if not set(names) & set(self.backbone.offloaded):
            return nullcontext()
        if self.borrowed is None:
            return self.backbone.encoders_on_device()
        self.borrowed.enter_context(self.backbone.encoders_on_device())
        return nullcontext()

    def _autocast(self, enabled: bool = True) -> AbstractContextManager:
        if self.half_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.half_dtype, enabled)


def with_rows(caches: list[TensorCache], ids: list[str]) -> list[TensorCache]:
    """Those of some caches that have all of some rows."""
    return [cache for cache in caches if all(row_id in cache.places for row_id in ids)]
