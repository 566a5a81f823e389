# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What trainings logged over their steps."""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from transformers import Trainer, TrainerState

from ..cards.pictures import COLORS, INK, PANELS, WIDTH, Curves, curves_of, draw_panel, png
from .picture import Picture


# Of several runs: a title, and the metric whose curves are compared
COMPARED = {
    "loss": "loss",
    "margin of the rewards": "rewards/margins",
    "accuracy of the rewards": "rewards/accuracies",
    "norm of the gradient": "grad_norm",
}
STATE = "trainer_state.json"

Run = Trainer | list[dict[str, Any]] | str | Path


@dataclass(frozen=True, repr=False)
class TrainingCurves(Picture):
    """
    What trainings logged.

    Attributes:
        panels (`dict[str, dict[tuple[str, str], dict[int, float]]]`):
            By the title of a panel: of each curve, what it is of (a metric, of several runs a run) and what it was measured on
            (`"training"`, `"evaluation"`), with the logged values by optimizer step.
    """

    panels: dict[str, Curves]


def show_curves(runs: Run | Mapping[str, Run]) -> TrainingCurves:
    """
    Shows what trainings logged over their optimizer steps: the loss, of a preference the rewards and their accuracy, the norm of the
    gradient; dashed what was evaluated. Of several runs, the curves of a metric are drawn over each other.

    Args:
        runs ([`~transformers.Trainer`], `list[dict]`, `str`, `Path`, or a `dict` of these by the names of the runs):
            A trainer, its `state.log_history`, or the output directory of a training, of which the newest state is read. At most 6.

    Returns:
        [`notebook.TrainingCurves`]

    Raises:
        `ValueError`: If matplotlib is missing (`pip install "trl-diffusion[evaluation]"`), a folder holds no training, there are too
            many runs, or nothing was logged.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('Curves need matplotlib: run `pip install "trl-diffusion[evaluation]"`.') from error

    if isinstance(runs, Mapping):
        if len(runs) > len(COLORS):
            raise ValueError(f"{len(runs)} runs cannot be told apart. Pass at most {len(COLORS)}.")
        histories = {name.replace("$", r"\$"): history_of(run) for name, run in runs.items()}  # "$" starts a formula
        panels = {
            title: {
                key: curve
                for name, history in histories.items()
                for key, curve in curves_of(history, {metric: name}).items()
            }
            for title, metric in COMPARED.items()
        }
    else:
        panels = {title: curves_of(history_of(runs), metrics) for title, metrics in PANELS}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise ValueError("Nothing was logged that could be drawn. Train at least `logging_steps` steps first.")

    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(WIDTH / 100, 2.6 * down + 0.2), layout="constrained", dpi=110)
    grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, curves) in zip(grid, panels.items()):
        draw_panel(axes, title, curves)
        axes.set_xlabel("optimizer steps", color=INK, fontsize=9)
    return TrainingCurves(PIL.Image.open(io.BytesIO(png(figure))), panels)


def history_of(run: Run) -> list[dict[str, Any]]:
    """What a training logged: by a trainer, as a list, or in an output directory."""
    if isinstance(run, Trainer):
        return run.state.log_history
    if isinstance(run, list):
        return run
    states = [path for pattern in (STATE, f"checkpoint-*/{STATE}") for path in Path(run).glob(pattern)]
    if not states:
        raise ValueError(
            f"{run} holds no {STATE}, in no checkpoint either. Name the `output_dir` of a training that has saved."
        )
    return max(
        (TrainerState.load_from_json(str(path)) for path in states), key=lambda state: state.global_step
    ).log_history
