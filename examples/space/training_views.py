# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The third tab: the curves of a training, and its samples by step."""

import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from trl_diffusion.cards.pictures import draw_curves


STATE = "trainer_state.json"
STEP = re.compile(r"step-(\d+)\.png")
FIGURES = {  # metrics of the summary
    "loss": "loss",
    "rewards/margins": "margin of the rewards",
    "rewards/accuracies": "accuracy of the rewards",
    "grad_norm": "norm of the gradient",
}


class Training(NamedTuple):
    """
    What a training left behind.

    Args:
        history (`list[dict]`):
            What was logged, each entry with its `step`.
        samples (`dict[int, Path]`):
            Pictures of its samples, by step.
    """

    history: list[dict[str, Any]]
    samples: dict[int, Path]


def load_training(name: str) -> Training:
    """
    Reads what a training left behind.

    Args:
        name (`str`):
            Its output directory, a checkpoint of it, or a repository on the Hub with the same files.

    Returns:
        [`Training`]

    Raises:
        `ValueError`: If there is no `trainer_state.json`, or it has no history.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[STATE, "samples/*"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ValueError(
                f"{name} is no folder, and the Hub has no model of that name: correct `TRAININGS`."
            ) from error
    if not (folder / STATE).is_file():
        raise ValueError(
            f"{name} has no {STATE}. Call `trainer.save_state()` after the training, and upload the file."
        )
    history = json.loads((folder / STATE).read_text(encoding="utf-8")).get("log_history")
    if not history:
        raise ValueError(f"{name}/{STATE} has no history: nothing was logged. Train with a smaller `logging_steps`.")
    found = ((STEP.fullmatch(path.name), path) for path in folder.glob("samples/*.png"))
    return Training(history, dict(sorted((int(match[1]), path) for match, path in found if match)))


def curves(training: Training) -> Image.Image | None:
    """The curves as a model card has them: loss, rewards, accuracies, norm of the gradient. `None` if none was logged."""
    picture = draw_curves(training.history)
    return None if picture is None else Image.open(io.BytesIO(picture))


def summary(training: Training) -> list[list[str]]:
    """A table of the metrics: name, first value, last value."""
    table = []
    for metric, title in FIGURES.items():
        values = [entry[metric] for entry in training.history if metric in entry]
        if values:
            table.append([title, f"{values[0]:.3f}", f"{values[-1]:.3f}"])
    return table


def sample(training: Training, number: int) -> Image.Image | None:
    """The picture of the samples with a number, from 1 for the first step to the last; `None` if there are no samples."""
    files = list(training.samples.values())
    return Image.open(files[number - 1]) if files else None
