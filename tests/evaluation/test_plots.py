# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import sys

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from trl_diffusion.evaluation.plots import BASELINE_COLOR, model_color, plot_distributions, plot_win_rates, save_plots
from trl_diffusion.evaluation.report import summarize
from trl_diffusion.evaluation.scores import IMAGES_SCHEMA


METRICS = [
    "pickscore",
    "hpsv2",
    "aesthetic",
    "clip_score",
    "image_reward",
    "caption_match",
    "fancy",
    "num_negative_attributes",
]
LONG = "stabilityai/stable-diffusion-xl-base-1.0-tuned-with-preferences-of-very-many-people"


def table_of(models, metrics, num_prompts=20, seed=0) -> pa.Table:
    """Scores that differ by model and metric. For the last metric, lower is better."""
    rng = np.random.default_rng(seed)
    schema = IMAGES_SCHEMA
    for name in metrics:
        schema = schema.append(pa.field(name, pa.float64()))
    rows = []
    for place, model in enumerate(models):
        for number in range(num_prompts):
            rows.append(
                {
                    "model": model,
                    "prompt_id": str(number),
                    "prompt": "a cat",
                    "index": 0,
                    "image": f"{model}/{number}.png",
                    **{name: rng.normal(10 * k + 0.5 * place) for k, name in enumerate(metrics)},
                }
            )
    described = {name: {"higher_is_better": name != METRICS[-1], "weights": {}, "errors": {}} for name in metrics}
    return pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata({"metrics": json.dumps(described)})


def panels(figure) -> list:
    return [axes for axes in figure.axes if axes.axison]


def labelled(axes) -> dict:
    """The dots of a panel, by model."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def names(axes) -> list[str]:
    return [label.get_text().replace("\n", "") for label in axes.get_yticklabels()]


def test_distributions_show_the_scores():
    """Each panel shows mean, interquartile range and full range of each model's scores, from top to bottom."""
    models = ["base", "tuned", "other"]
    table = table_of(models, ["pickscore", METRICS[-1]])
    figure = plot_distributions(table)
    assert [axes.get_title("left") for axes in panels(figure)] == ["PickScore", "#A_neg"]
    assert [axes.get_xlabel() for axes in panels(figure)] == ["higher is better", "lower is better"]
    for name, axes in zip(("pickscore", METRICS[-1]), panels(figure)):
        values = np.array(table[name]).reshape(3, 20)
        dots = labelled(axes)
        bars = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 4]
        assert list(dots) == models and len(bars) == len(axes.collections) == 3
        for place, model in enumerate(models):
            assert dots[model].get_xdata() == pytest.approx(values[place].mean())
            assert list(dots[model].get_ydata()) == [place]
            assert bars[place].get_xdata() == pytest.approx(np.quantile(values[place], [0.25, 0.75]))
            outline = axes.collections[place].get_paths()[0].vertices
            assert (outline[:, 0].min(), outline[:, 0].max()) == pytest.approx(
                (values[place].min(), values[place].max())
            )
            assert np.all(np.abs(outline[:, 1] - place) < 0.5)
        (baseline,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert baseline.get_xdata() == pytest.approx([values[0].mean()] * 2)
        assert axes.get_ylim() == (2.5, -0.5)


def test_missing_scores_are_not_drawn():
    """Missing scores are not part of the distribution, and a model without scores has a note in its row."""
    table = table_of(["base", "tuned"], ["pickscore"], num_prompts=3)
    values = [1.0, None, 4.0, None, math.nan, None]
    table = table.set_column(6, "pickscore", pa.array(values, pa.float64())).replace_schema_metadata(
        table.schema.metadata
    )
    (axes,) = panels(plot_distributions(table))
    assert list(labelled(axes)) == ["base"] and labelled(axes)["base"].get_xdata() == [2.5]
    (text,) = axes.texts
    assert text.get_text() == "no scores" and text.xy[1] == 1


def test_scores_that_are_all_alike_are_drawn():
    """A metric with equal scores for all images has its dots at this score."""
    table = table_of(["base", "tuned"], ["pickscore"], num_prompts=2)
    table = table.set_column(6, "pickscore", pa.array([1.0, 1.0, 2.0, 2.0])).replace_schema_metadata(
        table.schema.metadata
    )
    (axes,) = panels(plot_distributions(table))
    assert [line.get_xdata()[0] for line in labelled(axes).values()] == [1.0, 2.0]


def test_win_rates_show_point_and_interval():
    """Each model but the baseline has a win rate with interval in percent, and every panel shows the line at 50 %."""
    table = table_of(["base", "tuned", "other"], METRICS)
    summary = summarize(table, {})
    figure = plot_win_rates(summary)
    assert len(panels(figure)) == len(METRICS) and len({axes.get_xlim() for axes in panels(figure)}) == 1
    for name, axes in zip(METRICS, panels(figure)):
        dots = labelled(axes)
        assert list(dots) == ["tuned", "other"]
        bars = [line for line in axes.lines if line.get_linewidth() == 2]
        for place, model in enumerate(dots):
            rate = summary["win_rates"][model][name]
            assert (dots[model].get_xdata()[0], dots[model].get_ydata()[0]) == (100 * rate["win_rate"], place)
            assert list(bars[place].get_xdata()) == [100 * rate["lower"], 100 * rate["upper"]]
            assert axes.texts[place].get_text() == f"{100 * rate['win_rate']:.1f}"
            assert axes.get_xlim()[0] < 100 * rate["lower"] and 100 * rate["upper"] < axes.get_xlim()[1]
        (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert list(line.get_xdata()) == [50, 50] and axes.get_xlim()[0] < 50 < axes.get_xlim()[1]


def test_win_rates_without_pairs_or_interval():
    """A model without pairs has a note, one pair gives a point without interval, and a baseline alone is refused."""
    table = table_of(["base", "tuned", "other"], ["pickscore"], num_prompts=1)
    table = table.set_column(6, "pickscore", pa.array([1.0, 2.0, None])).replace_schema_metadata(table.schema.metadata)
    (axes,) = panels(plot_win_rates(summarize(table, {})))
    assert list(labelled(axes)) == ["tuned"] and labelled(axes)["tuned"].get_xdata() == [100]
    assert [text.get_text() for text in axes.texts] == ["100.0", "no pairs"]
    assert not [line for line in axes.lines if line.get_linewidth() == 2]
    with pytest.raises(ValueError, match="no model to compare with the baseline base"):
        plot_win_rates(summarize(table.slice(0, 1), {}))


def test_models_have_one_colour_each_in_all_plots():
    """The baseline is grey; the first eight models differ, and a model has the same colour in both plots."""
    assert model_color(0) == BASELINE_COLOR and len({model_color(place) for place in range(8)}) == 8
    table = table_of(["base", "tuned", "other"], ["pickscore"])
    (distributions,), (rates,) = panels(plot_distributions(table)), panels(plot_win_rates(summarize(table, {})))
    for model, dot in labelled(rates).items():
        assert to_hex(dot.get_color()) == to_hex(labelled(distributions)[model].get_markeredgecolor())


def test_colours_are_told_apart_by_their_luminance_on_white():
    """Every colour has a contrast of at least 1.8 to white."""
    for place in range(8):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(model_color(place))]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # WCAG 2
        assert 1.05 / (luminance + 0.05) >= 1.8


@pytest.mark.parametrize("num_metrics", [1, 4, 8])
@pytest.mark.parametrize("num_models", [2, 8])
@pytest.mark.parametrize("name", ["b", LONG])
@pytest.mark.filterwarnings("error")  # matplotlib warns where it finds no room
def test_no_text_overlaps(name, num_models, num_metrics):
    """For short and long names, and one to eight metrics, texts do not overlap or leave the picture, and rows keep
    their height."""
    table = table_of([name if place == 1 else f"a{place}" for place in range(num_models)], METRICS[:num_metrics])
    for figure in (plot_distributions(table), plot_win_rates(summarize(table, {}))):
        figure.draw_without_rendering()
        boxes = []
        for axes in panels(figure):
            texts = [axes._left_title, axes.xaxis.label, *axes.texts, *axes.get_yticklabels()]
            low, high = axes.get_xlim()
            texts += [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes += [text.get_window_extent() for text in texts if text.get_text()]
            assert axes.bbox.height / len(axes.get_yticks()) >= 0.3 * figure.dpi
        boxes.append(figure._supxlabel.get_window_extent())
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        for place, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:place])


def test_nothing_of_a_long_name_is_cut():
    """Long names are wrapped, and shown only at the left panels."""
    figure = plot_distributions(table_of(["base", LONG], METRICS[:4]))
    assert [names(axes) for axes in panels(figure)] == [["base", LONG], ["", ""]] * 2


def test_a_name_is_no_formula():
    """Dollars in a name are escaped; this name would be an invalid formula."""
    table = table_of(["base $", "$\\frac$ _"], ["pickscore"])
    for figure in (plot_distributions(table), plot_win_rates(summarize(table, {}))):
        figure.draw_without_rendering()
        assert names(panels(figure)[0])[-1] == "\\$\\frac\\$ _"


def test_the_files(tmp_path):
    """Both plots are written as PNG and returned with their titles; without a second model there is only one."""
    table = table_of(["base", "tuned"], ["pickscore"])
    pictures = save_plots(table, summarize(table, {}), tmp_path)
    assert pictures == {
        "Distributions of the scores": "distributions.png",
        "Win rates against base": "win_rates.png",
    }
    for file in pictures.values():
        with Image.open(tmp_path / file) as picture:
            assert picture.format == "PNG" and picture.width >= 400
    alone = table.slice(0, 20)
    assert save_plots(alone, summarize(alone, {}), tmp_path) == {"Distributions of the scores": "distributions.png"}


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    """Without matplotlib, the error names what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "trl-diffusion\[evaluation\]"'):
        plot_distributions(table_of(["base"], ["pickscore"], num_prompts=2))
