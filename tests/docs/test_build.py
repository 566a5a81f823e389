# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The site is built from the pages of this repository without a fault, and each kind of fault is found."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from docs import pages
from docs.build import build
from docs.pages import ROOT, SOURCE, Sources


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site."""
    output = tmp_path_factory.mktemp("site")
    assert build(output) == []
    return output


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A folder of two pages, which are sound. What public names need is left to the laws."""
    monkeypatch.setattr(pages, "page_faults", lambda texts: [])
    source = tmp_path / "source"
    source.mkdir()
    contents = "- sections:\n  - local: index\n    title: Start\n  - local: other\n    title: Other\n  title: All\n"
    (source / "_toctree.yml").write_text(contents)
    (source / "index.md").write_text("# Start\n\nSee [the other](other.md#a-part).\n")
    (source / "other.md").write_text("# Other\n\n## A part\n\nText.\n")
    return source


def add(source: Path, text: str) -> None:
    (source / "index.md").write_text((source / "index.md").read_text() + f"\n{text}\n")


def test_every_page_is_there(site):
    """Each page is a file of the site, in the order of the table of contents, and has its formulas without a script."""
    names = {path.stem for path in SOURCE.glob("*.md")}
    assert names <= {path.stem for path in site.glob("*.html")}
    landing = (site / "index.html").read_text()
    linked = re.findall(r'class="reference internal" href="(\w+)\.html"', landing)
    listed = [name for name in re.findall(r"local: (\w+)", (SOURCE / "_toctree.yml").read_text()) if name != "index"]
    assert list(dict.fromkeys(linked))[: len(listed)] == listed
    assert "<mfrac>" in (site / "instance_dpo_trainer.html").read_text()
    assert not any("https://cdn" in path.read_text() for path in site.glob("*.html"))


def test_links_lead_somewhere(site):
    """Every link of every page of the site leads to a file of the site, and its anchor to an element there."""
    texts = {path.resolve(): path.read_text() for path in site.rglob("*.html")}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    for path, text in texts.items():
        for target in re.findall(r'<a [^>]*href="([^"]+)"', text):
            if not re.match(r"https?:|mailto:", target):
                name, _, anchor = target.partition("#")
                found = (path.parent / name).resolve() if name else path
                assert found.exists(), (path, target)
                assert not anchor or found not in ids or anchor in ids[found], (path, target)


def test_a_reference_has_signature_arguments_and_links(site):
    """A documented function shows its arguments and their types, and names of the package lead to their place."""
    text = (site / "instance_dpo_trainer.html").read_text()
    part = text[text.index('id="trl_diffusion.masks.instance_masks"') :]
    words = re.sub(r"<[^>]+>|\s", "", part[: part.index('<dt class="sig')])
    assert "instance_masks(boxes,judged,conflicts,height,width,w_neg=0.0,mask_overlap='mean'" in words
    assert "boxes(torch.Tensorofshape(B,N,4))Unitboxes." in words
    assert 'id="trl_diffusion.InstanceDPOConfig.beta"' in text
    assert 'href="#trl_diffusion.losses.diffusion_dpo_loss"' in text


def test_files_of_the_repository_are_pages(site):
    """A file that a page links is shown, and CONTRIBUTING.md is rendered."""
    assert "cff-version" in (site / "files/CITATION.cff.html").read_text()
    assert 'id="adding-an-objective"' in (site / "files/CONTRIBUTING.md.html").read_text()


def test_two_sound_pages_have_no_faults(small, tmp_path):
    """What the tests below break is whole before."""
    assert build(tmp_path / "site", small) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[away](missing.md)", "index.md: there is no file `missing.md`"),
        ("[a script](../../examples/missing.py)", "index.md: there is no file `../../examples/missing.py`"),
        ("[a part](other.md#missing)", "'missing'"),
        ("![a picture](images/missing.png)", "index.md: there is no file `images/missing.png`"),
        ("![a picture](empty.png)", "index.md: `empty.png` is no picture"),
        ("[[autodoc]] losses.missing", "index: `losses.missing` is not in trl_diffusion"),
        ("[[autodoc]] process.Process\n    - missing", "index: `process.Process.missing` is not in trl_diffusion"),
        ("[[autodoc]] Criteria\n\n[[autodoc]] Criteria", "index: `Criteria` is documented twice"),
        ("See [`MissingTrainer`].", "index.md: [`MissingTrainer`] is no name of this package"),
    ],
)
def test_faults_of_a_page(small, tmp_path, text, fault):
    """A broken link, anchor, picture or name, and a name that two places document, fail the build."""
    (small / "empty.png").touch()
    add(small, text)
    assert any(fault in line for line in build(tmp_path / "site", small))


def test_an_earlier_site_is_removed(small, tmp_path):
    """A page that is gone is gone from the site too; a folder that holds no site is left as it is."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.txt").touch()
    build(tmp_path / "site", small)
    assert (tmp_path / "site" / "mine.txt").exists() and (tmp_path / "site" / "other.html").exists()
    (small / "other.md").unlink()
    build(tmp_path / "site", small)
    assert not (tmp_path / "site" / "other.html").exists() and (tmp_path / "site" / "index.html").exists()


def test_faults_of_the_contents(small, tmp_path):
    """A page that the table of contents leaves out, and an entry without a page, fail the build."""
    shutil.copy(small / "other.md", small / "third.md")
    assert "_toctree.yml: `third` is missing." in build(tmp_path / "site", small)
    (small / "third.md").unlink()
    (small / "other.md").unlink()
    (small / "index.md").write_text("# Start\n")
    assert "_toctree.yml: there is no page `other.md`." in build(tmp_path / "site", small)


def test_markdown_of_hugging_face(small, tmp_path):
    """Formulas, tips and alerts of the doc-builder's format become those of MyST; code stays as it is."""
    folder = tmp_path / "folder"
    folder.mkdir()
    add(
        small,
        "Where \\\\( x \\\\) is:\n\n$$\nx = 1\n$$\n\n<Tip warning={true}>\n\nHot.\n\n</Tip>\n\n> [!NOTE]\n> Cold.\n",
    )
    add(small, "````text\n```\n[`Code`] \\\\( x \\\\) [a](b.md)\n```\n````")
    assert Sources(small).write(folder) == []
    text = (folder / "index.md").read_text()
    for part in ("{math}`x`", "```{math}\nx = 1\n```", ":::{warning}\n\nHot.\n\n:::", ":::{note}\nCold.\n:::"):
        assert part in text
    assert "[`Code`] \\\\( x \\\\) [a](b.md)" in text


def test_what_is_linked_is_in_the_repository():
    """A link out of the repository is a fault, even to a file that is there."""
    assert (ROOT / "docs" / "build.py").exists()
    found = Sources()
    found.link("[x](", "../../../../../../../../etc/passwd", SOURCE / "index.md", ROOT)
    assert any("there is no file" in fault for fault in found.faults)


def test_a_notebook_is_a_page(small, tmp_path, monkeypatch):
    """Its texts, its code and the richest form of each output are on the page; a line for the shell is no fault."""
    monkeypatch.setattr(pages, "ROOT", small)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["hello\n", "world\n"]},
        {"output_type": "display_data", "data": {"image/png": picture, "text/plain": ["<picture>"]}},
        {"output_type": "execute_result", "data": {"text/html": ["<b id='bold'>bold</b>"], "text/plain": ["plain"]}},
        {"output_type": "execute_result", "data": {"text/plain": "42"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A notebook\n", "\n", "[Other](other.md)."]},
        {"cell_type": "code", "source": "!pip install something\nprint('hello')", "outputs": outputs},
    ]
    (small / "a.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    add(small, "[![a badge](badge.png)](a.ipynb)")
    Image.new("RGB", (8, 8)).save(small / "badge.png")
    assert build(tmp_path / "site", small) == []
    text = (tmp_path / "site" / "files" / "a.ipynb.html").read_text()
    for part in (
        "<h1>A notebook",
        "hello\nworld",
        "<div class=\"output\"><b id='bold'>",
        "42",
        'src="../_images/2-1.png"',
    ):
        assert part in text
    assert "plain<" not in text and 'href="files/a.ipynb.html"' in (tmp_path / "site" / "index.html").read_text()
