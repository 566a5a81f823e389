# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Summarizes scores: a JSON file for programs, LaTeX tables for papers, and a Markdown report."""

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..cards.tables import (
    CORPUS_DIGITS,
    SCORE_DIGITS,
    Cell,
    Grid,
    best,
    decimals,
    markdown_table,
    markdown_text,
)
from ..files import write_file
from ..metrics.win_rate import win_rate
from .scores import metrics_of


SUMMARY, REPORT, LATEX = "summary.json", "report.md", "tables.tex"
CONFIDENCE = 0.95
SHOWN_ERRORS = 3
NO_GROUP = "(no group)"
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

Key = tuple[str, int]  # id of a prompt, and index of an image among those of the prompt


# ----- figures -----


def summarize(
    table: pa.Table, settings: dict[str, Any], corpus: dict[str, dict[str, dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """
    Summarizes an evaluation.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`]. The first model is the baseline.
        settings (`dict`):
            Settings of the run, for the record: the prompt set, the protocol, the models and their revisions, versions
            of packages.
        corpus (`dict[str, dict[str, dict]]`, *optional*):
            Results of corpus metrics, which score all images of a model together, by metric and model. A result
            contains the score under a name that starts with that of the metric, `higher_is_better`, `weights`, and
            possibly more.

    Returns:
        `dict` of JSON values: `baseline`; `models`, with the number of images of each; `num_prompts`; `metrics`, with
        `higher_is_better` and `weights`; `scores` by model and metric (`mean`, `standard_error` over prompts,
        `num_scored`, `num_errors` and the first few `errors`; for corpus metrics `value`, `full_name`, and the rest of
        the result); `groups`, the scores by group, model and metric; `win_rates` against the baseline by model and
        metric; `confidence` of their intervals; and `settings`.
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
    """Summarizes the scores of one metric over images."""
    scored = [(row["prompt_id"], row[name]) for row in rows if finite(row[name]) is not None]
    values = [value for _, value in scored]
    without = [row["image"] for row in rows if finite(row[name]) is None]
    return {
        "mean": math.fsum(values) / len(values) if values else None,
        "standard_error": standard_error(values, [prompt for prompt, _ in scored]),
        "num_scored": len(values),
        "num_errors": len(without),
        "errors": [
            {"image": image, "reason": errors.get(image, "the reason is unknown")} for image in without[:SHOWN_ERRORS]
        ],
    }


def corpus_summary(result: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the result of a corpus metric into the score of the model and the description of the metric."""
    result = dict(result)
    metric = {what: result.pop(what) for what in ("higher_is_better", "weights")}
    full_name = next(key for key in result if key.startswith(name))
    return {"value": finite(result.pop(full_name)), "full_name": full_name, **result}, metric


def standard_error(values: Sequence[float], prompts: Sequence[Hashable]) -> float | None:
    """
    Computes the standard error of a mean over images with respect to the choice of prompts. The images of a prompt are
    correlated and form a cluster: with `r_p` the sum over the images of prompt `p` of value minus mean, `P` prompts
    and `N` images,

        SE = sqrt( P / (P - 1) * sum_p r_p^2 ) / N

    (the cluster-robust variance of Liang and Zeger, Biometrika 1986, for a mean). With one image per prompt, this is
    the standard deviation divided by `sqrt(N)`.

    Args:
        values (`Sequence[float]` of length `N`):
            The scores.
        prompts (`Sequence[Hashable]` of length `N`):
            Prompt of each score.

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
    """The win rate of a model against another, over images of the same prompt and index."""
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
    """The value, or `None` if it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else None


# ----- tables -----


def score_cells(
    scores: list[dict[str, Any] | None], higher_is_better: bool, places: int | None = None
) -> Iterator[Cell]:
    """The cells of one metric, with the best one marked."""
    scores = [score or {"value": None} for score in scores]
    values = [score["value"] if "value" in score else score["mean"] for score in scores]
    if places is None:
        places = decimals(values, CORPUS_DIGITS if any("value" in score for score in scores) else SCORE_DIGITS)
    flags = best(values, higher_is_better, places)
    if len(full_names(scores)) > 1:
        flags = [False] * len(flags)  # not comparable, for example because of different numbers of images
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
    """The distinct full names of a corpus metric, which state what its scores depend on."""
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
    """The table of scores, and the table of win rates if there is more than one model."""
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
            f"Win rates against {baseline} in percent, with ties as one half and {100 * summary['confidence']:g} % intervals "
            "over prompts."
        )
        head = ["Model", *(LABELS.get(name, name) for name in names)]
        tables.append(Grid("Win rates", caption, head, list(zip(rates, by_rows(columns)))))
    return tables


def group_grids(summary: dict[str, Any]) -> Iterator[Grid]:
    """A table for each metric, with groups as rows and models as columns."""
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
    """Escapes a text, on one line."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(text.split()))


# ----- the report -----

READING = """\
Every score is the output of a model, with that model's preferences and blind spots. A model that was trained on one of these
scores may score well on similar ones without better images. Look at images on which the metrics disagree before you trust any
of them.

- Arrows show which direction is better. The best value of a column is bold; values that are equal after rounding share the mark.
- The **standard error** (±) measures how much a mean would vary with other prompts of the same kind. All models have the same
  prompts, so it mostly overestimates the uncertainty of the difference between two models.
- A **win rate** compares each image with that of the baseline for the same prompt and index; a tie counts as one half. Its
  interval is a bootstrap over prompts: it accounts for other prompts of the same kind, but not for other training seeds or
  other sampling settings. An interval that contains 50 shows no difference.
- **FID** and **KID** compare all images of a model with reference images. FID depends on the number of images: compare only
  values for equal numbers.
- Several metrics and models are several tests: of twenty 95 % intervals, one is wrong on average.
"""


def report_markdown(
    summary: dict[str, Any], pictures: dict[str, str] | None = None, gallery: str | None = None
) -> str:
    """
    Builds the report.

    Args:
        summary (`dict`):
            Summary from [`evaluation.report.summarize`].
        pictures (`dict[str, str]`, *optional*):
            Files of plots by title, relative to the report.
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
        parts.append(f"[The images side by side, with their scores]({gallery}).")
    if summary["groups"]:
        parts += ["## Scores by group", "The number of the baseline's images in a group is in parentheses."]
    for grid in group_grids(summary):
        parts += [f"### {markdown_text(grid.title)}", markdown_table(grid)]
    left_out = list(missing(summary))
    parts += [
        "## What was left out",
        "\n".join(f"- {line}" for line in left_out) or "Nothing: every image has every score.",
        "## How to read this",
        READING.strip(),
        "## Settings",
        "\n".join([*described_metrics(summary), *nested(summary["settings"])]),
    ]
    return "\n\n".join(parts) + "\n"


def listed_models(summary: dict[str, Any]) -> str:
    return ", ".join(
        f"{markdown_text(model)}{' (the baseline)' if model == summary['baseline'] else ''} {number:,}"
        for model, number in summary["models"].items()
    )


def missing(summary: dict[str, Any]) -> Iterator[str]:
    """Lists missing scores and pairs, with reasons."""
    for model, scores in summary["scores"].items():
        for name in summary["metrics"]:
            score, of = scores.get(name), f"{markdown_text(LABELS.get(name, name))} of {markdown_text(model)}"
            if score is None or score.get("value", 0) is None:
                yield f"{of}: there is no value."
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
                f"{markdown_text(LABELS.get(name, name))}: the values are {markdown_text(', '.join(names))}, which are not "
                "comparable."
            )
    for model, rates in summary["win_rates"].items():
        for name, rate in rates.items():
            if rate["left_out"]:
                yield (
                    f"Win rate of {markdown_text(model)} by {markdown_text(LABELS.get(name, name))}: {rate['left_out']} of "
                    f"{rate['num_pairs'] + rate['left_out']} pairs lack a score or an image."
                )


def described_metrics(summary: dict[str, Any]) -> Iterator[str]:
    """Lists the metrics, with everything that their values depend on."""
    for name, metric in summary["metrics"].items():
        names = full_names([scores.get(name) for scores in summary["scores"].values()]) or [name]
        weights = ", ".join(f"{weights} ({revision})" for weights, revision in metric["weights"].items())
        direction = "higher" if metric["higher_is_better"] else "lower"
        text = f"{LABELS.get(name, name)} ({', '.join(names)}, {direction} is better): {weights or 'no weights'}"
        yield f"- {markdown_text(text)}"


def nested(values: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """Formats settings as a nested list."""
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
            Summary from [`evaluation.report.summarize`].
        output_dir (`str` or `Path`):
            Folder of the evaluation.
        pictures (`dict[str, str]`, *optional*), gallery (`str`, *optional*):
            See [`evaluation.report.report_markdown`].
    """
    output_dir = Path(output_dir)
    latex = "\n\n".join(["% needs \\usepackage{booktabs}", *(latex_table(grid) for grid in grids(summary))]) + "\n"
    write_file(output_dir / SUMMARY, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    write_file(output_dir / LATEX, latex.encode())
    write_file(output_dir / REPORT, report_markdown(summary, pictures, gallery).encode())
