# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math

import pyarrow as pa
import pytest

from trl_diffusion.evaluation.report import (
    Cell,
    Grid,
    best,
    decimals,
    grids,
    latex_table,
    latex_text,
    markdown_table,
    markdown_text,
    report_markdown,
    standard_error,
    summarize,
    write_report,
)
from trl_diffusion.evaluation.scores import IMAGES_SCHEMA


UP = {"higher_is_better": True, "weights": {"org/up": "abc"}, "errors": {}}
DOWN = {"higher_is_better": False, "weights": {}, "errors": {}}
SETTINGS = {"prompt_set": {"name": "parti", "num_prompts": 3}, "versions": {"torch": "2.6"}, "seeds": [0, 1]}


def table_of(scores, metrics, groups=None, num_images=3) -> pa.Table:
    """Scores by model and metric, with one image per prompt."""
    schema, rows = IMAGES_SCHEMA, []
    for name in metrics:
        schema = schema.append(pa.field(name, pa.float64()))
    for model, of_model in scores.items():
        for place in range(len(next(iter(of_model.values()), range(num_images)))):
            rows.append(
                {
                    "model": model,
                    "prompt_id": f"p{place}",
                    "prompt": f"prompt {place}",
                    "group": groups[place] if groups else None,
                    "index": 0,
                    "image": f"images/{model}/p{place}-0.png",
                    **{name: values[place] for name, values in of_model.items()},
                }
            )
    return pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata({"metrics": json.dumps(metrics)})


THREE_BY_TWO = {
    "base": {"pickscore": [1.0, 2.0, 3.0], "num_negative_attributes": [1.0, 2.0, 3.0]},
    "tuned": {"pickscore": [2.0, 2.0, 5.0], "num_negative_attributes": [2.0, 2.0, 5.0]},
}
METRICS = {"pickscore": UP, "num_negative_attributes": DOWN}


@pytest.fixture
def summary() -> dict:
    return summarize(table_of(THREE_BY_TWO, METRICS, ["cats", "cats", "dogs"]), SETTINGS)


def test_means_and_standard_errors(summary):
    """The mean of 1, 2, 3 is 2 with standard error 1 / sqrt 3; that of 2, 2, 5 is 3 with 1."""
    score = summary["scores"]["base"]["pickscore"]
    assert score["mean"] == 2 and score["standard_error"] == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    assert summary["scores"]["tuned"]["pickscore"] == {
        "mean": 3.0,
        "standard_error": pytest.approx(math.sqrt((1 + 1 + 4) / 2 / 3), rel=1e-12),
        "num_scored": 3,
        "num_errors": 0,
        "errors": [],
    }
    assert summary["baseline"] == "base" and summary["models"] == {"base": 3, "tuned": 3}
    assert summary["num_prompts"] == 3 and summary["settings"] == SETTINGS
    assert summary["metrics"]["pickscore"] == {"higher_is_better": True, "weights": {"org/up": "abc"}}


@pytest.mark.parametrize(
    "values, prompts, expected",
    [
        ([1, 2, 3, 6], "abcd", math.sqrt(14 / 3 / 4)),  # one image per prompt: deviations -2, -1, 0, 3
        ([1, 3, 5, 9], "aabb", 2.5),  # means 2 and 7 of the prompts: sqrt(25 / 2) / sqrt(2)
        ([1, 2, 6], "aab", 2.0),  # residuals -3 and 3: sqrt(2 / 1 * 18) / 3
        ([4, 4, 4, 4], "abcd", 0.0),
        ([1, 9], "aa", None),
        ([], "", None),
    ],
)
def test_the_standard_error_is_over_prompts(values, prompts, expected):
    """With one image per prompt, it is the usual standard error; images of a prompt form a cluster."""
    assert standard_error(values, prompts) == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_images_of_one_prompt_add_nothing_where_they_are_alike():
    """Duplicating every image does not change the standard error over prompts."""
    values = [1.0, 4.0, 2.0, 7.0]
    assert standard_error(values * 2, "abcd" * 2) == pytest.approx(standard_error(values, "abcd"), rel=1e-12)


def test_win_rates(summary):
    """Two wins and a tie count as 2.5 of 3, and as 0.5 of 3 if lower is better."""
    rate = summary["win_rates"]["tuned"]["pickscore"]
    assert rate["win_rate"] == pytest.approx(2.5 / 3) and rate["num_pairs"] == 3 and rate["num_ties"] == 1
    assert rate["left_out"] == 0 and 0.5 <= rate["lower"] <= rate["win_rate"] <= rate["upper"] == 1
    assert summary["win_rates"]["tuned"]["num_negative_attributes"]["win_rate"] == pytest.approx(0.5 / 3)
    assert list(summary["win_rates"]) == ["tuned"] and summary["confidence"] == 0.95


def test_the_interval_is_over_prompts():
    """Repeating every pair ten times does not change the interval within prompts, and narrows it for new prompts."""
    scores = {"base": {"pickscore": [0.0] * 8}, "tuned": {"pickscore": [1.0, 1.0, 1.0, -1.0] * 2}}
    once = table_of(scores, {"pickscore": UP})
    rows = once.to_pylist()
    same = [row | {"index": index, "image": f"{index}/{row['image']}"} for row in rows for index in range(10)]
    own = [row | {"index": 0, "prompt_id": f"{row['prompt_id']}-{row['index']}"} for row in same]
    rates = [
        summarize(pa.Table.from_pylist(some, schema=once.schema), {})["win_rates"]["tuned"]["pickscore"]
        for some in (rows, same, own)
    ]
    assert [rate["num_pairs"] for rate in rates] == [8, 80, 80]
    widths = [rate["upper"] - rate["lower"] for rate in rates]
    assert widths[1] == pytest.approx(widths[0]) and widths[2] < widths[0] / 2


def test_images_without_scores_are_counted():
    """Missing scores and NaN are not in means or pairs, and the first reasons are reported."""
    scores = {
        "base": {"pickscore": [1.0, 2.0, 3.0, 6.0, 4.0]},
        "tuned": {"pickscore": [None, None, None, math.nan, 5.0]},
    }
    errors = {f"images/tuned/p{place}-0.png": f"reason {place}" for place in range(3)}
    summary = summarize(table_of(scores, {"pickscore": UP | {"errors": errors}}), {})
    assert summary["scores"]["tuned"]["pickscore"] == {
        "mean": 5.0,
        "standard_error": None,
        "num_scored": 1,
        "num_errors": 4,
        "errors": [{"image": f"images/tuned/p{place}-0.png", "reason": f"reason {place}"} for place in range(3)],
    }
    rate = summary["win_rates"]["tuned"]["pickscore"]
    assert (rate["win_rate"], rate["num_pairs"], rate["left_out"]) == (1.0, 1, 4)
    report = report_markdown(summary)
    assert "4 of 5 images have no score. images/tuned/p0-0.png: reason 0; " in report and "reason 2 ..." in report
    assert "by PickScore: 4 of 5 pairs lack a score" in report
    assert "| tuned | **5.000** (1/5) |" in report and "| tuned | 100.0 (1/5) |" in report


def test_a_model_without_scores_has_no_figures():
    """A model without scores has `n/a` with a count in Markdown and LaTeX, and without pairs no win rate."""
    scores = {"base": {"pickscore": [1.0, 2.0]}, "tuned": {"pickscore": [None, None]}}
    summary = summarize(table_of(scores, {"pickscore": UP}), {})
    assert summary["scores"]["tuned"]["pickscore"]["mean"] is None
    assert summary["win_rates"]["tuned"]["pickscore"] == {
        "win_rate": None,
        "lower": None,
        "upper": None,
        "num_pairs": 0,
        "num_ties": 0,
        "left_out": 2,
    }
    of_scores, of_rates = grids(summary)
    assert markdown_table(of_scores).splitlines()[-1] == "| tuned | n/a (0/2) |"
    assert markdown_table(of_rates).splitlines()[-1] == "| tuned | n/a (0/2) |"
    assert r"tuned & n/a {\scriptsize (0/2)} \\" in latex_table(of_scores)


def test_images_that_one_model_lacks_are_left_out_of_pairs():
    """A prompt with an image of only one model is not a pair, and is counted."""
    table = table_of(THREE_BY_TWO, METRICS)
    rate = summarize(table.slice(0, 5), {})["win_rates"]["tuned"]["pickscore"]
    assert (rate["num_pairs"], rate["left_out"], rate["win_rate"]) == (2, 1, 0.75)
    rate = summarize(table.slice(1, 5), {})["win_rates"]["tuned"]["pickscore"]
    assert (rate["num_pairs"], rate["left_out"], rate["win_rate"]) == (2, 1, 0.75)


def test_groups(summary):
    """Each group has the means of its images; without groups there are no such tables."""
    groups = summary["groups"]
    assert list(groups) == ["cats", "dogs"]
    assert groups["cats"]["tuned"]["pickscore"]["mean"] == 2 and groups["dogs"]["tuned"]["pickscore"]["mean"] == 5
    assert groups["cats"]["base"]["pickscore"]["standard_error"] == pytest.approx(0.5)
    report = report_markdown(summary)
    assert "| cats (2) | 1.500 ± 0.500 | **2.000** ± 0.000 |" in report  # higher is better
    assert "| cats (2) | **1.500** ± 0.500 | 2.000 ± 0.000 |" in report  # lower is better
    assert "| dogs (1) | 3.000 | **5.000** |" in report
    summary = summarize(table_of(THREE_BY_TWO, METRICS), SETTINGS)
    assert summary["groups"] == {} and "by group" not in report_markdown(summary)


def test_prompts_without_a_group_are_not_lost():
    """If only some prompts have a group, the others form a group too."""
    summary = summarize(table_of(THREE_BY_TWO, METRICS, ["cats", None, None]), {})
    assert summary["groups"]["(no group)"]["base"]["pickscore"]["mean"] == 2.5


def fid_of(number, num_images=3) -> dict:
    return {
        f"fid_x_n{num_images}": number,
        "num_images": num_images,
        "higher_is_better": False,
        "weights": {"net": "1"},
    }


def test_figures_of_all_images_together():
    """FID is listed with its own name and direction, without groups or win rates, and its lowest value is the best."""
    corpus = {"fid": {"base": fid_of(12.34), "tuned": fid_of(11.96)}}
    summary = summarize(table_of(THREE_BY_TWO, METRICS, ["cats"] * 3), {}, corpus)
    assert summary["scores"]["tuned"]["fid"] == {"value": 11.96, "full_name": "fid_x_n3", "num_images": 3}
    assert summary["metrics"]["fid"] == {"higher_is_better": False, "weights": {"net": "1"}}
    assert "fid" not in summary["win_rates"]["tuned"] and "fid" not in summary["groups"]["cats"]["tuned"]
    lines = markdown_table(grids(summary)[0]).splitlines()
    assert lines[0].endswith("| FID ↓ |") and lines[2].endswith("| 12.3 |") and lines[3].endswith("| **12.0** |")
    assert r"- FID (fid\_x\_n3, lower is better): net (1)" in report_markdown(summary)


def test_an_evaluation_may_have_no_scores_of_single_images():
    """With FID alone, there is one table, without win rates and groups."""
    table = table_of({"base": {}, "tuned": {}}, {}, num_images=2)
    summary = summarize(table, {}, {"fid": {"base": fid_of(12.34, 2), "tuned": fid_of(11.96, 2)}})
    (grid,) = grids(summary)
    assert markdown_table(grid).splitlines()[2:] == ["| base | 12.3 |", "| tuned | **12.0** |"]
    assert "## Win rates" not in report_markdown(summary)


def test_figures_of_different_kinds_are_not_compared():
    """FIDs of different numbers of images have no best value, and the report says so; it also names a model without
    FID."""
    corpus = {"fid": {"base": fid_of(12.34), "tuned": fid_of(11.96, num_images=2)}}
    report = report_markdown(summarize(table_of(THREE_BY_TWO, METRICS), {}, corpus))
    assert "| 12.3 |" in report and "| 12.0 |" in report
    assert r"FID: the values are fid\_x\_n3, fid\_x\_n2, which are not comparable" in report
    report = report_markdown(summarize(table_of(THREE_BY_TWO, METRICS), {}, {"fid": {"base": fid_of(12.34)}}))
    assert "| n/a |" in report and "FID of tuned: there is no value." in report


@pytest.mark.parametrize(
    "values, higher_is_better, expected",
    [
        ([22.02, 21.5, 22.01], True, [True, False, False]),
        ([22.02, 21.5, 22.01], False, [False, True, False]),
        ([22.021, 21.5, 22.018], True, [True, False, True]),  # both are shown as 22.02
        ([None, 21.5, 22.0], True, [False, False, True]),
        ([None, 21.5], True, [False, False]),
        ([-0.5, -0.1], True, [False, True]),
    ],
)
def test_the_best_is_marked(values, higher_is_better, expected):
    """The best values are the largest or smallest after rounding, and with fewer than two values there are none."""
    assert best(values, higher_is_better, 2) == expected


def test_bold_cells(summary):
    """In both tables, in Markdown and LaTeX, the best value of each metric is bold, whether higher or lower is
    better."""
    of_scores, of_rates = grids(summary)
    assert markdown_table(of_scores).splitlines() == [
        r"| Model | PickScore ↑ | \#A\_neg ↓ |",
        "|---|---:|---:|",
        "| base | 2.000 ± 0.577 | **2.000** ± 0.577 |",
        "| tuned | **3.000** ± 1.000 | 3.000 ± 1.000 |",
    ]
    latex = latex_table(of_scores)
    assert r"base & $2.000$ {\scriptsize $\pm 0.577$} & $\mathbf{2.000}$ {\scriptsize $\pm 0.577$} \\" in latex
    assert r"Model & PickScore $\uparrow$ & \#A\_neg $\downarrow$ \\" in latex
    assert latex.index(r"\toprule") < latex.index(r"\midrule") < latex.index(r"\bottomrule")
    third = {"other": {"pickscore": [2.0, 3.0, 4.0], "num_negative_attributes": [2.0, 3.0, 4.0]}}
    of_rates = grids(summarize(table_of(THREE_BY_TWO | third, METRICS), {}))[1]
    assert [[cell.is_best for cell in cells] for _, cells in of_rates.rows] == [[False, True], [True, False]]
    assert of_rates.rows[1][1][0].figure == "100.0" and of_rates.rows[1][1][1].figure == "0.0"


@pytest.mark.parametrize(
    "values, digits, expected",
    [
        ([22.02, 21.5], 4, "22.02"),
        ([34.7], 4, "34.70"),
        ([5.43], 4, "5.430"),
        ([12.345], 3, "12.3"),
        ([0.00123], 3, "0.00123"),
        ([-0.25, 0.1], 4, "-0.2500"),
        ([0.0], 4, "0.00"),
        ([123456.0], 4, "123456"),
        ([1e-12], 4, "0.000000"),
    ],
)
def test_digits(values, digits, expected):
    """The largest value of a column has the given number of digits, and integer parts are always complete."""
    assert f"{values[0]:.{decimals([*values, None], digits)}f}" == expected


def test_names_are_escaped():
    """Special characters of Markdown and LaTeX are escaped."""
    name = "a_b & 50% | #1 $x$ {y} ~^\\ <i>\n*z*"
    assert latex_text(name) == (
        r"a\_b \& 50\% \textbar{} \#1 \$x\$ \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{} "
        r"\textless{}i\textgreater{} *z*"
    )
    assert markdown_text(name) == r"a\_b & 50% \| \#1 $x$ \{y\} \~^\\ \<i\> \*z\*"
    grid = Grid("", "50% of a_b", ["Model", "s_1"], [(name, [Cell("1.0", "± 0.1", "", True)])])
    assert r"\caption{50\% of a\_b}" in latex_table(grid) and latex_table(grid).count(r"\\" + "\n") == 2
    assert markdown_table(grid).splitlines()[2].replace(r"\|", "").count("|") == 3


def test_the_files(tmp_path, summary):
    """The summary is valid JSON, the report has plots, gallery and settings, and the LaTeX file has both tables."""
    write_report(summary, tmp_path, {"Distributions": "distributions.png"}, "gallery.html")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    report = (tmp_path / "report.md").read_text()
    assert "![Distributions](distributions.png)" in report and "(gallery.html)" in report
    assert "3 prompts. Images: base (the baseline) 3, tuned 3." in report
    assert "- PickScore (pickscore, higher is better): org/up (abc)" in report
    assert r"- \#A\_neg (num\_negative\_attributes, lower is better): no weights" in report
    assert "- prompt\\_set\n  - name: parti\n  - num\\_prompts: 3\n" in report and "- seeds: 0, 1\n" in report
    assert "Nothing: every image has every score." in report
    assert (tmp_path / "tables.tex").read_text().count(r"\begin{tabular}") == 2


def test_one_model_alone_has_a_report():
    """Without a second model, there is no table of win rates, and no best value."""
    summary = summarize(table_of({"base": THREE_BY_TWO["base"]}, METRICS), SETTINGS)
    (grid,) = grids(summary)
    assert summary["win_rates"] == {} and not any(cell.is_best for _, cells in grid.rows for cell in cells)
    assert "## Win rates" not in report_markdown(summary)
