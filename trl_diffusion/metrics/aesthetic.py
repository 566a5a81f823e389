# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The aesthetic score of LAION (https://github.com/christophschuhmann/improved-aesthetic-predictor)."""

from collections import OrderedDict
from pathlib import Path

import PIL.Image
import torch
from torch.nn import Dropout, Linear, Sequential
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil

from trl_diffusion.metrics.clip import clip_pixels, load_clip, reading
from trl_diffusion.metrics.scorer import ImageMetric, Scorer
from trl_diffusion.metrics.weights import fetch_file, load_tensors, local_file, read_tensors
from trl_diffusion.revisions import pinned


def aesthetic_head(width: int) -> Sequential:
    """
    Builds the head that turns an embedding into a score, with the parameter names of the published weights. It has no
    activations between the layers.

    Args:
        width (`int`):
            Width of the embedding.

    Returns:
        `Sequential`: maps unit vectors of shape `(B, width)` to scores of shape `(B, 1)`.
    """
    layers = Sequential(
        Linear(width, 1024),
        Dropout(0.2),
        Linear(1024, 128),
        Dropout(0.2),
        Linear(128, 64),
        Dropout(0.1),
        Linear(64, 16),
        Linear(16, 1),
    )
    return Sequential(OrderedDict(layers=layers))


class AestheticScorer(Scorer):
    """
    LAION-Aesthetics V2 predicts how people would rate the look of an image from 1 to 10, from its normalized CLIP
    embedding. Higher is better. The score does not depend on the prompt.

    The weights are those of `sac+logos+ava1-l14-linearMSE` (https://github.com/christophschuhmann/improved-aesthetic-predictor).

    Args:
        weights_path (`str` or `Path`, *optional*):
            File in the format of `sac+logos+ava1-l14-linearMSE.pth`. Defaults to `aesthetic-model.pth` of
            `trl-lib/ddpo-aesthetic-predictor` on the Hub, which is that file.
        clip_name_or_path (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of the CLIP model.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the weights are not found, cannot be downloaded or read, or do not fit the model.
    """

    name = "aesthetic"
    needs_prompts = False
    repo_id = "trl-lib/ddpo-aesthetic-predictor"
    filename = "aesthetic-model.pth"

    def __init__(
        self,
        weights_path: str | Path | None = None,
        clip_name_or_path: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
    ):
        super().__init__(device)
        path, head_revision = (
            fetch_file(self.repo_id, self.filename) if weights_path is None else local_file(weights_path)
        )
        clip, revision = load_clip(clip_name_or_path)
        del clip.text_model  # half a gigabyte that is not used
        head = aesthetic_head(clip.config.projection_dim)
        load_tensors(head, read_tensors(path), str(path))
        self.clip, self.head = clip.to(self.device).eval(), head.to(self.device).eval()
        with reading(clip_name_or_path):
            self.image_processor = CLIPImageProcessorPil.from_pretrained(clip_name_or_path, **pinned(revision))
        self.weights = {
            str(weights_path or f"{self.repo_id}/{self.filename}"): head_revision,
            clip_name_or_path: revision,
        }

    def prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        return clip_pixels(image, self.image_processor)

    @torch.inference_mode()
    def score_batch(self, prepared: list[torch.Tensor], prompts: None = None) -> list[float]:
        embeddings = self.clip.get_image_features(pixel_values=torch.stack(prepared).to(self.device)).pooler_output
        return self.head(normalize(embeddings)).squeeze(-1).tolist()


class Aesthetic(ImageMetric):
    """
    [`AestheticScorer`] as a module of `evaluate`: `evaluate.load(metric_path("aesthetic")).compute(images=[...])`.
    """

    scorer_type = AestheticScorer
    citation = """@inproceedings{schuhmann2022laion,
  title={{LAION-5B}: An Open Large-scale Dataset for Training Next Generation Image-text Models},
  author={Schuhmann, Christoph and Beaumont, Romain and Vencu, Richard and Gordon, Cade and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}"""
