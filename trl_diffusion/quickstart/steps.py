# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a step of the quickstart came to, kept for the same command: a step is found again if all that it depends on is the same."""

import base64
import io
import logging
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..checksums import DamagedFile, read_json, write_json


logger = logging.getLogger(__name__)

STEPS = "steps"  # folder of the steps


class Outcome(NamedTuple):
    """
    What a step came to.

    Args:
        scores (`dict[str, float]`):
            The scores of all images.
        images (`list[PIL.Image.Image]`):
            The first images.
        seconds (`float`):
            How long it took.
        figures (`str`):
            The figures in words.
    """

    scores: dict[str, float]
    images: list[Image.Image]
    seconds: float
    figures: str


def step_file(output_dir: str | Path, world: str, name: str) -> Path:
    """The file of a step."""
    return Path(output_dir) / STEPS / f"{world}-{name}.json"


def keep_step(path: Path, settings: dict[str, Any], outcome: Outcome) -> None:
    """
    Keeps what a step came to.

    Args:
        path (`Path`):
            The file of the step.
        settings (`dict[str, Any]`):
            What it depends on.
        outcome ([`Outcome`]):
            What it came to.
    """
    images = []
    for image in outcome.images:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        images.append(base64.b64encode(buffer.getvalue()).decode())
    write_json(path, {"settings": settings, "outcome": outcome._asdict() | {"images": images}})


def kept_step(path: Path, settings: dict[str, Any]) -> Outcome | None:
    """What a step came to, unless it depends on other settings, or its file is not as it was written."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except DamagedFile as error:
        logger.warning(f"{error}: its step is done again.")
        return None
    if content["settings"] != settings:
        return None
    images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in content["outcome"]["images"]]
    return Outcome(**content["outcome"] | {"images": images})
