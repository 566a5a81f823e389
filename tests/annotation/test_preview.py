# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from datasets import Dataset
from PIL import Image

from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.attributes import attribute_task
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.preview import preview
from trl_diffusion.annotation.records import image_columns, pair_columns, prepare_rows
from trl_diffusion.criteria import Criteria
from trl_diffusion.quickstart import paintings, world
from trl_diffusion.quickstart.oracle import OracleDetector, OracleVLM
from trl_diffusion.quickstart.sampling import shipped


class Tags(HTMLParser):
    """Start tags with their attributes. Fails if a tag is not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def having(self, **attributes) -> list[dict]:
        return [found for _, found in self.tags if attributes.items() <= found.items()]


@pytest.fixture(scope="module")
def page() -> str:
    rows = [dict(row) for row in world.preference_dataset(3, seed=0).remove_columns("instances")]
    rows[1]["chosen"] = b"<html>not found</html>"
    rows[1]["prompt"] = "<script>alert(1)</script> & more"
    rows = [row | {name: encoded(row[name]) for name in ("chosen", "rejected")} for row in rows]
    dataset, columns = prepare_rows(Dataset.from_list(rows), pair_columns)
    vlm = OracleVLM()
    source = {"name": "world", "split": "train"}
    return preview(instance_task(Planner(vlm), OracleDetector(), Judge(vlm, crop_size=64), source, columns), dataset)


def encoded(image) -> bytes:
    return image if isinstance(image, bytes) else world.png_bytes(image)


def test_boxes_stand_where_they_are(page):
    """Each instance has its box on both images, in percent of the image, in the colour of its verdict."""
    tags = Tags(page)
    boxes = [found for tag, found in tags.tags if tag == "div" and (found.get("class") or "").startswith("box ")]
    assert len(boxes) == 2 * 2 * 2  # two rows that are ok, two instances, two images
    truth = world.preference_dataset(3, seed=0)[0]["instances"][0]
    (left,) = re.findall(r"left: ([\d.]+)%", boxes[0]["style"])
    assert float(left) == pytest.approx(100 * truth["chosen_box"][0] / world.SIZE, abs=100 / world.SIZE)
    assert boxes[0]["class"] == "box chosen" and "{&#34;better&#34;: &#34;A&#34;}" in page


def test_the_number_of_a_box_is_that_of_its_verdict(page):
    """The first instance of a row is number 1 in both images and beside its label, the second number 2, with the worlds' verdicts."""
    row = page.split("<article>")[1]
    assert re.findall(r'<span class="number">(\d)</span>', row) == ["1", "2", "1", "2", "1", "2"]
    truth = world.preference_dataset(3, seed=0)[0]["instances"]
    listed = re.findall(r'<span class="number">(\d)</span> ([\w ]+)</p>\s*<p><b>better in (\w+)</b>', row)
    names = ("chosen", "rejected", "tie")
    expected = [(str(i), found["label"], names[found["preference"]]) for i, found in enumerate(truth, start=1)]
    assert [(number, label.split(" ", 1)[1], verdict) for number, label, verdict in listed] == expected


def test_the_page_stands_alone(page):
    """All images are embedded in the page and valid, and nothing is loaded from elsewhere."""
    sources = [found["src"] for tag, found in Tags(page).tags if tag == "img"]
    assert len(sources) == 2 * (2 + 4) + 1  # the broken row shows the image that it has
    for source in sources:
        assert source.startswith("data:image/jpeg;base64,")
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).load()
    assert "http" not in page


def test_errors_show_their_reason_and_nothing_is_run(page):
    """A broken row is shown with its reason, and data are escaped."""
    assert '<span class="status error">error</span>' in page
    assert "chosen: this is not an image that can be read" in page
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "<li>ok 2</li><li>error 1</li>" in page and "<li>instances 4</li>" in page


def test_attributes_show_their_forms():
    """A painting is shown with the forms of its attributes, by dimension."""
    dataset, columns = prepare_rows(paintings.painting_dataset(2, seed=0), image_columns)
    expert = AttributeExpert(OracleVLM(), Criteria.load(shipped("criteria.yaml")))
    page = preview(attribute_task(expert, {"name": "paintings", "split": "train"}, columns), dataset)
    row = paintings.painting_dataset(2, seed=0)[0]
    for attribute in row["negative_attributes"]:
        assert f'<span class="chip negative">{paintings.ATTRIBUTES[attribute][1]}</span>' in page
    for attribute in row["positive_attributes"]:
        assert f'<span class="chip positive">{paintings.ATTRIBUTES[attribute][0]}</span>' in page
    assert len(Tags(page).having(alt="image")) == 2
