# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""#A_neg of CPO (arXiv 2601.04300): the number of attributes of a criteria tree that an image has in negative form."""

from collections.abc import Callable, Collection

import PIL.Image

from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.records import ImageRecord, open_images
from trl_diffusion.batching import in_threads
from trl_diffusion.data.pictures import upright_image
from trl_diffusion.metrics.scorer import ImageMetric, Scorer, ScoringError, qualified_name


class NumNegativeAttributesScorer(Scorer):
    """
    Number of negative attributes of an image according to an expert: #A_neg of CPO (arXiv 2601.04300). Lower is
    better.

    Numbers are comparable only for the same expert and tree, because a larger tree has more attributes to find.

    Args:
        expert ([`AttributeExpert`] or `Callable`):
            The expert of the annotation, or a function such as a trained classifier that takes an upright RGB image
            and its prompt and returns the ids of the negative attributes. A function may raise [`ScoringError`] for an
            image that it cannot score.

    Raises:
        `ValueError`: If the expert cannot be called.
    """

    name = "num_negative_attributes"
    higher_is_better = False

    def __init__(self, expert: AttributeExpert | Callable[[PIL.Image.Image, str], Collection[str]]):
        super().__init__()
        if not callable(expert):
            raise ValueError(
                "`expert` must be an `AttributeExpert`, or a function that takes an image and its prompt and returns the ids "
                f"of its negative attributes, got {expert!r}."
            )
        self.expert = expert
        if isinstance(expert, AttributeExpert):
            self.settings = described = expert.describe()
            self.weights = {
                described["model"]["model"]: described["model"]["revision"],
                "prompt of the expert": f"sha256:{described['prompt']['sha256']}",
                f"criteria {described['criteria']['name']}": f"sha256:{described['criteria']['sha256']}",
            }
        else:
            self.weights = {qualified_name(expert): "unknown"}

    def prepare(self, image: PIL.Image.Image) -> PIL.Image.Image | StoredImage:
        image = upright_image(image)
        if isinstance(self.expert, AttributeExpert):
            return StoredImage.read(image)  # as PNG, which is lossless
        return image

    def score_batch(self, prepared: list, prompts: list[str]) -> list[float | ScoringError]:
        if not isinstance(self.expert, AttributeExpert):
            return [self.count(image, prompt) for image, prompt in zip(prepared, prompts, strict=True)]
        records = [ImageRecord("", prompt, image=image) for image, prompt in zip(prepared, prompts, strict=True)]
        in_threads(open_images, records)  # an image that models refuse becomes an error
        return [
            float(len(record.negative_attributes)) if record.status == "ok" else ScoringError(record.reason)
            for record in self.expert(records)
        ]

    def count(self, image: PIL.Image.Image, prompt: str) -> float | ScoringError:
        """Scores one image with a function."""
        try:
            found = self.expert(image, prompt)
        except ScoringError as error:
            return error
        if isinstance(found, str) or not (
            isinstance(found, Collection) and all(isinstance(name, str) for name in found)
        ):
            raise ValueError(
                f"{qualified_name(self.expert)} must return the ids of an image's negative attributes, such as "
                f"['outline'], or [] if it has none; got {found!r}."
            )
        return float(len(set(found)))


class NumNegativeAttributes(ImageMetric):
    """
    [`NumNegativeAttributesScorer`] as a module of `evaluate`:
    `evaluate.load(metric_path("num_negative_attributes"), expert=expert).compute(images=[...], prompts=[...])`.
    """

    citation = """\
@article{meng2026beyond,
    title  = {{Beyond Binary Preference: Aligning Diffusion Models to Fine-grained Criteria by Decoupling Attributes}},
    author = {Meng, Chenye and Li, Zejian and Liu, Zhongni and Li, Yize and Xie, Changle and Jia, Kaixin and Yang, Ling and
              Deng, Huanghuang and Ding, Shiying and Zhang, Shengyuan and Li, Jiayi and Sun, Lingyun},
    year   = {2026},
    eprint = {arXiv:2601.04300},
}"""
    scorer_type = NumNegativeAttributesScorer
