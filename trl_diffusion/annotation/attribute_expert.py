# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The attribute expert of CPO (arXiv 2601.04300) finds which attributes of the tree an image has."""

from collections import Counter
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, create_model, model_validator

from ..batching import in_threads
from ..criteria import Criteria
from .records import ImageRecord
from .vlm import VLM, PromptTemplate, Request, ask


class DimensionAnswer(BaseModel):
    """The expert's answer on one dimension, as ids of attributes."""

    positive: list[str]
    negative: list[str]

    @model_validator(mode="after")
    def each_id_once(self):
        ids = Counter([*self.positive, *self.negative])
        if twice := sorted(attribute for attribute, times in ids.items() if times > 1):
            raise ValueError(f"{', '.join(twice)} stand more than once")
        return self


class AttributeExpert:
    """
    Asks about one dimension of the criteria tree at a time, and lists the attributes that an image has in positive or
    negative form.

    Args:
        vlm ([`VLM`]):
            The model.
        criteria ([`Criteria`]):
            The tree.
        prompt_path (`str` or `Path`, *optional*):
            File of a custom prompt: a Jinja template with the variables `prompt`, `dimension` and `attributes`.
        max_pixels (`int`, *optional*, defaults to `1003520`):
            Images with more pixels are downscaled. The default is the limit that Qwen recommends.
    """

    def __init__(
        self,
        vlm: VLM,
        criteria: Criteria,
        prompt_path: str | Path | None = None,
        max_pixels: int = 1280 * 28 * 28,
    ):
        self.vlm = vlm
        self.criteria = criteria
        self.prompt = PromptTemplate("attribute_expert", prompt_path)
        self.max_pixels = max_pixels

    def describe(self) -> dict:
        return {
            "model": self.vlm.describe(),
            "prompt": self.prompt.describe(),
            "criteria": describe_criteria(self.criteria),
            "max_pixels": self.max_pixels,
        }

    def __call__(self, images: list[ImageRecord]) -> list[ImageRecord]:
        """Fills in the attributes. An image without a valid answer on every dimension becomes an error."""
        asked = [
            (image, dimension) for image in images if image.status == "ok" for dimension in self.criteria.dimensions
        ]
        answers = ask(self.vlm, in_threads(lambda question: self.request(*question), asked))
        for (image, dimension), answer in zip(asked, answers, strict=True):
            image.answers.append({"dimension": dimension, "answer": answer.raw})
            if answer.value is None:
                image.fail(f"attribute expert, {dimension}: {answer.error}")
                continue
            image.positive_attributes += self.ordered(answer.value.positive)
            image.negative_attributes += self.ordered(answer.value.negative)
        return images

    @cached_property
    def schemas(self) -> dict[str, type[DimensionAnswer]]:
        """The schema of the answers on each dimension, which allows only the ids of that dimension."""
        return {dimension: self.schema(dimension) for dimension in self.criteria.dimensions}

    def schema(self, dimension: str) -> type[DimensionAnswer]:
        ids = Literal[tuple(attribute.id for attribute in self.criteria.select(dimension))]
        return create_model(
            "DimensionAnswer", __base__=DimensionAnswer, positive=(list[ids], ...), negative=(list[ids], ...)
        )

    def request(self, image: ImageRecord, dimension: str) -> Request:
        attributes = self.criteria.select(dimension)
        text = self.prompt.render(prompt=image.prompt, dimension=dimension.replace("_", " "), attributes=attributes)
        shown, file = image.image.shown(self.max_pixels)
        return Request(text, (shown,), self.schemas[dimension], (file,))

    def ordered(self, ids: list[str]) -> list[str]:
        """Sorts ids in the order of the tree."""
        return [attribute.id for attribute in self.criteria.attributes if attribute.id in ids]


def describe_criteria(criteria: Criteria) -> dict[str, str | int]:
    """
    Identifies a tree.

    Args:
        criteria ([`Criteria`]):
            The tree.

    Returns:
        `dict`: `name`, number of `attributes`, and `sha256`, a hash of the attributes with their forms and
        definitions.
    """
    digest = sha256(repr(criteria.attributes).encode()).hexdigest()[:16]
    return {"name": criteria.name, "attributes": len(criteria.attributes), "sha256": digest}
