# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Caption match: the share of the objects named in a prompt that a detector finds in the image."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import PIL.Image
from pydantic import Field, create_model

from trl_diffusion.annotation.detector import Detector
from trl_diffusion.annotation.planner import Label, without_repetitions
from trl_diffusion.annotation.vlm import VLM, PromptTemplate, Request, ask
from trl_diffusion.data.images import LONGEST_SIDE
from trl_diffusion.data.pictures import upright_image
from trl_diffusion.metrics.scorer import ImageMetric, Scorer, ScoringError, qualified_name


Things = list[str] | ScoringError  # the objects that a prompt names, or why they are unknown


class VLMThings:
    """
    Extracts the objects that prompts name, with a vision-language model that sees only the prompt.

    Args:
        vlm ([`VLM`]):
            The model.
        prompt_path (`str` or `Path`, *optional*):
            File of a custom prompt: a Jinja template with the variables `prompt` and `max_things`.
        max_things (`int`, *optional*, defaults to `8`):
            Maximum number of objects per prompt. An answer with more is invalid.

    Attributes:
        weights (`dict[str, str]`):
            The model with its revision, and the prompt with its hash.
        settings (`dict[str, Any]`):
            The settings of the model.
    """

    def __init__(self, vlm: VLM, prompt_path: str | Path | None = None, max_things: int = 8):
        self.vlm = vlm
        self.prompt = PromptTemplate("things", prompt_path)
        self.max_things = max_things
        # The limit is part of the schema, so that a server that supports schemas enforces it
        self.schema = create_model("Things", things=(Annotated[list[Label], Field(max_length=max_things)], ...))
        described = vlm.describe()
        self.settings = {"model": described, "max_things": max_things}
        self.weights = {
            described["model"]: described["revision"],
            "prompt of the things": f"sha256:{self.prompt.describe()['sha256']}",
        }

    def __call__(self, prompts: list[str]) -> list[Things]:
        """
        Extracts the objects.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts.

        Returns:
            `list[list[str] | ScoringError]` of length `B`: the objects of each prompt, most important first, or why
            there is no valid answer.
        """
        answers = ask(self.vlm, [self.request(prompt) for prompt in prompts])
        return [
            ScoringError(f"things: {answer.error}") if answer.value is None else answer.value.things
            for answer in answers
        ]

    def request(self, prompt: str) -> Request:
        return Request(self.prompt.render(prompt=prompt, max_things=self.max_things), (), self.schema)


class CaptionMatchScorer(Scorer):
    """
    The share of the objects named in the prompt that a detector finds in the image, in [0, 1] (ours). Higher is better.

    Each object is searched for separately. The score therefore ignores their number and arrangement, and considers
    their attributes only as far as the detector does.

    Args:
        detector ([`Detector`]):
            The detector.
        things (`Callable`):
            Extracts the objects that prompts name: [`VLMThings`], or a function that returns a list of names for each
            of a list of prompts, or a [`ScoringError`] instead of a list. It is called once for each distinct prompt.
            Its attribute `weights`, if any, becomes part of the result.
    """

    name = "caption_match"

    def __init__(self, detector: Detector, things: Callable[[list[str]], list[Things]]):
        super().__init__()
        self.detector = detector
        self.things = things
        self.named: dict[str, Things] = {}  # by prompt
        described = detector.describe()
        self.settings = {"detector": described, "things": getattr(things, "settings", {})}
        self.weights = {described["model"]: described["revision"]}
        if "threshold" in described:
            self.weights["threshold of the detector"] = str(described["threshold"])
        self.weights |= getattr(things, "weights", {qualified_name(things): "unknown"})

    def prepare(self, image: PIL.Image.Image) -> PIL.Image.Image:
        return upright_image(image)

    def score_batch(self, prepared: list[PIL.Image.Image], prompts: list[str]) -> list[float | ScoringError]:
        self.name_things(prompts)
        wanted = [self.wanted(image, prompt) for image, prompt in zip(prepared, prompts, strict=True)]
        queries = [
            (image, thing)
            for image, things in zip(prepared, wanted, strict=True)
            if not isinstance(things, ScoringError)
            for thing in things
        ]
        hits = iter(self.detector.detect(queries))
        return [
            things if isinstance(things, ScoringError) else sum(next(hits) is not None for _ in things) / len(things)
            for things in wanted
        ]

    def name_things(self, prompts: list[str]) -> None:
        """Extracts the objects of prompts that are new, and caches them."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.named]
        if not new:
            return
        answers = self.things(new)
        if len(answers) != len(new):
            raise ValueError(
                f"`things` must return one list of names for each prompt: it was given {len(new)} prompts and returned "
                f"{len(answers)} lists."
            )
        for prompt, names in zip(new, answers, strict=True):
            if not isinstance(names, ScoringError):
                if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
                    raise ValueError(
                        f"`things` must return lists of names, such as ['red car', 'dog']; for {prompt!r} it returned "
                        f"{names!r}."
                    )
                names = without_repetitions(names)
            self.named[prompt] = names

    def wanted(self, image: PIL.Image.Image, prompt: str) -> Things:
        """The objects to find in an image, or why the image has no score."""
        if max(image.size) > LONGEST_SIDE * min(image.size):
            return ScoringError(
                f"the image is {image.width} x {image.height} pixels: detectors refuse images whose longer side is more "
                f"than {LONGEST_SIDE} times the shorter one"
            )
        return self.named[prompt] or ScoringError("the prompt names no object to find")


class CaptionMatch(ImageMetric):
    """
    [`CaptionMatchScorer`] as a module of `evaluate`: `evaluate.load(metric_path("caption_match"), detector=detector,
    things=things).compute(images=[...], prompts=[...])`.
    """

    scorer_type = CaptionMatchScorer
