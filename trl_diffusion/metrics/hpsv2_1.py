# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Human Preference Score v2.1: HPS v2 with newer weights."""

from trl_diffusion.metrics.hpsv2 import HPSv2Scorer
from trl_diffusion.metrics.scorer import ImageMetric


class HPSv2_1Scorer(HPSv2Scorer):
    """
    HPS v2.1 (https://github.com/tgxs002/HPSv2): like [`HPSv2Scorer`], with weights that its authors trained on better data. Higher is better.

    It is not comparable with HPS v2: the two scores differ by more than models do.

    Args:
        weights_path (`str` or `Path`, *optional*):
            File in the format of `HPS_v2.1_compressed.pt`. Defaults to that file of `xswu/HPSv2` on the Hub.
        clip_name_or_path (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of the base CLIP, for its config, tokenizer and image processor.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the weights are not found, cannot be downloaded or read, or do not fit the model.
    """

    name = "hpsv2_1"
    filename = "HPS_v2.1_compressed.pt"


class HPSv2_1(ImageMetric):
    """
    [`HPSv2_1Scorer`] as a module of `evaluate`:
    `evaluate.load(metric_path("hpsv2_1")).compute(images=[...], prompts=[...])`.
    """

    scorer_type = HPSv2_1Scorer
    citation = """@article{wu2023human,
  title={Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis},
  author={Wu, Xiaoshi and Hao, Yiming and Sun, Keqiang and Chen, Yixiong and Zhu, Feng and Zhao, Rui and Li, Hongsheng},
  journal={arXiv preprint arXiv:2306.09341},
  year={2023}
}"""
