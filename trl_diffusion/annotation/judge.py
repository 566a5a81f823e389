# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The judge of IAPO (Sun et al., CVPR 2026) decides which image shows an instance better."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from ..batching import in_threads
from .images import crop_around
from .records import Instance, PairRecord
from .vlm import VLM, PromptTemplate, Request, ask


class Verdict(BaseModel):
    """The judge's answer."""

    better: Literal["A", "B"]


class Judge:
    """
    Compares two crops of each instance, of the same size and around its centre, in both orders. A verdict that changes
    with the order is a tie (our addition, because models prefer one position).

    Args:
        vlm ([`VLM`]):
            The model.
        prompt_path (`str` or `Path`, *optional*):
            File of a custom prompt: a Jinja template with the variable `label`.
        crop_size (`int`, *optional*, defaults to `336`):
            Width and height of the crops in pixels.
        crop_margin (`float`, *optional*, defaults to `1.25`):
            Side of a crop divided by the longer side of the instance's box.
    """

    def __init__(
        self, vlm: VLM, prompt_path: str | Path | None = None, crop_size: int = 336, crop_margin: float = 1.25
    ):
        self.vlm = vlm
        self.prompt = PromptTemplate("judge", prompt_path)
        self.crop_size = crop_size
        self.crop_margin = crop_margin

    def describe(self) -> dict:
        return {
            "model": self.vlm.describe(),
            "prompt": self.prompt.describe(),
            "crop_size": self.crop_size,
            "crop_margin": self.crop_margin,
        }

    def __call__(self, pairs: list[PairRecord]) -> list[PairRecord]:
        """Fills in `preference`. A pair with an instance without a valid answer becomes an error."""
        instances = [(pair, instance) for pair in pairs if pair.status == "ok" for instance in pair.instances]
        requests = in_threads(lambda asked: self.requests(*asked), instances)
        answers = ask(self.vlm, [request for both in requests for request in both])
        for index, (pair, instance) in enumerate(instances):
            first, swapped = answers[2 * index], answers[2 * index + 1]
            instance.answer, instance.swapped_answer = first.raw, swapped.raw
            if first.value is None or swapped.value is None:
                pair.fail(f"judge, {instance.label!r}: {first.error or swapped.error}")
            else:
                instance.preference = preference(first.value, swapped.value)
        return pairs

    def requests(self, pair: PairRecord, instance: Instance) -> tuple[Request, Request]:
        """The request with the chosen image as A, and the request with the rejected image as A."""
        chosen = crop_around(pair.chosen.upright, instance.chosen_box, self.crop_size, self.crop_margin)
        rejected = crop_around(pair.rejected.upright, instance.rejected_box, self.crop_size, self.crop_margin)
        text = self.prompt.render(label=instance.label)
        return Request(text, (chosen, rejected), Verdict), Request(text, (rejected, chosen), Verdict)


def preference(verdict: Verdict, swapped: Verdict) -> str:
    """
    Combines the verdicts of both orders.

    Args:
        verdict ([`Verdict`]):
            Verdict with the chosen image as A.
        swapped ([`Verdict`]):
            Verdict with the rejected image as A.

    Returns:
        `str`: `"chosen"` or `"rejected"` if both verdicts prefer that image, else `"tie"`.
    """
    if verdict.better == swapped.better:
        return "tie"
    return "chosen" if verdict.better == "A" else "rejected"
