# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The laws of the shipped tree of criteria. That ids are unique is a law of every tree, which loading checks."""

import re
from collections import Counter
from importlib import resources

from trl_diffusion.criteria import Criteria


PAINTING = Criteria.load("painting")
FORMS = [form for attribute in PAINTING.attributes for form in (attribute.positive, attribute.negative)]
# These say that a quality is missing, or grade it, instead of what is seen.
EMPTY_WORDS = set(
    "no not non none never without lack lacks lacking missing absent good bad badly poor poorly wrong".split()
)


def test_shape():
    """There are 7 dimensions, 5 levels and 246 attributes, as CPO reports of its own tree."""
    assert PAINTING.name == "painting"
    assert PAINTING.levels == ("dimension", "aspect", "theme", "trait", "attribute")
    assert len(PAINTING.dimensions) == 7
    assert len(PAINTING.attributes) == 246
    assert {len(attribute.path) for attribute in PAINTING.attributes} == {4}


def test_attributes_are_spread_evenly():
    """Every dimension has 33 to 37 attributes."""
    assert all(33 <= count <= 37 for count in PAINTING.counts().values())


def test_every_group_has_several_members():
    """Every node that is no attribute has at least two nodes right below it."""
    paths = {(*attribute.path, attribute.id)[:depth] for attribute in PAINTING.attributes for depth in range(2, 6)}
    children = Counter(path[:-1] for path in paths)
    assert min(children.values()) >= 2


def test_ids():
    """The ids are lower snake_case words, and all of them are different, nodes that are no attributes included."""
    ids = [node for _, node, _ in PAINTING.walk()]
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", id) for id in ids)
    assert len(set(ids)) == len(ids) == 246 + 116 + 57 + 28 + 7


def test_forms():
    """Every form is 2 to 4 lower case words that say what is seen."""
    assert [form for form in FORMS if not re.fullmatch(r"[a-z]+( [a-z]+){1,3}", form)] == []
    assert [form for form in FORMS if EMPTY_WORDS & set(form.split())] == []


def test_definitions():
    """Every definition is one sentence of at most 25 words on when the positive form holds, and all are different."""
    definitions = [attribute.definition for attribute in PAINTING.attributes]
    assert [text for text in definitions if not re.fullmatch(r"Whether [^.:;?!]+\.", text)] == []
    assert max(len(text.split()) for text in definitions) <= 25
    assert len(set(definitions)) == 246


def test_forms_differ():
    """All 492 forms are different, whatever the order of their words, and without the small ones."""
    small = {"a", "and", "at", "in", "of", "on", "the", "to", "with"}
    contents = [frozenset(form.split()) - small for form in FORMS]
    assert len(set(FORMS)) == len(FORMS) == 492
    assert [form for form, content in zip(FORMS, contents, strict=True) if contents.count(content) > 1] == []


def test_the_file_says_where_it_is_from():
    """Its header says that the tree is this project's own work, and not the paper's list."""
    text = resources.files("trl_diffusion").joinpath("criteria_trees", "painting.yaml").read_text(encoding="utf-8")
    header = " ".join(line.lstrip("# ") for line in text.split("\nname:")[0].splitlines())
    assert "original work of this project" in header and "not the paper's own list" in header
    assert text.isascii()
