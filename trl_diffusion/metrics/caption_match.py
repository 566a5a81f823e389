# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Are the things that a prompt names in its image? A detector looks for each of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import PIL.Image
from pydantic import Field, create_model

from trl_diffusion.annotation.detector import Detector
from trl_diffusion.annotation.images import LONGEST_SIDE
from trl_diffusion.annotation.planner import Label, without_repetitions
from trl_diffusion.annotation.vlm import VLM, PromptTemplate, Request, ask
from trl_diffusion.data.transforms import upright_image
from trl_diffusion.metrics.scorer import ImageMetric, Scorer, ScoringError, qualified_name


Things = list[str] | ScoringError  # the things that a prompt names, or why they are not known


class VLMThings:
    """
    Reads the things that prompts name, by a vision-language model that is shown no image.

    Args:
        vlm ([`VLM`]):
            The model.
        prompt_path (`str` or `Path`, *optional*):
            A prompt of one's own, a Jinja template with the places `prompt` and `max_things`.
        max_things (`int`, *optional*, defaults to `8`):
            How many things the model may name; an answer with more is no answer.

    Attributes:
        weights (`dict[str, str]`):
            The model and its revision, and a digest of the prompt.
    """

    def __init__(self, vlm: VLM, prompt_path: str | Path | None = None, max_things: int = 8):
        self.vlm = vlm
        self.prompt = PromptTemplate("things", prompt_path)
        self.max_things = max_things
        # A schema of its own, so that a server which enforces schemas keeps to the limit
        self.schema = create_model("Things", things=(Annotated[list[Label], Field(max_length=max_things)], ...))
        described = vlm.describe()
        self.weights = {
            described["model"]: described["revision"],
            "prompt of the things": f"sha256:{self.prompt.describe()['sha256']}",
        }

    def __call__(self, prompts: list[str]) -> list[Things]:
        """
        Names the things.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts.

        Returns:
            `list[list[str] | ScoringError]` of length `B`: each prompt's things, in the order of importance, or why there is
            no valid answer.
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
    The share of the things named in the prompt that a detector finds in the image, in [0, 1].

    Each thing is looked for by itself. So whether there are as many as the prompt says, and how they stand to one another, is
    not seen, and attributes as far as the detector heeds them.

    Args:
        detector ([`Detector`]):
            Who looks.
        things (`Callable`):
            Which things a prompt names: [`VLMThings`], or any function from a list of prompts to a list of as many lists of
            names, with a [`ScoringError`] in the place of a list that cannot be given. It is asked once about each distinct
            prompt, and the scorer keeps what it says. Its `weights`, where it has any, are told with the score.
    """

    name = "caption_match"

    def __init__(self, detector: Detector, things: Callable[[list[str]], list[Things]]):
        super().__init__()
        self.detector = detector
        self.things = things
        self.named: dict[str, Things] = {}  # by prompt
        described = detector.describe()
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
        """Asks about the prompts that are new."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.named]
        if not new:
            return
        answers = self.things(new)
        if len(answers) != len(new):
            raise ValueError(
                f"`things` must return one list of names for each prompt: it was asked about {len(new)} prompts and "
                f"returned {len(answers)} answers."
            )
        for prompt, names in zip(new, answers, strict=True):
            if not isinstance(names, ScoringError):
                if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
                    raise ValueError(
                        f"`things` must return lists of names, such as ['red car', 'dog']; of {prompt!r} it returned {names!r}."
                    )
                names = without_repetitions(names)
            self.named[prompt] = names

    def wanted(self, image: PIL.Image.Image, prompt: str) -> Things:
        """What to look for in an image, or why it has no score."""
        if max(image.size) > LONGEST_SIDE * min(image.size):
            return ScoringError(
                f"the image is {image.width} x {image.height} pixels: detectors take none that is more than {LONGEST_SIDE} "
                "times as long as it is wide"
            )
        return self.named[prompt] or ScoringError("the prompt names no thing to look for")


class CaptionMatch(ImageMetric):
    """
    [`CaptionMatchScorer`] as a module of `evaluate`:
    `evaluate.load(metric_path("caption_match"), detector=detector, things=things).compute(images=[...], prompts=[...])`.
    """

    scorer_type = CaptionMatchScorer
