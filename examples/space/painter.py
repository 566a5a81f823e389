# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The first tab: images of a base model and of its LoRAs, all from one noise."""

from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from worlds import World

from trl_diffusion import negative_preference_guidance, sample_images
from trl_diffusion.backbones import load_pipeline
from trl_diffusion.lora_files import find_lora, load_lora
from trl_diffusion.sampling import default_argument


BASE = "Base"
REVERSED = "reversed"


class Painter:
    """
    A base model with all LoRAs of its world, each of which can be switched on alone.

    Args:
        world ([`World`]):
            The world. Its models are loaded at once, to the GPU if there is one.
    """

    def __init__(self, world: World):
        self.world = world
        has_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if has_gpu and not world.is_tiny else torch.float32
        self.pipeline = load_pipeline(world.base, dtype=dtype).to("cuda" if has_gpu else "cpu")
        self.adapters = {title: f"lora_{number}" for number, title in enumerate(world.loras)}
        for title, adapter in self.adapters.items():
            load_lora(self.pipeline, find_lora(world.loras[title]), adapter)
        if world.reversed_lora is not None:
            load_lora(self.pipeline, find_lora(world.reversed_lora), REVERSED)
        self.num_inference_steps = world.num_inference_steps or default_argument(
            type(self.pipeline), "num_inference_steps"
        )

    @property
    def titles(self) -> list[str]:
        """Titles of the images: the base, then the LoRAs."""
        return [BASE, *self.adapters]

    def draw(self, title: str, prompt: str, seed: int, scale: float = 1.0, npo: bool = False) -> Image.Image:
        """
        Draws one image. The noise that it starts from depends on the seed alone, so it is the same for all titles.

        Args:
            title (`str`):
                Which model draws, one of `titles`. The base ignores `scale` and `npo`.
            prompt (`str`):
                The prompt.
            seed (`int`):
                Seed of the noise.
            scale (`float`, *optional*, defaults to `1.0`):
                Strength of the LoRA. At 0 the image is the base's.
            npo (`bool`, *optional*, defaults to `False`):
                Negative preference guidance: in the unconditional branch, the LoRA and the reversed LoRA with half of the
                strength each.

        Returns:
            `PIL.Image.Image`

        Raises:
            `ValueError`: If the prompt is empty, or the world has no reversed LoRA for `npo`.
        """
        if not prompt.strip():
            raise ValueError("The prompt is empty. Write what the image should show.")
        if npo and self.world.reversed_lora is None:
            raise ValueError("Negative preference guidance needs a reversed LoRA: set `REVERSED_LORA`.")
        with self.model(title, scale, npo):
            (image,) = sample_images(
                self.pipeline,
                [prompt],
                seed=seed,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.world.guidance_scale,
                disable_tqdm=True,
            )
        return image

    def model(self, title: str, scale: float, npo: bool) -> AbstractContextManager:
        """Switches to the model of a title; what is returned must be open while it draws."""
        if title == BASE or scale == 0:
            self.pipeline.disable_lora()
            return nullcontext()
        adapter = self.adapters[title]
        self.pipeline.enable_lora()
        self.pipeline.set_adapters([adapter], [scale])
        if not npo:
            return nullcontext()
        return negative_preference_guidance(self.pipeline, {adapter: scale}, {adapter: scale, REVERSED: scale})


def side_by_side(painter: Painter, prompt: str, seed: int, scale: float, npo: bool) -> list[Image.Image]:
    """The images of all titles of a painter, from one noise."""
    return [painter.draw(title, prompt, seed, scale, npo) for title in painter.titles]
