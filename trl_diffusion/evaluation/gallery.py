# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""An HTML page with the images of all models side by side and their scores, sorted by the disagreement of the metrics."""

import json
import statistics
from collections.abc import Sequence
from importlib import resources
from itertools import permutations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pyarrow as pa

from ..files import write_file
from .report import LABELS, SCORE_DIGITS, best, decimals, finite
from .scores import metrics_of


GALLERY = "gallery.html"


def disagreement(
    scores: Sequence[Sequence[float | None]], scales: Sequence[float], higher_is_better: Sequence[bool]
) -> float:
    """
    Measures how strongly two metrics disagree about which of two models has the better image for a prompt.

    According to metric `k`, model `a` leads model `b` by `d_k(a, b) = (s_k(a) - s_k(b)) / scale_k`, negated if lower
    is better. The disagreement about a pair of models is the smaller of the largest leads in the two directions. The
    pair with the largest disagreement counts:

        disagreement = max over a, b of min( max_k d_k(a, b), max_k d_k(b, a) ), and at least 0

    With standard deviations as scales, a value of 1 means that for some pair of images, one metric prefers the first
    by at least one standard deviation, and another metric the second.

    Args:
        scores (`list[list[float | None]]` of shape `(models, metrics)`):
            Scores of the images of one prompt, `None` if missing.
        scales (`list[float]` of length `metrics`):
            Scale of the differences of each metric. A metric with scale 0 is ignored.
        higher_is_better (`list[bool]` of length `metrics`):
            Whether a higher score is better, for each metric.

    Returns:
        `float`: the disagreement, 0 if no two metrics disagree.
    """
    most = 0.0
    for first, second in permutations(scores, 2):
        leads = [
            (own - other) / (scale if up else -scale)
            for own, other, scale, up in zip(first, second, scales, higher_is_better, strict=True)
            if own is not None and other is not None and scale
        ]
        if leads:
            most = max(most, min(max(leads), -min(leads)))
    return most


def spread(values: Sequence[float | None]) -> float | None:
    """The largest minus the smallest score of the models, `None` with fewer than two."""
    present = [value for value in values if value is not None]
    return max(present) - min(present) if len(present) > 1 else None


def gallery_data(table: pa.Table) -> dict[str, Any]:
    """
    Collects the data that the page shows.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`].

    Returns:
        `dict`: `models`; `metrics` (`name`, `label`, `up`, `decimals`); `groups`; and `rows`, one for each prompt and
        index, with `images` by model (a quoted path, or `None`), `scores` by model and metric, `best` (for each
        metric, the indices of the best models; empty if all are equal), `disagreement`, and `spreads` by metric.
    """
    metrics = metrics_of(table)
    models = table["model"].unique().to_pylist()
    ups = [metric["higher_is_better"] for metric in metrics.values()]
    columns = {name: [finite(value) for value in table[name].to_pylist()] for name in metrics}
    present = {name: [value for value in values if value is not None] for name, values in columns.items()}
    scales = [statistics.pstdev(values) if values else 0.0 for values in present.values()]
    places = [
        0 if all(value.is_integer() for value in values) else decimals(values, SCORE_DIGITS)
        for values in present.values()
    ]

    images: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in table.to_pylist():
        images.setdefault((row["prompt_id"], row["index"]), {})[row["model"]] = row
    rows = []
    for (prompt_id, index), of_models in images.items():
        some = next(iter(of_models.values()))
        scores = [
            [finite(of_models[model][name]) if model in of_models else None for name in metrics] for model in models
        ]
        by_metric = list(zip(*scores))
        rows.append(
            {
                "id": prompt_id,
                "index": index,
                "prompt": some["prompt"],
                "group": some["group"],
                "images": [quote(of_models[model]["image"]) if model in of_models else None for model in models],
                "scores": [[rounded(value) for value in of_model] for of_model in scores],
                "best": [marked(values, up, shown) for values, up, shown in zip(by_metric, ups, places)],
                "disagreement": rounded(disagreement(scores, scales, ups)),
                "spreads": [rounded(spread(values)) for values in by_metric],
            }
        )
    return {
        "models": models,
        "metrics": [
            {"name": name, "label": LABELS.get(name, name), "up": up, "decimals": shown}
            for name, up, shown in zip(metrics, ups, places)
        ],
        "groups": [group for group in table["group"].unique().to_pylist() if group is not None],
        "rows": rows,
    }


def marked(values: Sequence[float | None], higher_is_better: bool, places: int) -> list[int]:
    """The indices of the best values; empty if all are equal."""
    flags = best(values, higher_is_better, places)
    return (
        [] if sum(flags) == sum(value is not None for value in values) else [i for i, flag in enumerate(flags) if flag]
    )


def rounded(value: float | None) -> float | None:
    """Rounds to six significant digits, to keep the page small."""
    return None if value is None else float(f"{value:.6g}")


def gallery(table: pa.Table) -> str:
    """
    Builds the page. It needs no files but the images, which it links by their paths.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`].

    Returns:
        `str`: HTML, for a file in the folder that the paths of the images are relative to.
    """
    data = gallery_data(table)
    template = resources.files("trl_diffusion").joinpath("templates", "gallery.html").read_text(encoding="utf-8")
    return (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(data=script_json(data), models=data["models"], num_rows=len(data["rows"]))
    )


def script_json(value: Any) -> str:
    """JSON that is safe inside a `<script>` element, whatever the prompts contain."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_gallery(table: pa.Table, output_dir: str | Path) -> str:
    """
    Writes `gallery.html`.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`].
        output_dir (`str` or `Path`):
            Folder of the evaluation.

    Returns:
        `str`: the name of the file, for [`evaluation.report.write_report`].
    """
    write_file(Path(output_dir) / GALLERY, gallery(table).encode())
    return GALLERY
