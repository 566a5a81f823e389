# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the runs say: tables, and pictures of curves with the samples below them."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from PIL import Image

from .runs import BETAS, GRID_STEPS, LEARNING_RATES, RUNS, cell, strip_file


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # told apart with every kind of colour vision
BASELINES = {"scenes": "healthy", "paintings": "stabilized"}
SHOWN_STEPS = (0, 32, 64, 96)
Record = dict[str, Any]


def error_ratios(record: Record, image: str) -> list[float]:
    """The policy's error on the chosen or rejected images, divided by the reference's, at each evaluation."""
    return [entry[f"errors/{image}"] / entry[f"errors/ref_{image}"] for entry in record["eval"]]


# ----- tables -----


def health_table(runs: dict[str, Record]) -> str:
    """Markdown: each run's held-out metrics and the scores of its images at the end, below those of the two bases."""
    lines = [
        "| run | loss | margins | accuracies | chosen error | rejected error | drift | clean | match |",
        "|---" * 9 + "|",
    ]
    for world, baseline in BASELINES.items():
        start = runs[baseline]["scores"][0]
        lines.append(f"| base of the {world} | | | | | | | {start['clean']:.2f} | {start['match']:.2f} |")
        for name, run in RUNS.items():
            if run.world == world:
                last, score = runs[name]["eval"][-1], runs[name]["scores"][-1]
                cells = [run.title, f"{last['loss']:.3g}", f"{last['rewards/margins']:.3g}"]
                cells += [f"{last['rewards/accuracies']:.2f}"]
                cells += [f"{error_ratios(runs[name], image)[-1]:.3g}" for image in ("chosen", "rejected")]
                cells += [f"{last['drift']:.3g}" if "drift" in last else ""]
                cells += [f"{score[what]:.2f}" for what in ("clean", "match")]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_table(runs: dict[str, Record]) -> str:
    """Markdown: clean, match and chosen error after `GRID_STEPS` steps, a row for each learning rate, a column for each beta."""
    lines = [f"| learning rate | {' | '.join(f'beta {beta:g}' for beta in BETAS)} |", "|---" * (1 + len(BETAS)) + "|"]
    for learning_rate in LEARNING_RATES:
        cells = []
        for record in (runs[cell(learning_rate, beta)] for beta in BETAS):
            score = score_at(record, GRID_STEPS)
            error = error_ratios(record, "chosen")[record["scores"].index(score)]
            cells.append(f"{score['clean']:.2f} / {score['match']:.2f} / {error:.1f}")
        lines.append(f"| {learning_rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ----- pictures -----


def draw_metric(panel: Axes, record: Record, name: str, color: str) -> None:
    """A metric on held-out rows as points, and the trainer's own log as a thin line."""
    panel.plot(*steps_and(record["train"], name), color=color, linewidth=0.7, alpha=0.5)
    panel.plot(*steps_and(record["eval"], name), "o-", color=color, markersize=3)


def steps_and(entries: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def draw_pair(
    panel: Axes, steps: list[int], first: list[float], second: list[float], labels: list[str] | None
) -> None:
    """Two curves that belong together: blue and orange with their labels, or both grey without."""
    colors, labels = (GREY, GREY) if labels is None else (BLUE, ORANGE), labels or [None, None]
    for values, color, style, label in zip((first, second), colors, ("o-", "s--"), labels, strict=True):
        panel.plot(steps, values, style, color=color, markersize=3, label=label)
    if any(labels):
        panel.legend(fontsize=8)


def draw_curves(panels: list[Axes], record: Record, metrics: list[str], is_baseline: bool) -> None:
    """Loss or drift, margins, accuracies, errors and scores of a run, one in each panel; grey for the run that is compared with."""
    color, steps = GREY if is_baseline else BLUE, [entry["step"] for entry in record["eval"]]
    for panel, name in zip(panels, metrics, strict=False):
        draw_metric(panel, record, name, color)
    labels = None if is_baseline else ["chosen", "rejected"]
    draw_pair(panels[3], steps, error_ratios(record, "chosen"), error_ratios(record, "rejected"), labels)
    _, clean = steps_and(record["scores"], "clean")
    _, match = steps_and(record["scores"], "match")
    draw_pair(panels[4], steps, clean, match, None if is_baseline else ["clean", "match"])


def health_picture(runs: dict[str, Record], name: str, output_dir: str) -> Figure:
    """
    The curves of a run, and below them the images that it draws at some steps, always from the same noise. Unless it is the
    healthy run of its world itself, that one is beside it.

    Args:
        runs (`dict`):
            The records of all runs.
        name (`str`):
            The run, a key of `RUNS`.
        output_dir (`str`):
            Folder of the runs, where the images are.

    Returns:
        `matplotlib.figure.Figure`: the picture.
    """
    baseline = BASELINES[RUNS[name].world]
    shown = [name] if name == baseline else [baseline, name]
    figure = Figure(figsize=(13, 3.1 + 1.05 * len(shown)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, 1.05 * len(shown)])
    panels = above.subplots(1, 5)
    metrics = ["loss" if RUNS[name].world == "scenes" else "drift", "rewards/margins", "rewards/accuracies"]
    for run in shown:
        draw_curves(panels, runs[run], metrics, run != name)
    titles = [*metrics, "error / reference's error", "images: clean, match (share)"]
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("optimizer step", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    if metrics[0] == "loss":
        panels[0].axhline(math.log(2), color="black", linestyle=":", linewidth=1)
        panels[0].annotate(
            "ln 2", (0.98, math.log(2)), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
        panels[0].set_ylim(0, max(0.8, panels[0].get_ylim()[1]))
    for panel in (panels[2], panels[4]):
        panel.set_ylim(-0.03, 1.03)
    for panel in (panels[0], panels[3]):
        if panel.get_ylim()[1] > 20:
            panel.set_yscale("symlog", linthresh=1)
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
    grey = "" if name == baseline else f"; grey: {RUNS[baseline].title}"
    above.suptitle(f"{RUNS[name].title} (points: held-out rows, thin line: training log{grey})", fontsize=11)
    strips = below.subplots(len(shown), len(SHOWN_STEPS), squeeze=False)
    for row, run in zip(strips, shown, strict=True):
        for panel, step in zip(row, SHOWN_STEPS, strict=True):
            panel.imshow(Image.open(strip_file(output_dir, run, step)), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
        row[0].set_ylabel(RUNS[run].title.replace(" ", "\n", 1), fontsize=8)
    for panel, step in zip(strips[0], SHOWN_STEPS, strict=True):
        panel.set_title(f"step {step}", fontsize=9)
    return figure


def grid_picture(runs: dict[str, Record]) -> Figure:
    """Heat maps of clean and of match after `GRID_STEPS` steps: a row for each learning rate, a column for each beta."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, what in zip(panels, ("clean", "match"), strict=True):
        values = [
            [score_at(runs[cell(learning_rate, beta)], GRID_STEPS)[what] for beta in BETAS]
            for learning_rate in LEARNING_RATES
        ]
        shown = panel.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        panel.set_title(f"{what}, step {GRID_STEPS}", fontsize=10)
        panel.set_xticks(range(len(BETAS)), [f"{beta:g}" for beta in BETAS])
        panel.set_yticks(range(len(LEARNING_RATES)), [f"{rate:g}" for rate in LEARNING_RATES])
        panel.set_xlabel("beta")
    panels[0].set_ylabel("learning rate")
    figure.colorbar(shown, ax=panels, label="share of the shapes")
    return figure


def score_at(record: Record, step: int) -> dict[str, float]:
    return next(score for score in record["scores"] if score["step"] == step)
