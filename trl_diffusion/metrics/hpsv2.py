# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Human Preference Score v2 (Wu et al., 2023, https://arxiv.org/abs/2306.09341)."""

import html
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import BatchEncoding, CLIPConfig

from trl_diffusion.metrics.clip import VIT_H_14, CosineScorer, reading
from trl_diffusion.metrics.open_clip import load_open_clip
from trl_diffusion.metrics.scorer import ImageMetric
from trl_diffusion.metrics.weights import fetch_file, local_file
from trl_diffusion.revisions import pinned, resolve_revision


STRAIGHT_QUOTES = str.maketrans(dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))


def fit_into_square(image: PIL.Image.Image, size: int) -> torch.Tensor:
    """
    Resizes the longer side to `size`, and centres the image on a black square. Transparency is dropped.

    This follows `resize_longest_max` of https://github.com/tgxs002/HPSv2 with torchvision 0.17 or later: pixels are
    resized as floats, with antialiased bicubic interpolation, and values outside of [0, 1] are kept. Earlier versions
    of torchvision do not antialias, and give other scores.

    Args:
        image (`PIL.Image.Image`):
            The image.
        size (`int`):
            Side of the square in pixels.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`: black is 0, white is 1.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    square = np.zeros((3, size, size), dtype=np.float32)
    for plane, band in zip(square, image.convert("RGB").split(), strict=True):
        resized = band.convert("F").resize((width, height), PIL.Image.Resampling.BICUBIC)
        plane[top : top + height, left : left + width] = np.asarray(resized) / 255
    return torch.from_numpy(square)


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt like open_clip's tokenizer in common cases: unescapes HTML and straightens curly quotes."""
    return html.unescape(html.unescape(prompt)).translate(STRAIGHT_QUOTES)


class HPSv2Scorer(CosineScorer):
    """
    HPS v2 (arXiv:2306.09341): 100 times the cosine similarity of image and prompt in a CLIP ViT-H/14 that was fine-tuned on human
    preferences. Higher is better.

    Papers and the benchmark of the `hpsv2` package also report it times 100; `hpsv2.score` returns the cosine itself.
    The other differences from the package are:
    - This computes in float32, the package in half precision on a GPU.
    - The package repairs prompts with `ftfy`; this does only the common part of it. Prompts with mojibake, ligatures
      or full-width letters can score differently.
    - An image whose longer side is exactly the model's 224 pixels is padded like all others. The package does not pad
      it.
    - In the package, resizing depends on the version of torchvision, see [`fit_into_square`].

    Args:
        weights_path (`str` or `Path`, *optional*):
            File in the format of `HPS_v2_compressed.pt`. Defaults to that file of `xswu/HPSv2` on the Hub.
        clip_name_or_path (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of the base CLIP, for its config, tokenizer and image processor.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the weights are not found, cannot be downloaded or read, or do not fit the model.
    """

    name = "hpsv2"
    repo_id = "xswu/HPSv2"
    filename = "HPS_v2_compressed.pt"

    def __init__(
        self,
        weights_path: str | Path | None = None,
        clip_name_or_path: str = VIT_H_14,
        device: str | None = None,
    ):
        clip_revision = resolve_revision(clip_name_or_path)
        with reading(clip_name_or_path):
            config = CLIPConfig.from_pretrained(clip_name_or_path, **pinned(clip_revision))
        path, revision = fetch_file(self.repo_id, self.filename) if weights_path is None else local_file(weights_path)
        super().__init__(load_open_clip(path, config), clip_name_or_path, clip_revision, device)
        self.weights[str(weights_path or f"{self.repo_id}/{self.filename}")] = revision

    def prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        processor = self.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        return (fit_into_square(image, self.model.config.vision_config.image_size) - mean) / std

    def tokenize(self, prompts: list[str]) -> BatchEncoding:
        return super().tokenize([clean_prompt(prompt) for prompt in prompts])


class HPSv2(ImageMetric):
    """
    [`HPSv2Scorer`] as a module of `evaluate`: `evaluate.load(metric_path("hpsv2")).compute(images=[...],
    prompts=[...])`.
    """

    scorer_type = HPSv2Scorer
    citation = """@article{wu2023human,
  title={Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis},
  author={Wu, Xiaoshi and Hao, Yiming and Sun, Keqiang and Chen, Yixiong and Zhu, Feng and Zhao, Rui and Li, Hongsheng},
  journal={arXiv preprint arXiv:2306.09341},
  year={2023}
}"""
