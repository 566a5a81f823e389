# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
import random
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from trl_diffusion.evaluation.gallery import disagreement, gallery, gallery_data, spread, write_gallery
from trl_diffusion.evaluation.scores import IMAGES_SCHEMA


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} <!-- \' & \u2028'


def table_of(rows, higher_is_better) -> pa.Table:
    """A table of scores from rows `(model, prompt id, prompt, group, index, image, *scores)`."""
    schema = IMAGES_SCHEMA
    for name in higher_is_better:
        schema = schema.append(pa.field(name, pa.float64()))
    metrics = {name: {"higher_is_better": up, "weights": {}, "errors": {}} for name, up in higher_is_better.items()}
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), schema)]
    return pa.Table.from_arrays(columns, schema=schema.with_metadata({"metrics": json.dumps(metrics)}))


@pytest.fixture
def table() -> pa.Table:
    rows = [
        ("base", "p0", "a cat", "cats", 0, "images/base/p0-0.png", 20.0, 3.0),
        ("base", "p 1#", HOSTILE, "<b>dogs</b>", 0, "images/base/p 1#-0.png", 22.0, 1.0),
        ("base", "p2", "a cow", "cats", 0, "images/base/p2-0.png", 21.0, None),
        ("tuned", "p0", "a cat", "cats", 0, "images/tuned/p0-0.png", 24.0, 5.0),
        ("tuned", "p 1#", HOSTILE, "<b>dogs</b>", 0, "images/tuned/p 1#-0.png", 22.001, 1.0),
    ]
    return table_of(rows, {"pickscore": True, "num_negative_attributes": False})


@pytest.mark.parametrize(
    "scores, scales, ups, expected",
    [
        # The second model leads by 1 scale for the first metric, the first model by 2 for the second metric
        ([[1, 5], [3, 4]], [2, 0.5], [True, True], 1.0),
        ([[1, 5], [3, 4]], [2, 0.5], [True, False], 0.0),
        ([[1, 5], [3, 4]], [2, 0.5], [False, False], 1.0),
        # A third metric without a preference changes nothing
        ([[1, 5, 7], [3, 4, 7]], [2, 0.5, 1], [True] * 3, 1.0),
        ([[1, 5, 7], [3, 4, None]], [2, 0.5, 1], [True] * 3, 1.0),
        ([[1, 5, 7], [3, 4, 9]], [2, 0.5, 0], [True] * 3, 1.0),
        # No disagreement: one metric, one model, no scores
        ([[1], [3]], [1], [True], 0.0),
        ([[1, 5]], [1, 1], [True, True], 0.0),
        ([[None, 5], [3, None]], [1, 1], [True, True], 0.0),
        # Of three models, the pair with the largest disagreement counts: the first and the last, by 3 and 4
        ([[0, 4], [1, 3], [3, 0]], [1, 1], [True, True], 3.0),
    ],
)
def test_disagreement(scores, scales, ups, expected):
    """The disagreement is the smaller of the two largest opposite leads, in scales of the metrics."""
    assert disagreement(scores, scales, ups) == expected


def test_disagreement_agrees_with_its_definition():
    """It equals a naive loop over all pairs of metrics and models: the largest minimum of two opposite leads."""
    rng = random.Random(0)
    for _ in range(50):
        num_models, num_metrics = rng.randint(2, 4), rng.randint(2, 4)
        scores = [[rng.gauss(0, 1) for _ in range(num_metrics)] for _ in range(num_models)]
        scales = [rng.uniform(0.5, 2) for _ in range(num_metrics)]
        ups = [rng.random() < 0.5 for _ in range(num_metrics)]

        def lead(metric, first, second, scores=scores, scales=scales, ups=ups):
            return (scores[first][metric] - scores[second][metric]) / scales[metric] * (1 if ups[metric] else -1)

        naive = max(
            min(lead(j, a, b), lead(k, b, a))
            for a, b in itertools.permutations(range(num_models), 2)
            for j, k in itertools.product(range(num_metrics), repeat=2)
        )
        assert disagreement(scores, scales, ups) == pytest.approx(max(0, naive), rel=1e-12)


def test_disagreement_has_no_unit():
    """It does not change if a metric is scaled or shifted together with its scale, or with the order of models and
    metrics."""
    scores = [[0.3, 21.0, -1.0], [0.5, 20.0, 2.0], [0.4, 23.0, 0.0]]
    scales, ups = [0.2, 1.5, 1.0], [True, True, False]
    found = disagreement(scores, scales, ups)
    assert found == pytest.approx(1)  # the second model is ahead of the first by 1, and behind it by 1 / 1.5 and 3
    other = [[100 * own[0] - 7, *own[1:]] for own in scores]
    assert disagreement(other, [20, 1.5, 1.0], ups) == pytest.approx(found, rel=1e-12)
    assert disagreement(scores[::-1], scales, ups) == found
    assert disagreement([own[::-1] for own in scores], scales[::-1], ups[::-1]) == found


def test_spread():
    """The spread is the largest minus the smallest score, without missing ones, and `None` with fewer than two."""
    assert spread([3.0, None, -1.0, 2.0]) == 4.0
    assert spread([3.0, None]) is None and spread([]) is None


def test_rows_of_the_page(table):
    """A row has the image and scores of each model for a prompt and index, and the best ones; missing values are
    empty."""
    data = gallery_data(table)
    assert data["models"] == ["base", "tuned"] and data["groups"] == ["cats", "<b>dogs</b>"]
    assert data["metrics"] == [
        {"name": "pickscore", "label": "PickScore", "up": True, "decimals": 2},
        {"name": "num_negative_attributes", "label": "#A_neg", "up": False, "decimals": 0},
    ]
    first, second, third = data["rows"]
    # Standard deviations: of 20, 22, 21, 24, 22.001 and of 3, 1, 5, 1 (which is sqrt 2.75)
    assert first.pop("disagreement") == pytest.approx(min(4 / 1.326768, 2 / 2.75**0.5), rel=1e-5)
    assert first == {
        "id": "p0",
        "index": 0,
        "prompt": "a cat",
        "group": "cats",
        "images": ["images/base/p0-0.png", "images/tuned/p0-0.png"],
        "scores": [[20.0, 3.0], [24.0, 5.0]],
        "best": [[1], [0]],
        "spreads": [4.0, 2.0],
    }
    assert second["best"] == [[], []]  # both show 22.00, and both have 1
    assert second["images"][0] == "images/base/p%201%23-0.png" and second["disagreement"] == 0
    assert third["images"] == ["images/base/p2-0.png", None] and third["scores"] == [[21.0, None], [None, None]]
    assert third["spreads"] == [None, None] and third["best"] == [[], []]


class Page(HTMLParser):
    """Start tags with their attributes, and the contents of scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def test_hostile_prompts_are_text(table):
    """A prompt with script, tag, comment or template syntax is unchanged in the data, and nowhere else on the page."""
    html = gallery(table)
    page = Page(html)
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    data = json.loads(page.scripts[0])
    assert data == gallery_data(table) and data["rows"][1]["prompt"] == HOSTILE
    assert not re.search(r"[<>&]", page.scripts[0]) and "alert" not in html.replace(page.scripts[0], "")
    assert not any(tag in ("img", "b") for tag, _ in page.tags)


def test_text_is_never_read_as_html(table):
    """The script of the page inserts no HTML, and executes nothing from the data."""
    script = Page(gallery(table)).scripts[1]
    assert "textContent" in script
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in script


def test_the_page_loads_images_late_and_nothing_else(table, tmp_path):
    """Images are local files with lazy loading, and nothing comes from the network."""
    assert write_gallery(table, tmp_path) == "gallery.html"
    html = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert 'image.loading = "lazy"' in html and "data:image" not in html
    assert "http" not in html and "prefers-color-scheme: dark" in html
    assert not any({"src", "href"} & attributes.keys() for _, attributes in Page(html).tags)


def test_models_are_escaped_in_the_page():
    """Names of models are escaped as well."""
    rows = [("<i>base</i>", "p", "a", None, 0, "a.png", 1.0), ("tuned", "p", "a", None, 0, "b.png", 2.0)]
    html = gallery(table_of(rows, {"clip_score": True}))
    assert "<i>" not in html and "&lt;i&gt;base&lt;/i&gt; is the baseline" in html
