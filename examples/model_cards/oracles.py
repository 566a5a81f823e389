# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The oracles of the quickstart's two worlds as scorers: what an image shows is known from its pixels."""

from collections.abc import Callable

from PIL import Image

from trl_diffusion.metrics.scorer import Scorer
from trl_diffusion.quickstart.paintings import inspect_painting
from trl_diffusion.quickstart.world import inspect_image


class OracleScorer(Scorer):
    """
    Scores by what an oracle finds.

    Args:
        name (`str`):
            Name of the score.
        find (`Callable`):
            Takes an image and its prompt, and returns the score.
        higher_is_better (`bool`, *optional*, defaults to `True`):
            Whether a higher score is better.
    """

    def __init__(self, name: str, find: Callable[[Image.Image, str], float], higher_is_better: bool = True):
        super().__init__("cpu")
        self.name, self.find, self.higher_is_better = name, find, higher_is_better

    def score_batch(self, prepared: list[Image.Image], prompts: list[str]) -> list[float]:
        return [float(self.find(image, prompt)) for image, prompt in zip(prepared, prompts, strict=True)]


def scorers_of(world: str) -> dict[str, Callable[[], Scorer]]:
    """The scorers of a world, by their names: each makes one, as [`evaluation.run.evaluate_models`] takes them."""
    if world == "scenes":
        found = {
            f"{shape} {heading}": (
                lambda image, prompt, place=place, what=what: getattr(inspect_image(image, prompt)[place], what)
            )
            for what, heading in (("clean", "clean"), ("match", "matches"))
            for place, shape in enumerate("AB")
        }
    else:
        found = {
            "negatives of 4": lambda image, prompt: len(inspect_painting(image, prompt).negative_attributes),
            "matches": lambda image, prompt: inspect_painting(image, prompt).match,
        }
    return {
        name: (lambda name=name, find=find: OracleScorer(name, find, higher_is_better=name != "negatives of 4"))
        for name, find in found.items()
    }
