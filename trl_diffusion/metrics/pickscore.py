# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""PickScore (Kirstain et al., NeurIPS 2023, https://arxiv.org/abs/2305.01569)."""

from trl_diffusion.metrics.clip import VIT_H_14, CosineScorer, load_clip
from trl_diffusion.metrics.scorer import ImageMetric
from trl_diffusion.revisions import resolve_revision


class PickScoreScorer(CosineScorer):
    """
    PickScore: the cosine similarity of image and prompt times the learned logit scale, in a CLIP ViT-H/14 that was
    fine-tuned on the preferences of Pick-a-Pic. Higher is better.

    Follows https://github.com/yuvalkirstain/PickScore, in float32. Papers with values near 0.2 report this score
    divided by 100.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of the model.
        processor_name_or_path (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of the tokenizer and the image processor.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the weights are not found, cannot be downloaded or read, or do not fit the model.
    """

    name = "pickscore"

    def __init__(
        self,
        model_name_or_path: str = "yuvalkirstain/PickScore_v1",
        processor_name_or_path: str = VIT_H_14,
        device: str | None = None,
    ):
        model, revision = load_clip(model_name_or_path)
        super().__init__(model, processor_name_or_path, resolve_revision(processor_name_or_path), device)
        self.weights[model_name_or_path] = revision
        self.scale = model.logit_scale.exp().item()


class PickScore(ImageMetric):
    """
    [`PickScoreScorer`] as a module of `evaluate`:
    `evaluate.load(metric_path("pickscore")).compute(images=[...], prompts=[...])`.
    """

    scorer_type = PickScoreScorer
    citation = """@inproceedings{kirstain2023pick,
  title={Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation},
  author={Kirstain, Yuval and Polyak, Adam and Singer, Uriel and Matiana, Shahbuland and Penna, Joe and Levy, Omer},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023}
}"""
