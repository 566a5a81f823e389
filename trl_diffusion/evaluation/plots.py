# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Plots of the distributions of scores, and of win rates against the baseline."""

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..files import write_file
from .report import LABELS, finite
from .scores import metrics_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DISTRIBUTIONS, WIN_RATES = "distributions.png", "win_rates.png"
DPI = 160
BASELINE_COLOR = "#767676"
# Distinguishable for the colour-blind (Okabe and Ito, 2008), without yellow, which is hard to see on white
MODEL_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK, FAINT = "#1c1e21", "#c9cbce"
MOST_ACROSS = 3  # panels
PANEL_WIDTH, PANEL_MARGIN, LINE_HEIGHT, LETTER_WIDTH = 2.7, 0.75, 0.16, 0.06  # inches
NAME_WIDTH = 26  # characters per line of a model's name


def plot_distributions(table: pa.Table) -> "Figure":
    """
    Plots the distribution of the scores of each model. There is a panel for each metric, which shows the density of
    each model's scores, their interquartile range as a bar and their mean as a dot. A line marks the mean of the
    baseline.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`].

    Returns:
        `matplotlib.figure.Figure`
    """
    models = table["model"].unique().to_pylist()
    of_model = np.array(table["model"].to_pylist())
    metrics = metrics_of(table)
    legend = "Area: density of the scores. Bar: interquartile range. Dot: mean. Dashed line: mean of the baseline."
    figure, panels = make_panels(list(metrics), models, 0.5, legend)
    for (name, metric), axes in zip(metrics.items(), panels):
        values = np.array([finite(value) for value in table[name].to_pylist()], dtype=float)  # NaN if missing
        draw_distributions(axes, [values[(of_model == model) & ~np.isnan(values)] for model in models], models)
        better = "higher" if metric["higher_is_better"] else "lower"
        axes.set_xlabel(f"{better} is better", color=INK, fontsize=8)
    return figure


def draw_distributions(axes: "Axes", distributions: list[np.ndarray], models: list[str]) -> None:
    """One panel of `plot_distributions`. A model without scores gets a note."""
    for place, (values, model) in enumerate(zip(distributions, models)):
        if not len(values):
            draw_note(axes, "no scores", place)
            continue
        color = model_color(place)
        (body,) = axes.violinplot(values, [place], orientation="horizontal", widths=0.85, showextrema=False)["bodies"]
        body.set(facecolor=color, alpha=0.3, edgecolor="none")
        mean, (low, high) = values.mean(), np.quantile(values, [0.25, 0.75])
        axes.plot([low, high], [place, place], color=color, linewidth=4, solid_capstyle="butt")
        axes.plot([mean], [place], "o", color="white", markeredgecolor=color, markersize=5.5, label=model)
        if place == 0:
            axes.axvline(mean, color=BASELINE_COLOR, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)


def plot_win_rates(summary: dict[str, Any]) -> "Figure":
    """
    Plots the win rates against the baseline. There is a panel for each metric, which shows the win rate of each model
    with its interval, and a line at 50 %.

    Args:
        summary (`dict`):
            Summary of at least two models, from [`evaluation.report.summarize`].

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ValueError`: If there is only the baseline.
    """
    rates = summary["win_rates"]
    if not rates:
        raise ValueError(f"There is no model to compare with the baseline {summary['baseline']}.")
    models = list(rates)
    metrics = list(rates[models[0]])
    legend = (
        f"Dot: share of pairs won against {summary['baseline']}, in percent, with ties as one half. Line: "
        f"{100 * summary['confidence']:g} % interval over prompts. Dashed line: no difference."
    )
    figure, panels = make_panels(metrics, models, 0.34, legend)
    shown = [
        rate[end]
        for of_model in rates.values()
        for rate in of_model.values()
        for end in ("lower", "win_rate", "upper")
    ]
    percents = [45, 55, *(100 * value for value in shown if value is not None)]
    margin = 0.08 * (max(percents) - min(percents))
    for name, axes in zip(metrics, panels):
        axes.axvline(50, color=BASELINE_COLOR, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
        for place, model in enumerate(models):
            draw_win_rate(axes, rates[model][name], place, model)
        axes.set_xlim(min(percents) - margin, max(percents) + margin)  # one scale for all panels
    return figure


def draw_win_rate(axes: "Axes", rate: dict[str, Any], place: int, model: str) -> None:
    """One row of a panel of `plot_win_rates`. The first colour is that of the baseline, which is not shown."""
    if rate["win_rate"] is None:
        draw_note(axes, "no pairs", place)
        return
    color, percent = model_color(place + 1), 100 * rate["win_rate"]
    if rate["lower"] is not None:
        axes.plot([100 * rate["lower"], 100 * rate["upper"]], [place, place], color=color, linewidth=2)
    axes.plot([percent], [place], "o", color=color, markersize=5.5, label=model)
    axes.annotate(
        f"{percent:.1f}",
        (percent, place),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        color=INK,
        fontsize=7.5,
    )


def draw_note(axes: "Axes", text: str, place: int) -> None:
    """A note in the row of a model without values."""
    axes.annotate(text, (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center", fontsize=8)


def make_panels(
    metrics: list[str], models: list[str], row_height: float, legend: str
) -> tuple["Figure", list["Axes"]]:
    """A panel for each metric, with the models from top to bottom and their names on the left of each row of panels."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: run `pip install "trl-diffusion[evaluation]"`.') from error

    across = 2 if len(metrics) == 4 else min(len(metrics), MOST_ACROSS)
    down = math.ceil(len(metrics) / across)
    names = [wrapped(model) for model in models]
    lines = max(name.count("\n") + 1 for name in names)
    letters = max(len(line) for name in names for line in name.split("\n"))
    width = across * PANEL_WIDTH + letters * LETTER_WIDTH
    panel_height = len(models) * max(row_height, (lines + 0.5) * LINE_HEIGHT) + PANEL_MARGIN
    legend = wrapped(legend, int(width / LETTER_WIDTH))
    height = down * panel_height + (legend.count("\n") + 2) * LINE_HEIGHT
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    figure.supxlabel(legend, color=INK, fontsize=8)
    grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for empty in grid[len(metrics) :]:
        empty.set_axis_off()
    for number, (name, axes) in enumerate(zip(metrics, grid)):
        axes.set_title(wrapped(LABELS.get(name, name)), color=INK, fontsize=10, loc="left")
        axes.set_ylim(len(models) - 0.5, -0.5)  # the first on top
        axes.set_yticks(range(len(models)), names if number % across == 0 else [""] * len(models))
        axes.tick_params(axis="y", length=0)
        axes.tick_params(labelsize=8, colors=INK)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        for side in ("left", "top", "right"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
    return figure, grid[: len(metrics)]


def model_color(place: int) -> str:
    """The colour of a model, the same in all plots; the baseline is grey."""
    return BASELINE_COLOR if place == 0 else MODEL_COLORS[(place - 1) % len(MODEL_COLORS)]


def wrapped(text: str, width: int = NAME_WIDTH) -> str:
    """Wraps a text to a number of characters per line, and escapes dollars, which would start a formula in matplotlib."""
    return textwrap.fill(text, width).replace("$", r"\$")


def save_plots(table: pa.Table, summary: dict[str, Any], output_dir: str | Path) -> dict[str, str]:
    """
    Saves all plots to a folder.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`].
        summary (`dict`):
            Summary from [`evaluation.report.summarize`].
        output_dir (`str` or `Path`):
            Folder of the evaluation.

    Returns:
        `dict[str, str]`: files by title, for [`evaluation.report.write_report`]. Empty if no metric scores single
        images.
    """
    figures = {}
    if metrics_of(table):
        figures["Distributions of the scores", DISTRIBUTIONS] = plot_distributions(table)
        if summary["win_rates"]:
            figures[f"Win rates against {summary['baseline']}", WIN_RATES] = plot_win_rates(summary)
    for (_, file), figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer)
        write_file(Path(output_dir) / file, buffer.getvalue())
    return dict(figures.keys())
