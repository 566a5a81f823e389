# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Drawing pictures from fixed noise, so that models are compared on the same terms."""

from collections.abc import Iterable

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from .noising import keyed_generator


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int = 0,
    batch_size: int = 8,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
) -> list[PIL.Image.Image]:
    """
    Draws one image a prompt. The noise of the n-th image depends on the seed and on n only: every model that is given the
    same prompts and seed starts from the same noise, whatever the batch size.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        prompts (`list[str]`):
            The prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.
        batch_size (`int`, *optional*, defaults to `8`):
            Images drawn at a time.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Sampling steps.
        guidance_scale (`float`, *optional*, defaults to `7.5`):
            Classifier-free guidance.

    Returns:
        `list[PIL.Image.Image]`: the images, in the order of the prompts.
    """
    images = []
    for start in _progress(pipeline, range(0, len(prompts), batch_size)):
        batch = prompts[start : start + batch_size]
        images += pipeline(
            batch,
            generator=[keyed_generator(seed, start + index, "sample") for index in range(len(batch))],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ).images
    return images


def _progress(pipeline: DiffusionPipeline, batches: Iterable[int]) -> Iterable[int]:
    # One bar for all batches is enough: the pipeline's own, a new one for each batch, is silenced.
    pipeline.set_progress_bar_config(disable=False, desc="Sampling", leave=False)
    bar = pipeline.progress_bar(batches)
    pipeline.set_progress_bar_config(disable=True)
    return bar
