# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Text of others is text on every page: the tags of a page and the blocks of a report are those of one with harmless texts."""

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from datasets import Dataset
from markdown_it import MarkdownIt

from tests.hostile.texts import TEXTS
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.preview import preview
from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.criteria import Attribute, Criteria
from trl_diffusion.criteria_picture import criteria_picture
from trl_diffusion.evaluation.gallery import gallery
from trl_diffusion.evaluation.report import grids, latex_table, report_markdown, summarize
from trl_diffusion.evaluation.scores import IMAGES_SCHEMA
from trl_diffusion.quickstart import world
from trl_diffusion.quickstart.oracle import OracleDetector, OracleVLM


HARMLESS = "harmless"


class Tags(HTMLParser):
    """Tags with the names of their attributes, and comments."""

    def __init__(self, page: str):
        super().__init__()
        self.found = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        # Addresses of pictures are data of the pictures
        self.found.append((tag, [(name, value if name in ("href", "style", "type") else "") for name, value in attrs]))

    def handle_endtag(self, tag):
        self.found.append(f"/{tag}")

    def handle_comment(self, data):
        self.found.append("comment")

    def handle_decl(self, decl):
        self.found.append(decl)


def blocks(text: str) -> list:
    """The blocks of a report, and what its lines hold besides text."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found.append((token.type, token.tag, token.level))
        for child in token.children or []:
            if child.type not in ("text", "softbreak", "text_special"):
                found.append((child.type, child.attrs.get("href"), child.attrs.get("src")))
    return found


def table(text: str) -> pa.Table:
    """Scores of two models, with a text as everything that a user names."""
    metrics = {text: {"higher_is_better": True, "weights": {text: text}, "errors": {"b": text}}}
    schema = IMAGES_SCHEMA.append(pa.field(text, pa.float64()))
    rows = [
        {"model": model, "prompt_id": f"{text}{n}", "prompt": text, "group": text, "index": 0, "image": image, text: score}
        for model, image, score in ((text, "a", 1.0), (f"{text}2", "b", None))
        for n in range(2)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata({"metrics": json.dumps(metrics)})


def report(text: str) -> str:
    settings = {text: {text: [text, 1], "versions": {text: text}}, "empty": text}
    summary = summarize(table(text), settings)
    return report_markdown(summary, {text: "plot.png"}, "gallery.html")


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    rows = [dict(row) for row in world.preference_dataset(2, seed=0).remove_columns("instances")]
    return [row | {name: world.png_bytes(row[name]) for name in ("chosen", "rejected")} for row in rows]


class Renamed:
    """A last role, which puts a text wherever a row, a model or an answer brings one."""

    def __init__(self, text: str):
        self.text = text

    def describe(self) -> dict:
        return {"model": self.text, "revision": self.text}

    def __call__(self, records: list) -> None:
        for record in records:
            record.id = record.prompt = record.planner_answer = record.reason = self.text
            record.dropped = [{"label": self.text, "reason": self.text}]
            for instance in record.instances:
                instance.label = instance.answer = instance.swapped_answer = self.text


def preview_page(pairs: list[dict], text: str) -> str:
    dataset, columns = prepare_rows(Dataset.from_list(pairs), pair_columns)
    vlm = OracleVLM()
    source = {"name": text, "split": "train"}
    task = instance_task(Planner(vlm), OracleDetector(), Judge(vlm, crop_size=64), source, columns)
    return preview(replace(task, roles=(*task.roles, Renamed(text))), dataset)


@pytest.mark.parametrize("text", [text for text in TEXTS if len(text) < 1000])
def test_the_preview(pairs, text):
    """As names of datasets and models, ids, prompts, reasons, labels and answers."""
    assert Tags(preview_page(pairs, text)).found == Tags(preview_page(pairs, HARMLESS)).found


@pytest.mark.parametrize("text", TEXTS)
def test_the_gallery_and_the_report(text):
    """As names of models and metrics, ids, prompts, groups, reasons of errors, revisions and settings."""
    page, harmless = gallery(table(text)), gallery(table(HARMLESS))
    assert Tags(page).found == Tags(harmless).found
    assert blocks(report(text)) == blocks(report(HARMLESS))
    for hostile, plain in zip(grids(summarize(table(text), {})), grids(summarize(table(HARMLESS), {})), strict=True):
        lines, expected = (latex_table(grid).split("\n") for grid in (hostile, plain))
        assert [line.split("{")[0].split(" ")[0][:1] == "\\" for line in lines[:4]] == [True] * 4
        assert len(lines) == len(expected)


@pytest.mark.parametrize("text", TEXTS)
def test_a_tree_is_drawn_with_any_words(text):
    """Names of criteria are pixels."""
    leaves = tuple(Attribute(name, (text,), text, text, text) for name in (text, f"{text}2"))
    tree = Criteria(text, (text, text), leaves)
    assert criteria_picture(tree).width > 0


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
def test_no_script_runs_in_a_browser(tmp_path):
    """A browser shows all texts at once on the gallery, and its title is still the gallery's."""
    text = " ".join(TEXTS)
    (tmp_path / "gallery.html").write_text(gallery(table(text)), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    shown = subprocess.run(
        [*command, f"file://{tmp_path / 'gallery.html'}"], capture_output=True, text=True, timeout=120
    )
    assert "<title>Images side by side</title>" in shown.stdout and "<article" in shown.stdout
    assert shown.stdout.count("<script") == 2 and "<iframe" not in shown.stdout and "<svg" not in shown.stdout
