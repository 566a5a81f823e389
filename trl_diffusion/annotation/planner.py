# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The planner of IAPO (Sun et al., CVPR 2026) lists the instances that both images of a pair show."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, StringConstraints, model_validator

from ..batching import in_threads
from ..messages import CONTROL
from .records import PairRecord
from .vlm import VLM, PromptTemplate, Request, ask


MOST_LABELS = 100  # of an answer


def plain_label(label: str) -> str:
    """A label on one line. Raises a `ValueError` if it holds characters that are not printed."""
    label = " ".join(label.split())
    if CONTROL.search(label):
        raise ValueError("it holds characters that are not printed")
    return label


Label = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80), AfterValidator(plain_label)
]


class Plan(BaseModel):
    """The planner's answer."""

    instances: list[Label]

    @model_validator(mode="after")
    def not_too_many(self):
        if len(self.instances) > MOST_LABELS:
            raise ValueError(f"there are {len(self.instances)} instances, more than {MOST_LABELS}")
        return self


class Planner:
    """
    Lists the salient instances that both images of a pair show.

    Args:
        vlm ([`VLM`]):
            The model.
        prompt_path (`str` or `Path`, *optional*):
            File of a custom prompt: a Jinja template with the variables `prompt` and `max_instances`.
        max_instances (`int`, *optional*, defaults to `5`):
            Maximum number of instances per pair. Further ones are dropped and recorded.
        max_pixels (`int`, *optional*, defaults to `1003520`):
            Images with more pixels are downscaled. The default is the limit that Qwen recommends.
    """

    def __init__(
        self,
        vlm: VLM,
        prompt_path: str | Path | None = None,
        max_instances: int = 5,
        max_pixels: int = 1280 * 28 * 28,
    ):
        self.vlm = vlm
        self.prompt = PromptTemplate("planner", prompt_path)
        self.max_instances = max_instances
        self.max_pixels = max_pixels

    def describe(self) -> dict:
        return {
            "model": self.vlm.describe(),
            "prompt": self.prompt.describe(),
            "max_instances": self.max_instances,
            "max_pixels": self.max_pixels,
        }

    def __call__(self, pairs: list[PairRecord]) -> list[PairRecord]:
        """Fills in `labels`. A pair without a valid answer becomes an error."""
        pairs_left = [pair for pair in pairs if pair.status == "ok"]
        answers = ask(self.vlm, in_threads(self.request, pairs_left))
        for pair, answer in zip(pairs_left, answers, strict=True):
            pair.planner_answer = answer.raw
            if answer.value is None:
                pair.fail(f"planner: {answer.error}")
                continue
            labels = without_repetitions(answer.value.instances)
            pair.labels = labels[: self.max_instances]
            for label in labels[self.max_instances :]:
                pair.drop(label, f"beyond the first {self.max_instances} instances")
        return pairs

    def request(self, pair: PairRecord) -> Request:
        text = self.prompt.render(prompt=pair.prompt, max_instances=self.max_instances)
        images, files = zip(*(image.shown(self.max_pixels) for image in (pair.chosen, pair.rejected)), strict=True)
        return Request(text, images, Plan, files)


def without_repetitions(labels: list[str]) -> list[str]:
    """Removes labels that differ from an earlier one only in case, or not at all."""
    unique = {}
    for label in labels:
        unique.setdefault(label.lower(), label)
    return list(unique.values())
