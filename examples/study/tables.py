# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the runs of a study say together: a table and a picture for each world."""

import statistics
from typing import Any

from matplotlib.figure import Figure

from .arms import ARMS, Arm
from .objectives import WORLDS, Objective
from .tuning import TOLERANCE


# For each world: the scores with their headings, the arm that the others are compared with, and the score for that
FIGURES = {
    "scenes": (
        {"clean_a": "A clean", "clean_b": "B clean", "match_a": "A matches", "match_b": "B matches"},
        "dpo",
        "clean_b",
    ),
    "crowds": ({"clean_a": "A clean", "clean": "B and C clean", "match": "matches"}, "dpo", "clean"),
    "paintings": ({"negatives": "negatives of 4", "match": "matches"}, "sft", "negatives"),
}


def arms_of(study: dict[str, Any], world: str) -> dict[str, Arm] | dict[str, Objective]:
    """The arms of a study's world."""
    settings = study["settings"]
    return WORLDS[world].arms if settings.get("arms") == "objectives" else ARMS[settings.get("model", "unet")][world]


def values_of(study: dict[str, Any], world: str, name: str, figure: str) -> list[float]:
    """One value per seed."""
    return [run[figure] for run in study["runs"][world] if run["arm"] == name]


def learning_rate(study: dict[str, Any], world: str, name: str) -> float | None:
    """The learning rate of an arm that was trained at one of its own."""
    return next(run.get("learning_rate") for run in study["runs"][world] if run["arm"] == name)


def table(study: dict[str, Any], world: str) -> str:
    """
    Markdown: mean and standard deviation over the seeds, and the mean paired difference with its standard error; and the learning
    rate where arms have their own.
    """
    arms, (figures, reference, compared) = arms_of(study, world), FIGURES[world]
    is_tuned = any("learning_rate" in run for run in study["runs"][world])
    headings = ["learning rate"] * is_tuned + list(figures.values())
    lines = [
        f"| arm | {' | '.join(headings)} | {figures[compared]}, minus {arms[reference].title} |",
        "|---" * (len(headings) + 2) + "|",
    ]
    for name, arm in arms.items():
        rate = learning_rate(study, world, name)
        cells = ["" if rate is None else f"{rate:.1e}"] * is_tuned
        for figure in figures:
            values = values_of(study, world, name, figure)
            cells.append(f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}")
        differences = [
            own - other
            for own, other in zip(
                values_of(study, world, name, compared), values_of(study, world, reference, compared), strict=True
            )
        ]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        cells.append("" if name == reference else f"{statistics.fmean(differences):+.3f} ± {error:.3f}")
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuning_table(study: dict[str, Any], world: str) -> str:
    """
    Markdown: what each learning rate scored on the tuning seed, in parentheses where the prompt was matched too seldom, and in bold
    what was chosen.
    """
    place, records = WORLDS[world], study["tuning"][world]
    base = next(record for record in records if record["arm"] == "base")
    rates = sorted({record["learning_rate"] for record in records if "learning_rate" in record})
    lines = [f"| arm | {' | '.join(f'{rate:.1e}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name, arm in place.arms.items():
        if not arm.is_tuned:
            continue
        cells = dict.fromkeys(rates, "")
        for record in (record for record in records if record["arm"] == name):
            cell = f"{place.goodness(record):.3f}"
            cell = cell if place.match(record) >= place.match(base) - TOLERANCE else f"({cell})"
            is_chosen = record["learning_rate"] == learning_rate(study, world, name)
            cells[record["learning_rate"]] = f"**{cell}**" if is_chosen else cell
        lines.append(f"| {arm.title} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def picture(study: dict[str, Any], world: str) -> Figure:
    """A panel for each score: every seed as a point, their mean as a line."""
    arms, (figures, reference, _) = arms_of(study, world), FIGURES[world]
    shown = Figure(figsize=(2.2 + 2.4 * len(figures), 0.9 + 0.3 * len(arms)), layout="constrained")
    panels = shown.subplots(1, len(figures), sharey=True)
    for panel, (figure, heading) in zip(panels, figures.items(), strict=True):
        for row, name in enumerate(arms):
            values = values_of(study, world, name, figure)
            color = "#D55E00" if name in ("base", reference) else "#0072B2"
            panel.plot(values, [row] * len(values), "o", color=color, alpha=0.5, markersize=4, markeredgewidth=0)
            panel.plot([statistics.fmean(values)] * 2, [row - 0.35, row + 0.35], color=color, linewidth=2)
        if figure.startswith("match"):  # small differences should look small
            panel.set_xlim(left=min(0.88, panel.get_xlim()[0]), right=1.01)
        panel.set_title(heading, fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(arms)), [arm.title for arm in arms.values()])
    panels[0].invert_yaxis()
    return shown
