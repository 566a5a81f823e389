# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the scores say: figures for programs, tables for papers, a report for people."""

import json
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..files import write_file
from ..metrics.win_rate import win_rate
from .scores import metrics_of


SUMMARY, REPORT, LATEX = "summary.json", "report.md", "tables.tex"
CONFIDENCE = 0.95
SHOWN_ERRORS = 3
NO_GROUP = "(no group)"
# Digits of the largest value of a column: 22.02 for a mean over images, 12.3 for a figure of all images together
SCORE_DIGITS, CORPUS_DIGITS = 4, 3
LABELS = {
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "hpsv2_1": "HPSv2.1",
    "aesthetic": "Aesthetic",
    "clip_score": "CLIP",
    "image_reward": "ImageReward",
    "fid": "FID",
    "kid": "KID",
    "num_negative_attributes": "#A_neg",
    "caption_match": "Caption match",
}

Key = tuple[str, int]  # a prompt's id, and the image's index among those of the prompt


# ----- figures -----


def summarize(
    table: pa.Table, settings: dict[str, Any], corpus: dict[str, dict[str, dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """
    Sums up an evaluation.

    Args:
        table (`pyarrow.Table`):
            From [`evaluation.scores.score_models`]. The first model in it is the baseline.
        settings (`dict`):
            What was run, for the record: the prompt set, the protocol, the models and their revisions, versions of packages.
        corpus (`dict[str, dict[str, dict]]`, *optional*):
            Figures of all images of a model together: by metric and model what the metric's `compute` returned, which is the
            figure under a name that starts with the metric's, `higher_is_better`, `weights`, and what else there is to say.

    Returns:
        `dict`, of what JSON knows: `baseline`; `models`, with the number of images of each; `num_prompts`; `metrics`, with
        `higher_is_better` and `weights`; `scores` by model and metric (`mean`, `standard_error` over prompts, `num_scored`,
        `num_errors` and the first few `errors`; for figures of all images together `value`, `full_name`, and what else the
        metric says); `groups`, the scores by group, model and metric; `win_rates` against the baseline by model and metric;
        `confidence` of their intervals; and `settings`.
    """
    metrics = metrics_of(table)
    rows = table.to_pylist()
    models = {model: [row for row in rows if row["model"] == model] for model in table["model"].unique().to_pylist()}
    baseline, *others = models
    groups = table["group"].unique().to_pylist()

    def scores_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: score_summary(rows, name, metric["errors"]) for name, metric in metrics.items()}

    scores = {model: scores_of(of_model) for model, of_model in models.items()}
    described = {
        name: {"higher_is_better": metric["higher_is_better"], "weights": metric["weights"]}
        for name, metric in metrics.items()
    }
    for name, results in (corpus or {}).items():
        for model, result in results.items():
            scores[model][name], described[name] = corpus_summary(result, name)
    return {
        "baseline": baseline,
        "models": {model: len(of_model) for model, of_model in models.items()},
        "num_prompts": len(table["prompt_id"].unique()),
        "metrics": described,
        "scores": scores,
        "groups": {
            group or NO_GROUP: {
                model: scores_of([row for row in of_model if row["group"] == group])
                for model, of_model in models.items()
            }
            for group in (groups if groups != [None] else [])
        },
        "win_rates": {
            model: {
                name: compare(models[model], models[baseline], name, metric["higher_is_better"])
                for name, metric in metrics.items()
            }
            for model in others
        },
        "confidence": CONFIDENCE,
        "settings": settings,
    }


def score_summary(rows: list[dict[str, Any]], name: str, errors: dict[str, str]) -> dict[str, Any]:
    """The figures of a metric over images."""
    scored = [(row["prompt_id"], row[name]) for row in rows if finite(row[name]) is not None]
    values = [value for _, value in scored]
    without = [row["image"] for row in rows if finite(row[name]) is None]
    return {
        "mean": math.fsum(values) / len(values) if values else None,
        "standard_error": standard_error(values, [prompt for prompt, _ in scored]),
        "num_scored": len(values),
        "num_errors": len(without),
        "errors": [
            {"image": image, "reason": errors.get(image, "no reason is known")} for image in without[:SHOWN_ERRORS]
        ],
    }


def corpus_summary(result: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a metric of all images together says of a model, and what of itself."""
    result = dict(result)
    metric = {what: result.pop(what) for what in ("higher_is_better", "weights")}
    full_name = next(key for key in result if key.startswith(name))
    return {"value": finite(result.pop(full_name)), "full_name": full_name, **result}, metric


def standard_error(values: Sequence[float], prompts: Sequence[Hashable]) -> float | None:
    """
    Of a mean over images, when other prompts might have been drawn. Images of one prompt are alike, so prompts are what is
    counted: with `r_p` the sum over the images of prompt `p` of value minus mean, `P` prompts and `N` images,

        SE = sqrt( P / (P - 1) * sum_p r_p^2 ) / N

    (the cluster-robust variance of Liang and Zeger, Biometrika 1986, for a mean). With one image a prompt this is the standard
    deviation over `sqrt(N)`.

    Args:
        values (`Sequence[float]` of length `N`):
            The scores.
        prompts (`Sequence[Hashable]` of length `N`):
            The prompt of each.

    Returns:
        `float`, or `None` with fewer than two prompts.
    """
    mean = math.fsum(values) / len(values) if values else 0.0
    residuals: dict[Hashable, float] = {}
    for value, prompt in zip(values, prompts, strict=True):
        residuals[prompt] = residuals.get(prompt, 0.0) + value - mean
    if len(residuals) < 2:
        return None
    squares = math.fsum(residual**2 for residual in residuals.values())
    return math.sqrt(len(residuals) / (len(residuals) - 1) * squares) / len(values)


def compare(
    rows: list[dict[str, Any]], references: list[dict[str, Any]], name: str, higher_is_better: bool
) -> dict[str, Any]:
    """The win rate of one model's images against another's, of the same prompt and index."""
    scores, reference_scores = by_key(rows, name), by_key(references, name)
    keys = list(dict.fromkeys([*reference_scores, *scores]))
    pairs = [(scores.get(key), reference_scores.get(key)) for key in keys]
    if all(None in pair for pair in pairs):
        return {
            "win_rate": None,
            "lower": None,
            "upper": None,
            "num_pairs": 0,
            "num_ties": 0,
            "left_out": len(pairs),
        }
    own, others = zip(*pairs)
    return win_rate(own, others, higher_is_better, confidence=CONFIDENCE, groups=[prompt_id for prompt_id, _ in keys])


def by_key(rows: list[dict[str, Any]], name: str) -> dict[Key, float | None]:
    return {(row["prompt_id"], row["index"]): finite(row[name]) for row in rows}


def finite(value: float | None) -> float | None:
    """A figure, or `None` for what is none."""
    return value if value is not None and math.isfinite(value) else None


# ----- tables -----


@dataclass
class Cell:
    """
    A figure in a table, as it is shown.

    Args:
        figure (`str`):
            The figure; empty where there is none.
        spread (`str`, *optional*, defaults to `""`):
            Its standard error or interval.
        counted (`str`, *optional*, defaults to `""`):
            How many are behind it, where some are missing.
        is_best (`bool`, *optional*, defaults to `False`):
            Whether it is the best of its column, or of its row where models are side by side.
    """

    figure: str
    spread: str = ""
    counted: str = ""
    is_best: bool = False


@dataclass
class Grid:
    """
    A table, before it is Markdown or LaTeX.

    Args:
        title (`str`):
            Its heading in the report.
        caption (`str`):
            What it shows, in a sentence.
        head (`list[str]`):
            Names of the columns.
        rows (`list[tuple[str, list[Cell]]]`):
            Names and cells of the rows.
    """

    title: str
    caption: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def decimals(values: Sequence[float | None], digits: int) -> int:
    """How many decimals show the largest of the values with so many digits; at most 6."""
    largest = max((abs(value) for value in values if value is not None), default=0)
    return min(6, max(0, digits - 1 - math.floor(math.log10(largest)))) if largest else 2


def best(values: Sequence[float | None], higher_is_better: bool, places: int) -> list[bool]:
    """
    Marks the best of some values.

    Args:
        values (`Sequence[float | None]`):
            The values, `None` where there is none.
        higher_is_better (`bool`):
            Which way is up.
        places (`int`):
            Decimals that are shown. Values that look alike are best together.

    Returns:
        `list[bool]`; none is best where there is nothing to compare.
    """
    shown = [None if value is None else round(value, places) for value in values]
    present = [value for value in shown if value is not None]
    if len(present) < 2:
        return [False] * len(shown)
    target = max(present) if higher_is_better else min(present)
    return [value == target for value in shown]


def score_cells(
    scores: list[dict[str, Any] | None], higher_is_better: bool, places: int | None = None
) -> Iterator[Cell]:
    """The cells of one metric, which are compared with one another."""
    scores = [score or {"value": None} for score in scores]
    values = [score["value"] if "value" in score else score["mean"] for score in scores]
    if places is None:
        places = decimals(values, CORPUS_DIGITS if any("value" in score for score in scores) else SCORE_DIGITS)
    flags = best(values, higher_is_better, places)
    if len(full_names(scores)) > 1:
        flags = [False] * len(flags)  # of different numbers of images, say, and not to be compared
    for score, value, is_best in zip(scores, values, flags):
        counted = (
            f"{score['num_scored']}/{score['num_scored'] + score['num_errors']}" if score.get("num_errors") else ""
        )
        if value is None:
            yield Cell("", counted=counted)
        else:
            error = score.get("standard_error")
            yield Cell(f"{value:.{places}f}", "" if error is None else f"± {error:.{places}f}", counted, is_best)


def full_names(scores: list[dict[str, Any] | None]) -> list[str]:
    """The names that a metric of the corpus gives to its figures, which say what they depend on."""
    return list(dict.fromkeys(score["full_name"] for score in scores if score and "full_name" in score))


def win_rate_cells(rates: list[dict[str, Any]]) -> Iterator[Cell]:
    """The cells of one metric, in percent."""
    percents = [None if rate["win_rate"] is None else 100 * rate["win_rate"] for rate in rates]
    for rate, percent, is_best in zip(rates, percents, best(percents, True, 1)):
        counted = f"{rate['num_pairs']}/{rate['num_pairs'] + rate['left_out']}" if rate["left_out"] else ""
        if percent is None:
            yield Cell("", counted=counted)
        else:
            interval = "" if rate["lower"] is None else f"[{100 * rate['lower']:.1f}, {100 * rate['upper']:.1f}]"
            yield Cell(f"{percent:.1f}", interval, counted, is_best)


def metric_head(name: str, higher_is_better: bool) -> str:
    return f"{LABELS.get(name, name)} {'↑' if higher_is_better else '↓'}"


def by_rows(columns: list[Iterator[Cell]]) -> list[list[Cell]]:
    return [list(cells) for cells in zip(*columns)]


def grids(summary: dict[str, Any]) -> list[Grid]:
    """The table of scores, and the table of win rates where there is more than one model."""
    metrics, baseline = summary["metrics"], summary["baseline"]
    columns = [
        score_cells([summary["scores"][model].get(name) for model in summary["models"]], metric["higher_is_better"])
        for name, metric in metrics.items()
    ]
    head = ["Model", *(metric_head(name, metric["higher_is_better"]) for name, metric in metrics.items())]
    caption = f"Mean scores over {summary['num_prompts']:,} prompts, with standard errors."
    tables = [Grid("Scores", caption, head, list(zip(summary["models"], by_rows(columns))))]
    rates = summary["win_rates"]
    names = list(next(iter(rates.values()), {}))
    if names:
        columns = [win_rate_cells([rates[model][name] for model in rates]) for name in names]
        caption = (
            f"Win rates against {baseline} in percent, ties one half, with {100 * summary['confidence']:g} % intervals over "
            "prompts."
        )
        head = ["Model", *(LABELS.get(name, name) for name in names)]
        tables.append(Grid("Win rates", caption, head, list(zip(rates, by_rows(columns)))))
    return tables


def group_grids(summary: dict[str, Any]) -> Iterator[Grid]:
    """A table for each metric: groups down, models across."""
    models, groups = list(summary["models"]), summary["groups"]
    for name in next(iter(groups.values()))[models[0]] if groups else ():
        metric = summary["metrics"][name]
        places = decimals([summary["scores"][model][name]["mean"] for model in models], SCORE_DIGITS)
        rows = []
        for group, scores in groups.items():
            of_models = [scores[model][name] for model in models]
            size = of_models[0]["num_scored"] + of_models[0]["num_errors"]
            cells = score_cells(of_models, metric["higher_is_better"], places)
            rows.append((f"{group} ({size:,})", list(cells)))
        title = metric_head(name, metric["higher_is_better"])
        yield Grid(title, "Means by group, with standard errors.", ["Group", *models], rows)


def markdown_table(grid: Grid) -> str:
    """A grid in Markdown."""
    lines = [
        "| " + " | ".join(markdown_text(name) for name in grid.head) + " |",
        "|---" + "|---:" * (len(grid.head) - 1) + "|",
    ]
    for name, cells in grid.rows:
        lines.append("| " + " | ".join([markdown_text(name), *(markdown_cell(cell) for cell in cells)]) + " |")
    return "\n".join(lines)


def markdown_cell(cell: Cell) -> str:
    figure = f"**{cell.figure}**" if cell.is_best else cell.figure or "n/a"
    return " ".join(part for part in (figure, cell.spread, cell.counted and f"({cell.counted})") if part)


def markdown_text(text: str) -> str:
    """A text as itself, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def latex_table(grid: Grid) -> str:
    """A grid in LaTeX, for the package booktabs."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(grid.caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}",
        r"\toprule",
        " & ".join(latex_text(name) for name in grid.head) + r" \\",
        r"\midrule",
        *(" & ".join([latex_text(name), *(latex_cell(cell) for cell in cells)]) + r" \\" for name, cells in grid.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def latex_cell(cell: Cell) -> str:
    figure = (rf"$\mathbf{{{cell.figure}}}$" if cell.is_best else f"${cell.figure}$") if cell.figure else "n/a"
    spread = cell.spread.replace("±", r"\pm")
    spread = rf"{{\scriptsize ${spread}$}}" if spread else ""
    counted = rf"{{\scriptsize ({cell.counted})}}" if cell.counted else ""
    return " ".join(part for part in (figure, spread, counted) if part)


LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex_text(text: str) -> str:
    """A text as itself, on one line."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(text.split()))


# ----- the report -----

READING = """\
Every score is a model's opinion of an image, or of an image and its prompt, and has that model's taste and blind spots. A
model trained to please one of them may score well on those that resemble it without drawing better. Look at images where the
metrics disagree before believing any of them.

- Arrows show which way is better, and the best figure of a column is bold; figures that look alike are best together.
- The **standard error** (±) says how far a mean would move with other prompts of the same kind. All models were given the
  same prompts, so it mostly overstates the doubt about the difference between two models.
- A **win rate** compares each image with the baseline's of the same prompt and index; a tie counts one half. Its interval is a
  bootstrap over prompts: it says what other prompts of the same kind would change, and nothing about other seeds of the
  training or other settings of the sampler. An interval that holds 50 shows no difference.
- **FID** and **KID** compare all images of a model with reference images. FID depends on how many there are: compare it at equal
  numbers only.
- Several metrics and models are several tests: of twenty 95 % intervals, one misses on average.
"""


def report_markdown(
    summary: dict[str, Any], pictures: dict[str, str] | None = None, gallery: str | None = None
) -> str:
    """
    The report.

    Args:
        summary (`dict`):
            From [`evaluation.report.summarize`].
        pictures (`dict[str, str]`, *optional*):
            Files of plots by their titles, relative to the report.
        gallery (`str`, *optional*):
            File of the gallery, relative to the report.

    Returns:
        `str`: Markdown.
    """
    parts = [
        "# Evaluation",
        f"{summary['num_prompts']:,} prompts. Images: {listed_models(summary)}.",
    ]
    for grid in grids(summary):
        parts += [f"## {grid.title}", markdown_text(grid.caption), markdown_table(grid)]
    for title, file in (pictures or {}).items():
        parts.append(f"![{markdown_text(title)}]({file})")
    if gallery:
        parts.append(f"[The images side by side]({gallery}), with their scores.")
    if summary["groups"]:
        parts += ["## Scores by group", "In brackets, how many of the baseline's images are in a group."]
    for grid in group_grids(summary):
        parts += [f"### {markdown_text(grid.title)}", markdown_table(grid)]
    left_out = list(missing(summary))
    parts += [
        "## What was left out",
        "\n".join(f"- {line}" for line in left_out) or "Nothing: every image has every score.",
        "## How to read this",
        READING.strip(),
        "## What was run",
        "\n".join([*described_metrics(summary), *nested(summary["settings"])]),
    ]
    return "\n\n".join(parts) + "\n"


def listed_models(summary: dict[str, Any]) -> str:
    return ", ".join(
        f"{markdown_text(model)}{' (the baseline)' if model == summary['baseline'] else ''} {number:,}"
        for model, number in summary["models"].items()
    )


def missing(summary: dict[str, Any]) -> Iterator[str]:
    """What has no score, or no counterpart, and why."""
    for model, scores in summary["scores"].items():
        for name in summary["metrics"]:
            score, of = scores.get(name), f"{markdown_text(LABELS.get(name, name))} of {markdown_text(model)}"
            if score is None or score.get("value", 0) is None:
                yield f"{of}: there is no figure."
            elif score.get("num_errors"):
                reasons = "; ".join(
                    f"{markdown_text(error['image'])}: {markdown_text(error['reason'])}" for error in score["errors"]
                )
                more = " ..." if score["num_errors"] > len(score["errors"]) else ""
                total = score["num_scored"] + score["num_errors"]
                yield f"{of}: {score['num_errors']} of {total} images have no score. {reasons}{more}"
    for name in summary["metrics"]:
        names = full_names([scores.get(name) for scores in summary["scores"].values()])
        if len(names) > 1:
            yield (
                f"{markdown_text(LABELS.get(name, name))}: the figures are {markdown_text(', '.join(names))}, which cannot be "
                "compared."
            )
    for model, rates in summary["win_rates"].items():
        for name, rate in rates.items():
            if rate["left_out"]:
                yield (
                    f"Win rate of {markdown_text(model)} by {markdown_text(LABELS.get(name, name))}: {rate['left_out']} of "
                    f"{rate['num_pairs'] + rate['left_out']} pairs lack a score, or an image, on either side."
                )


def described_metrics(summary: dict[str, Any]) -> Iterator[str]:
    """The metrics, with what their figures depend on, as a list."""
    for name, metric in summary["metrics"].items():
        names = full_names([scores.get(name) for scores in summary["scores"].values()]) or [name]
        weights = ", ".join(f"{weights} ({revision})" for weights, revision in metric["weights"].items())
        direction = "higher" if metric["higher_is_better"] else "lower"
        text = f"{LABELS.get(name, name)} ({', '.join(names)}, {direction} is better): {weights or 'no weights'}"
        yield f"- {markdown_text(text)}"


def nested(values: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """Settings as a nested list."""
    for name, value in values.items():
        head = f"{'  ' * depth}- {markdown_text(str(name))}"
        if isinstance(value, dict) and value:
            yield head
            yield from nested(value, depth + 1)
        else:
            text = ", ".join(str(item) for item in value) if isinstance(value, list | tuple | dict) else str(value)
            yield f"{head}: {markdown_text(text) or 'none'}"


def write_report(
    summary: dict[str, Any],
    output_dir: str | Path,
    pictures: dict[str, str] | None = None,
    gallery: str | None = None,
) -> None:
    """
    Writes `summary.json`, `report.md` and `tables.tex`.

    Args:
        summary (`dict`):
            From [`evaluation.report.summarize`].
        output_dir (`str` or `Path`):
            The folder of the evaluation.
        pictures (`dict[str, str]`, *optional*), gallery (`str`, *optional*):
            As in [`evaluation.report.report_markdown`].
    """
    output_dir = Path(output_dir)
    latex = "\n\n".join(["% needs \\usepackage{booktabs}", *(latex_table(grid) for grid in grids(summary))]) + "\n"
    write_file(output_dir / SUMMARY, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    write_file(output_dir / LATEX, latex.encode())
    write_file(output_dir / REPORT, report_markdown(summary, pictures, gallery).encode())
