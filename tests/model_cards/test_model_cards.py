# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The cards of `model_cards/` are what their recipes, facts and code make, and are fit to be shown."""

import json
import re

import PIL.Image
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt

from examples.model_cards import datasets, reference, tiny
from examples.model_cards.__main__ import MODEL_CARDS, render
from trl_diffusion.cards.facts import EVALUATION_NAME, FACTS_NAME, read_evaluation_facts, read_model_facts, write_facts


CARDS = sorted(MODEL_CARDS.glob("*/README.md"))
MODELS = sorted(file.parent for file in MODEL_CARDS.glob(f"*/{FACTS_NAME}"))
TINY = [name for names in tiny.CARDS.values() for name in names]


def test_no_card_is_missing():
    """Each recipe, dataset and tiny model has its card, and there are no others."""
    names = {*reference.CARDS, *datasets.REFERENCE, *datasets.TINY, *TINY}
    assert {file.parent.name for file in CARDS} == names
    assert {folder.name for folder in MODELS} == {*reference.CARDS, *TINY}


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_facts_make(folder):
    """`python -m examples.model_cards` would not change it."""
    assert (folder / "README.md").read_text(encoding="utf-8") == render(folder)


@pytest.mark.parametrize("name", reference.CARDS)
def test_the_facts_of_a_recipe_are_those_of_its_file(name, tmp_path):
    """A recipe that changes changes its card."""
    write_facts(reference.reference_facts(name), tmp_path / "facts.json")
    assert (MODEL_CARDS / name / FACTS_NAME).read_text(encoding="utf-8") == (tmp_path / "facts.json").read_text()


@pytest.mark.parametrize("name", datasets.REFERENCE)
def test_the_card_of_a_dataset_is_what_its_recipe_makes(name):
    assert (MODEL_CARDS / name / "README.md").read_text(encoding="utf-8") == datasets.reference_card(name)


def test_the_cards_of_small_datasets_are_those_of_their_builds(tmp_path):
    """Built again, they differ in the versions of packages alone."""
    datasets.make(tmp_path)
    for name in datasets.TINY:
        said = [(folder / name / "README.md").read_text(encoding="utf-8") for folder in (MODEL_CARDS, tmp_path)]
        before, now = (re.sub(r"\d+\.\d+\.\d+\S*|num_bytes: \d+|_size: \d+", "", text) for text in said)
        assert before == now


@pytest.mark.parametrize("name", reference.CARDS)
def test_a_recipe_that_nobody_trained_has_no_figures(name):
    """Such a card says so, and shows no pictures, scores or time of a training."""
    facts, text = (
        read_model_facts(MODEL_CARDS / name / FACTS_NAME),
        ModelCard.load(MODEL_CARDS / name / "README.md").text,
    )
    assert "Nobody has trained it yet" in text and "Nothing was measured" in text
    assert not (facts.samples or facts.curves or facts.last_logs or facts.seconds or facts.hardware)
    assert not (MODEL_CARDS / name / EVALUATION_NAME).exists() and "![" not in text


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_has_figures_with_its_arm(name):
    """Its card shows what it drew, its curves, and scores with intervals beside those of the base and of the arm."""
    folder = MODEL_CARDS / name
    card, facts = ModelCard.load(folder / "README.md"), read_model_facts(folder / FACTS_NAME)
    evaluation = read_evaluation_facts(folder / EVALUATION_NAME)
    assert len(facts.samples) == 4 and facts.curves and facts.teaser and facts.last_logs
    assert bool(facts.masks) == (facts.trainer == "InstanceDPOTrainer")
    assert evaluation.prompts["number"] == 1024 and "base" in evaluation.models
    if name not in ("quickstart-diffusion-dpo", "quickstart-sft"):
        world = next(world for world, names in tiny.CARDS.items() if name in names)
        assert evaluation.arm == {"scenes": "quickstart-diffusion-dpo", "paintings": "quickstart-sft"}[world]
    for score in evaluation.scores[name].values():
        assert score.lower <= score.value <= score.upper
    assert card.data.eval_results and card.data.library_name == "diffusers"


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.parent.name)
def test_a_card_is_fit_to_be_shown(file):
    """Its metadata are read, its pictures are there and small, nothing else lies beside it, and its code is code."""
    text = file.read_text(encoding="utf-8")
    card = (ModelCard if (file.parent / FACTS_NAME).exists() else DatasetCard)(text)
    assert card.data.to_dict()["tags"]
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    linked = {child.attrs["src"] for token in tokens for child in token.children or [] if child.type == "image"} | {
        entry["output"]["url"] for entry in card.data.to_dict().get("widget", [])
    }
    pictures = {name for name in linked if not name.startswith("https://")}
    there = {str(path.relative_to(file.parent)) for path in file.parent.rglob("*") if path.is_file()}
    assert there - pictures <= {"README.md", FACTS_NAME, EVALUATION_NAME} and pictures <= there
    for name in pictures:
        with PIL.Image.open(file.parent / name) as image:
            image.load()
        assert (file.parent / name).stat().st_size < 400_000
    for token in tokens:
        if token.type == "fence" and token.info == "python":
            compile(token.content, str(file), "exec")
        if token.type == "fence" and token.info == "yaml":
            assert yaml.safe_load(token.content)
        if token.type == "fence" and token.info == "json":
            json.loads(token.content)


def test_nothing_of_a_machine_is_in_the_cards():
    """No path, and no name of a user or a host, in any file."""
    for file in (path for path in MODEL_CARDS.rglob("*") if path.suffix in (".md", ".json")):
        assert not re.search(r"/(home|root|tmp|work|Users|mnt)/", file.read_text(encoding="utf-8")), file
