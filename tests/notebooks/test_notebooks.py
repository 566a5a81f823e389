# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The notebooks of `examples/notebooks`: what they hold, and that they run from top to bottom."""

import ast
import base64
import copy
import importlib
import io
import json
import os
import re
from pathlib import Path

import nbformat
import PIL.Image
import pytest
from datasets import load_dataset

from examples.notebooks.__main__ import FOLDER, NOTEBOOKS, OF_ENVIRONMENT, clean, clean_output, heading, run
from tests.hub.conftest import hub  # noqa: F401
from trl_diffusion.machine import without_places


ROOT = Path(__file__).parents[2]
MOST_BYTES = 600_000  # of a notebook with its outputs
PUSHING = ("annotate", "evaluate")  # those with a cell that pushes, if it is asked to
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """All that a reader can read in the outputs."""
    found = []
    for output in outputs(notebook):
        found += [output.text] if output.output_type == "stream" else []
        for kind, content in output.get("data", {}).items():
            found += [re.sub(r'src="data:[^"]*"', "", content)] if kind.startswith("text/") else []
    return found


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    found = []
    for output in outputs(notebook):
        data = output.get("data", {})
        found += [data["image/png"]] if "image/png" in data else []
        found += re.findall(r'src="data:image/png;base64,([^"]*)"', data.get("text/html", ""))
    return [base64.b64decode(content) for content in found]


# ----- what is committed -----


def test_there_are_four():
    """The checks below do not pass for want of notebooks."""
    assert NOTEBOOKS == ["annotate", "cpo", "evaluate", "iapo"]


@each_notebook
def test_the_code_parses_and_names_what_exists(name):
    """Of cells and of Python in the text: what is imported from this package is there."""
    notebook = read(name)
    blocks = [
        block
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for block in re.findall(r"^```python\n(.*?)^```$", cell.source, re.DOTALL | re.MULTILINE)
    ]
    imported = []
    for source in (*code(notebook), *blocks):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl_diffusion":
                imported += [(node.module, alias.name) for alias in node.names]
    assert len(imported) > 3
    for module, each in imported:
        assert hasattr(importlib.import_module(module), each), f"{module} has no {each}"


@each_notebook
def test_the_outputs_are_of_one_whole_run(name):
    """Every cell was run, in order, without an error, and at least three pictures were shown."""
    notebook = read(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert all(output.output_type != "error" for output in outputs(notebook))
    assert len(pictures(notebook)) >= 3
    for content in pictures(notebook):
        image = PIL.Image.open(io.BytesIO(content))
        assert min(image.size) >= 128 and len(set(image.convert("L").tobytes())) > 2


@each_notebook
def test_the_outputs_tell_nothing_of_a_machine(name):
    """No path, no address of an object, no time of a progress bar, no warning, no metadata; and the file is small."""
    notebook = read(name)
    for text in texts(notebook):
        assert without_places(text) == text
        assert not re.search(r"0x[0-9a-f]{6}|\b\d\d:\d\d\b|Warning|Traceback|/tmp/|/home/", text)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES


@each_notebook
def test_what_is_committed_is_clean(name):
    """To clean it once more changes nothing, so the badge is that of the one address."""
    notebook = read(name)
    again = clean(copy.deepcopy(notebook), name)
    assert json.dumps(again) == json.dumps(notebook)
    assert heading(name) in notebook.cells[0].source


def test_the_page_has_a_badge_of_each():
    """docs/source/notebooks.md opens every notebook, at the one address."""
    page = (ROOT / "docs" / "source" / "notebooks.md").read_text(encoding="utf-8")
    assert re.findall(r"\[!\[Open in Colab\].*?\)\]\(\S+\)", page) == [
        heading(name).split("\n")[0] for name in ("iapo", "cpo", "annotate", "evaluate")
    ]


def test_cleaning():
    """Paths, addresses in memory and times are taken out; a note about the environment goes, another message stays."""
    stream = {"output_type": "stream", "name": "stderr"}
    assert clean_output(nbformat.from_dict(stream | {"text": f"x {OF_ENVIRONMENT[0]} y"})) is None
    kept = clean_output(nbformat.from_dict(stream | {"text": "saved in /somewhere/deep/model.json"}))
    assert kept.text == "saved in model.json"
    shown = {"text/plain": "<Image at 0x7F12AB>", "text/html": "<p>[40/40 00:31, Epoch 1/2]"}
    shown = nbformat.from_dict({"output_type": "display_data", "data": shown, "metadata": {"a": 1}})
    assert clean_output(shown) == {
        "output_type": "display_data",
        "data": {"text/plain": "<Image>", "text/html": "<p>[40/40 Epoch 1/2]"},
        "metadata": {},
    }


# ----- runs -----


def numbers(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines that cells printed."""
    return [
        line for output in outputs(notebook) if output.get("name") == "stdout" for line in output.text.splitlines()
    ]


@pytest.mark.slow
@each_notebook
def test_runs_from_top_to_bottom(name, tmp_path):
    """In an empty folder, offline: no cell raises, and what it shows has the form of what is committed, with nothing of the machine."""
    notebook = read(name)
    committed = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    again = clean(run(notebook, tmp_path, {**os.environ, "HF_HUB_OFFLINE": "1"}), name)
    assert len(pictures(again)) == len(pictures(committed))
    assert len(numbers(again)) == len(numbers(committed))
    if name == "iapo":
        lines = {line.split()[0]: [int(share) for share in re.findall(r"(\d+)%", line)] for line in numbers(again)}
        assert lines["IAPO"][0] >= lines["base"][0] + 20 and lines["IAPO"][1] >= lines["Diffusion-DPO"][1] + 10
    if name == "cpo":
        negatives = {
            line.split()[0]: float(re.search(r"attributes: (\S+) of 4", line)[1])
            for line in numbers(again)
            if "attributes:" in line
        }
        assert negatives["CPO"] < negatives["base"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", PUSHING)
def test_pushes_where_it_is_asked_to(name, hub, tmp_path):  # noqa: F811
    """With `PUSH = True`, against the stand-in of the Hub: what arrives loads. As committed, nothing is pushed."""
    notebook = read(name)
    assert [line for source in code(notebook) for line in source.splitlines() if line.startswith("PUSH")] == [
        "PUSH = False"
    ]
    for cell in notebook.cells:
        cell.source = cell.source.replace("PUSH = False", "PUSH = True")
    (tmp_path / "work").mkdir()
    run(notebook, tmp_path / "work", hub.environment("hf_user", tmp_path / "home"))
    pushed = {facts.id: facts for facts in hub.repositories}
    assert all(facts.private for facts in pushed.values())
    if name == "annotate":
        dataset = load_dataset("user/my-pairs-instances", split="train", token="hf_user")
        assert len(dataset) == 60 and dataset[0]["chosen"].size == (32, 32) and len(dataset[0]["instances"]) == 2
    else:
        assert sorted(pushed) == ["user/iapo", "user/iapo-evaluation"]
        assert "whole_shapes" in hub.files("user/iapo")["README.md"].decode()
        rows = load_dataset("user/iapo-evaluation", split="train", token="hf_user")
        assert len(rows) == 3 * 64 and set(rows["model"]) == {"base", "dpo", "iapo"}
