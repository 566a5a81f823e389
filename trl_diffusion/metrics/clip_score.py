# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The CLIP score: how well an image fits its prompt, according to a CLIP that is not fine-tuned on preferences."""

from trl_diffusion.metrics.clip import VIT_H_14, CosineScorer, load_clip
from trl_diffusion.metrics.scorer import ImageMetric


class CLIPScoreScorer(CosineScorer):
    """
    CLIP score (arXiv:2104.08718): 100 times the cosine similarity of image and prompt in LAION's CLIP ViT-H/14. Higher is better.

    Negative values are kept. The CLIPScore of Hessel et al. (2021) clips them at 0, multiplies by 2.5 instead of 100,
    and uses OpenAI's ViT-B/32. Scores of different models are not comparable.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of the CLIP model, with its tokenizer and image processor.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the weights are not found, cannot be downloaded or read, or do not fit the model.
    """

    name = "clip_score"

    def __init__(self, model_name_or_path: str = VIT_H_14, device: str | None = None):
        model, revision = load_clip(model_name_or_path)
        super().__init__(model, model_name_or_path, revision, device)


class CLIPScore(ImageMetric):
    """
    [`CLIPScoreScorer`] as a module of `evaluate`:
    `evaluate.load(metric_path("clip_score")).compute(images=[...], prompts=[...])`.
    """

    scorer_type = CLIPScoreScorer
    citation = """@inproceedings{hessel2021clipscore,
  title={{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author={Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle={Proceedings of EMNLP},
  year={2021}
}"""
