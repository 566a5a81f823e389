# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0


import math
import pickle
import random
import re
import tomllib
from pathlib import Path

import pytest

from tests import tiny
from trl_diffusion.criteria import Attribute, Criteria, choose_attributes, parse_criteria, render_prompt


TREE = """\
name: still_life
levels: [dimension, group, attribute]
tree:
  light:
    shadows:
      edges: {positive: soft edges, negative: cut out edges, definition: How shadows end.}
      depth: {positive: deep shadows, negative: flat shadows, definition: How dark shadows are.}
    source:
      warmth: {positive: warm light, negative: cold light, definition: What light it is.}
  paint:
    surface:
      brush: {positive: visible strokes, negative: smeared strokes, definition: Whether strokes show.}
"""
HEAD = "name: t\nlevels: [dimension, attribute]\ntree:\n"
FORMS = "positive: red, negative: blue, definition: Hue."
GOOD = f"  color:\n    hue: {{{FORMS}}}\n"


@pytest.fixture
def tree() -> Criteria:
    return parse_criteria(TREE, "still_life.yaml")


def attribute(name: str, dimension: str) -> Attribute:
    return Attribute(name, (dimension,), f"{name} yes", f"{name} no", "Whether.")


def random_choice(seed: int) -> list[tuple[Attribute, str]]:
    """Attributes of up to five dimensions, shuffled, each in one of its forms."""
    rng = random.Random(seed)
    sizes = [rng.randrange(6) for _ in range(rng.randrange(1, 6))]
    attributes = [attribute(f"d{d}_{index}", f"d{d}") for d, size in enumerate(sizes) for index in range(size)]
    rng.shuffle(attributes)
    return [(leaf, rng.choice(["positive", "negative"])) for leaf in attributes]


class TestLoading:
    def test_from_a_file(self, tmp_path, tree):
        """A path, as a string or a `Path`, gives the same tree as its text."""
        path = tmp_path / "still_life.yaml"
        path.write_text(TREE)
        assert Criteria.load(path) == Criteria.load(str(path)) == tree
        assert (tree.name, tree.levels) == ("still_life", ("dimension", "group", "attribute"))

    def test_shipped(self):
        """`painting` loads by name, and its attributes are found by id and by index."""
        criteria = Criteria.load("painting")
        assert len(criteria.dimensions) > 1 and criteria.attributes
        for index, leaf in enumerate(criteria.attributes):
            assert criteria.find(leaf.id) is criteria.find(index) is leaf
            assert len(leaf.path) + 1 == len(criteria.levels)

    def test_every_shipped_tree_is_in_the_wheel(self):
        """`package-data` lists all shipped trees, so they are installed."""
        root = Path(__file__).parents[1]
        project = tomllib.loads((root / "pyproject.toml").read_text())
        patterns = project["tool"]["setuptools"]["package-data"]["trl_diffusion"]
        listed = {path for pattern in patterns for path in (root / "trl_diffusion").glob(pattern)}
        assert set((root / "trl_diffusion" / "criteria_trees").glob("*.yaml")) <= listed

    @pytest.mark.parametrize("name", ["paintings", "no/such/tree.yaml", "", "painting.yaml", "../criteria"])
    def test_no_such_tree(self, name, tmp_path, monkeypatch):
        """An unknown name raises a ValueError that names it and the shipped trees."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=f"no file {re.escape(repr(name))}.*shipped: .*painting"):
            Criteria.load(name)

    def test_a_folder_is_no_tree(self, tmp_path):
        """The message names the folder."""
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            Criteria.load(tmp_path)

    def test_byte_order_mark_and_umlauts(self, tmp_path):
        """A file with a byte order mark, Windows line ends and letters of any script is valid."""
        text = HEAD + GOOD.replace("red", "weiche Übergänge 柔").replace("\n", "\r\n")
        (tmp_path / "tree.yaml").write_bytes(text.encode("utf-8-sig"))
        assert Criteria.load(tmp_path / "tree.yaml").find("hue").positive == "weiche Übergänge 柔"

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
    def test_another_encoding_names_the_file(self, tmp_path, encoding):
        """A file that is not UTF-8 raises a ValueError with the file and the expected encoding."""
        (tmp_path / "tree.yaml").write_bytes((HEAD + GOOD.replace("red", "grün")).encode(encoding))
        with pytest.raises(ValueError, match="tree.yaml") as error:
            Criteria.load(tmp_path / "tree.yaml")
        assert "UTF-8" in str(error.value)

    def test_words_of_yaml_stay_text(self):
        """Ids and forms that YAML reads as booleans, null or numbers stay text."""
        ids = ["yes", "on", "null", "off", "true", "y"]
        leaves = "".join(f"    {name}: {{positive: yes, negative: 3.10, definition: 0x1F}}\n" for name in ids)
        criteria = parse_criteria(f"name: 007\nlevels: [yes, no]\ntree:\n  n:\n{leaves}", "t")
        assert [leaf.id for leaf in criteria.attributes] == ids
        assert (criteria.name, criteria.levels, criteria.dimensions) == ("007", ("yes", "no"), ("n",))
        assert {(leaf.positive, leaf.negative, leaf.definition) for leaf in criteria.attributes} == {
            ("yes", "3.10", "0x1F")
        }

    def test_forms_are_stripped(self):
        """Whitespace around a form is removed, because it would end up in prompts."""
        text = "  color:\n    hue:\n      positive: |\n        red\n      negative: ' blue '\n      definition: Hue.\n"
        leaf = parse_criteria(HEAD + text, "t").find("hue")
        assert (leaf.positive, leaf.negative) == ("red", "blue")

    def test_two_attributes_may_share_a_form(self):
        """Forms may be repeated; only ids are unique."""
        text = "  light:\n    glow: {positive: soft, negative: hard, definition: Glow.}\n"
        text += "  line:\n    contour: {positive: soft, negative: sharp, definition: Contour.}\n"
        assert len(parse_criteria(HEAD + text, "t").attributes) == 2

    def test_a_tree_of_one_level(self):
        """Each attribute then is its own dimension."""
        criteria = parse_criteria(f"name: t\nlevels: [attribute]\ntree:\n  hue: {{{FORMS}}}\n", "t")
        assert criteria.counts() == {"hue": 1}
        assert criteria.select("hue")[0].path == ()
        assert list(criteria.walk()) == [(0, "hue", criteria.attributes[0])]

    def test_a_tree_goes_to_workers(self, tree):
        """Criteria survive pickling, as collators do on their way to the workers of a data loader."""
        copy = pickle.loads(pickle.dumps(tree))
        assert copy == tree
        assert copy.find("brush") == tree.find("brush")


INVALID = {
    "empty file": ("", 1, None, "is empty"),
    "comment alone": ("# a tree\n", 1, None, "is empty"),
    "list": ("- a\n- b\n", 1, None, "the file must be a mapping"),
    "text": ("painting\n", 1, None, "the file must be a mapping"),
    "syntax": (HEAD + "  color:\n    hue: {positive: red\n  form:\n", 6, None, "not YAML"),
    "tab": (HEAD + "  color:\n\thue: {}\n", 5, None, "not YAML"),
    "colon in a form": (HEAD + "  color:\n    hue:\n      positive: red: deep\n", 6, None, "not YAML"),
    "unknown alias": (HEAD + "  color: *hues\n", 4, None, "not YAML"),
    "two documents": (HEAD + GOOD + "---\nname: u\n", 6, None, "not YAML"),
    "no name": (f"levels: [a]\ntree:\n  hue: {{{FORMS}}}\n", 1, None, "`name` is missing"),
    "no levels": (f"name: t\ntree:\n  hue: {{{FORMS}}}\n", 1, None, "`levels` is missing"),
    "no tree": ("\nname: t\nlevels: [a]\n", 2, None, "`tree` is missing"),
    "empty name": ("name:\nlevels: [a]\ntree: {}\n", 1, "name", "must be a non-empty text"),
    "name a list": ("name: [t]\nlevels: [a]\ntree: {}\n", 1, "name", "must be a non-empty text"),
    "levels empty": ("name: t\nlevels: []\ntree: {}\n", 2, "levels", "must be a list"),
    "levels null": ("name: t\nlevels:\ntree: {}\n", 2, "levels", "must be a list"),
    "levels a text": ("name: t\nlevels: a\ntree: {}\n", 2, "levels", "must be a list"),
    "levels a mapping": ("name: t\nlevels: {a: b}\ntree: {}\n", 2, "levels", "must be a list"),
    "level empty": ("name: t\nlevels: [a, '']\ntree: {}\n", 2, "levels", "must be a non-empty text"),
    "level a list": ("name: t\nlevels: [a, [b]]\ntree: {}\n", 2, "levels", "must be a non-empty text"),
    "tree empty": ("name: t\nlevels: [a]\ntree: {}\n", 3, "tree", "is empty"),
    "tree null": ("name: t\nlevels: [a]\ntree:\n", 3, "tree", "is empty"),
    "tree a list": ("name: t\nlevels: [a]\ntree:\n  - hue\n", 4, "tree", "must be a mapping"),
    "tree twice": (HEAD + GOOD + "tree: {}\n", 6, None, "the key 'tree' is already used"),
    "inner node empty": (HEAD + GOOD + "  form: {}\n", 6, "form", "is empty"),
    "inner node null": (HEAD + GOOD + "  form:\n", 6, "form", "is empty"),
    "inner node a text": (HEAD + GOOD + "  form: round\n", 6, "form", "must be a mapping"),
    "leaf null": (HEAD + GOOD + "    tone:\n", 6, "color.tone", "is empty"),
    "leaf a list": (HEAD + GOOD + "    tone: [red, blue]\n", 6, "color.tone", "must be a mapping"),
    "id beside it": (HEAD + GOOD + f"    hue: {{{FORMS}}}\n", 6, "color", "the key 'hue' is already used"),
    "id elsewhere": (
        HEAD + GOOD + f"  form:\n    hue: {{{FORMS}}}\n",
        7,
        "form",
        "the id 'hue' is already used in line 5",
    ),
    "id of a dimension": (
        HEAD + GOOD + f"  form:\n    color: {{{FORMS}}}\n",
        7,
        "form",
        "the id 'color' is already used in line 4",
    ),
    "id of its own dimension": (
        HEAD + f"  color:\n    color: {{{FORMS}}}\n",
        5,
        "color",
        "the id 'color' is already used in line 4",
    ),
    "node used twice": (
        HEAD + f"  color: &same\n    hue: {{{FORMS}}}\n  form: *same\n",
        5,
        "form",
        "the id 'hue' is already used in line 5",
    ),
    "node inside itself": (
        "name: t\nlevels: [a, b, c]\ntree: &all\n  color: *all\n",
        4,
        "color",
        "the id 'color' is already used",
    ),
    "bad id": (HEAD + f"  color:\n    Bad Id: {{{FORMS}}}\n", 5, "color", "'Bad Id' is not a valid id"),
    "bad dimension": (HEAD + "  Color:\n    hue: {}\n", 4, "tree", "'Color' is not a valid id"),
    "id with a dash": (HEAD + f"  color:\n    warm-hue: {{{FORMS}}}\n", 5, "color", "'warm-hue' is not a valid id"),
    "id a number": (HEAD + f"  color:\n    1: {{{FORMS}}}\n", 5, "color", "'1' is not a valid id"),
    "id empty": (HEAD + f"  color:\n    '': {{{FORMS}}}\n", 5, "color", "'' is not a valid id"),
    "id with a line break": (HEAD + f'  color:\n    "hue\\n": {{{FORMS}}}\n', 5, "color", "is not a valid id"),
    "id with an umlaut": (HEAD + f"  color:\n    tönung: {{{FORMS}}}\n", 5, "color", "'tönung' is not a valid id"),
    "merge key": (HEAD + "  color:\n    <<: {a: b}\n", 5, "color", "'<<' is not a valid id"),
    "key a list": (HEAD + "  color:\n    ? [a, b]\n    : c\n", 5, "color", "has a key that is not a text"),
    "top key a list": (f"? [a]\n: b\n{HEAD}{GOOD}", 1, None, "has a key that is not a text"),
    "leaf too high": (HEAD + f"  hue: {{{FORMS}}}\n", 4, "hue", "at level 1, but attributes are at level 2"),
    "tree a leaf": (f"name: t\nlevels: [a]\ntree: {{{FORMS}}}\n", 3, "tree", "at level 0, but attributes are at"),
    "leaf too deep": (
        HEAD + f"  color:\n    tone:\n      hue: {{{FORMS}}}\n",
        6,
        "color.tone",
        "must be an attribute, at level 2 \\(attribute\\), but has no forms",
    ),
    "no positive": (HEAD + "  color:\n    hue: {negative: a, definition: b}\n", 5, "color.hue", "lacks `positive`"),
    "no negative": (HEAD + "  color:\n    hue: {positive: a, definition: b}\n", 5, "color.hue", "lacks `negative`"),
    "no definition": (HEAD + "  color:\n    hue: {positive: a, negative: b}\n", 5, "color.hue", "lacks `definition`"),
    "misspelt": (
        HEAD + "  color:\n    hue: {postive: a, negative: b, definition: c}\n",
        5,
        "color.hue",
        "lacks `positive`",
    ),
    "empty form": (
        HEAD + "  color:\n    hue:\n      positive:\n      negative: b\n      definition: c\n",
        6,
        "color.hue.positive",
        "must be a non-empty text",
    ),
    "blank form": (
        HEAD + "  color:\n    hue: {positive: a, negative: '  ', definition: c}\n",
        5,
        "color.hue.negative",
        "must be a non-empty text",
    ),
    "form a list": (
        HEAD + "  color:\n    hue: {positive: [a, b], negative: b, definition: c}\n",
        5,
        "color.hue.positive",
        "must be a non-empty text",
    ),
    "equal forms": (
        HEAD + "  color:\n    hue: {positive: red, negative: ' red', definition: c}\n",
        5,
        "color.hue",
        "has two equal forms: 'red'",
    ),
    "form twice": (
        HEAD + "  color:\n    hue: {positive: a, negative: b, positive: c, definition: d}\n",
        5,
        "color.hue",
        "the key 'positive' is already used",
    ),
    "unknown top key": (f"notes: x\n{HEAD}{GOOD}", 1, None, "`notes` is an unknown key"),
    "unknown leaf key": (
        HEAD + f"  color:\n    hue: {{{FORMS[:-1]}, weight: 3}}\n",
        5,
        "color.hue",
        "`weight` is an unknown key",
    ),
}


class TestInvalidFiles:
    @pytest.mark.parametrize("name", INVALID)
    def test_message(self, name):
        """Every mistake in a tree raises a ValueError with file, line and node."""
        text, line, node, reason = INVALID[name]
        where = re.escape(f"my tree.yaml, line {line}") + (f", node `{re.escape(node)}`" if node else "") + ": "
        with pytest.raises(ValueError, match=f"^{where}.*{reason}"):
            parse_criteria(text, "my tree.yaml")

    def test_loading_names_the_path(self, tmp_path):
        """The error of `load` begins with the given path."""
        (tmp_path / "tree.yaml").write_text(HEAD)
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'tree.yaml'))}, line 3"):
            Criteria.load(tmp_path / "tree.yaml")

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (HEAD + GOOD + "notes: x\n", 6),
            (
                HEAD
                + "  color:\n    hue:\n      positive: a\n      negative: b\n      definition: c\n      weight: 3\n",
                9,
            ),
        ],
        ids=["top", "leaf"],
    )
    def test_an_unknown_key_is_named_with_its_own_line(self, text, line):
        """The line in the error is that of the key, not that of its parent."""
        with pytest.raises(ValueError, match=f"^t, line {line}[,:].*is an unknown key"):
            parse_criteria(text, "t")

    @pytest.mark.parametrize("character", ["\x07", "\x00", "\x0c"])
    def test_control_characters(self, character):
        """A character that YAML does not allow raises an error with file and line."""
        with pytest.raises(ValueError, match="^my tree.yaml, line 5.*not YAML"):
            parse_criteria(HEAD + GOOD.replace("red", f"red{character}"), "my tree.yaml")


class TestLooking:
    def test_attributes(self, tree):
        """The leaves are in the order of the file, with the ids of their parents."""
        assert [(leaf.id, leaf.path, leaf.dimension) for leaf in tree.attributes] == [
            ("edges", ("light", "shadows"), "light"),
            ("depth", ("light", "shadows"), "light"),
            ("warmth", ("light", "source"), "light"),
            ("brush", ("paint", "surface"), "paint"),
        ]
        assert tree.attributes[0] == Attribute(
            "edges", ("light", "shadows"), "soft edges", "cut out edges", "How shadows end."
        )

    def test_counts_and_select(self, tree):
        """Dimensions and their attributes are in the order of the file."""
        assert list(tree.counts().items()) == [("light", 3), ("paint", 1)]
        assert tree.dimensions == ("light", "paint")
        assert tree.select("light") == tree.attributes[:3]
        assert tree.select("paint") == tree.attributes[3:]

    @pytest.mark.parametrize("name", ["shadows", "edges", "Light", None])
    def test_no_such_dimension(self, tree, name):
        """An id that is not a root, such as an inner node or a leaf, is refused with the list of roots."""
        with pytest.raises(ValueError, match=f"'still_life' have no dimension {name!r}; they have light, paint"):
            tree.select(name)

    def test_walk(self, tree):
        """The walk is depth first and yields every node once, with an attribute for leaves only."""
        edges, depth, warmth, brush = tree.attributes
        assert list(tree.walk()) == [
            (0, "light", None),
            (1, "shadows", None),
            (2, "edges", edges),
            (2, "depth", depth),
            (1, "source", None),
            (2, "warmth", warmth),
            (0, "paint", None),
            (1, "surface", None),
            (2, "brush", brush),
        ]

    def test_walk_of_the_shipped_tree(self):
        """The walk yields every id once, its leaves are the attributes, and paths are the parent nodes."""
        criteria = Criteria.load("painting")
        above, names = [], []
        for depth, name, leaf in criteria.walk():
            above[depth:] = [name]
            names.append(name)
            if leaf is not None:
                assert (*leaf.path, leaf.id) == tuple(above)
        assert len(set(names)) == len(names)
        assert [leaf for _, _, leaf in criteria.walk() if leaf] == list(criteria.attributes)
        assert sum(criteria.counts().values()) == len(criteria.attributes)
        for dimension in criteria.dimensions:
            assert len(criteria.select(dimension)) == criteria.counts()[dimension]

    def test_find(self, tree):
        """By id and by index."""
        for index, leaf in enumerate(tree.attributes):
            assert tree.find(leaf.id) is tree.find(index) is leaf

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("edge", "edges"),
            ("Warmth", "warmth"),
            ("brush ", "brush"),
            ("soft edges", "edges"),
            ("flat shadows", "depth"),
            ("smeared stroke", "brush"),
            ("Cold light", "warmth"),
        ],
    )
    def test_nearest(self, tree, name, nearest):
        """For a misspelt id or a form, the error names the nearest id, and explains that ids are expected."""
        with pytest.raises(ValueError, match=f"{name!r} is no attribute of.*'still_life'; the nearest is {nearest!r}"):
            tree.find(name)

    @pytest.mark.parametrize(
        "value", ["", "light", "柔", True, False, -1, 4, 10**30, None, 1.0, math.nan, b"edges", [], ["edges"], {}]
    )
    def test_what_is_no_attribute(self, tree, value):
        """Anything else raises a ValueError with the value: booleans, floats and negative numbers are not indices."""
        with pytest.raises(
            ValueError, match=f"^{re.escape(repr(value))} is no attribute of the criteria 'still_life'"
        ):
            tree.find(value)


class TestChoosing:
    @pytest.mark.parametrize("seed", range(20))
    def test_spread(self, seed):
        """Chosen numbers per dimension differ by at most one, unless one has no more attributes; the maximum is
        reached."""
        attributes = random_choice(seed)
        available = {}
        for leaf, _ in attributes:
            available[leaf.dimension] = available.get(leaf.dimension, 0) + 1
        for maximum in range(len(attributes) + 2):
            chosen = choose_attributes(attributes, maximum)
            assert len(chosen) == min(maximum, len(attributes))
            counts = {d: sum(leaf.dimension == d for leaf, _ in chosen) for d in available}
            for d, count in counts.items():
                assert count >= max(counts.values()) - 1 or count == available[d]

    @pytest.mark.parametrize("seed", range(20))
    def test_nested_and_in_order(self, seed):
        """A larger maximum includes the choice of a smaller one, and the given order is kept."""
        attributes = random_choice(seed)
        places = {leaf.id: place for place, (leaf, _) in enumerate(attributes)}
        previous = []
        for maximum in range(len(attributes) + 1):
            chosen = choose_attributes(attributes, maximum)
            assert [places[leaf.id] for leaf, _ in chosen] == sorted(places[leaf.id] for leaf, _ in chosen)
            assert set(chosen) >= set(previous)
            assert chosen == choose_attributes(list(attributes), maximum)
            previous = chosen
        assert previous == attributes

    def test_by_hand(self):
        """The first of each dimension is chosen, then the second of each: five of a a a b b c are all but the third
        a."""
        leaves = [attribute(name, name[0]) for name in ("a1", "a2", "a3", "b1", "b2", "c1")]
        chosen = [[leaf.id for leaf, _ in choose_attributes([(x, "positive") for x in leaves], n)] for n in range(7)]
        assert chosen == [
            [],
            ["a1"],
            ["a1", "b1"],
            ["a1", "b1", "c1"],
            ["a1", "a2", "b1", "c1"],
            ["a1", "a2", "b1", "b2", "c1"],
            ["a1", "a2", "a3", "b1", "b2", "c1"],
        ]

    def test_one_attribute_in_both_forms(self):
        """Positions are chosen, not ids: the same attribute given in both forms counts as two."""
        leaf = attribute("a1", "a")
        both = [(leaf, "positive"), (leaf, "negative")]
        assert choose_attributes(both, 1) == both[:1]
        assert choose_attributes(both, 2) == both

    def test_nothing(self):
        """No attributes give none."""
        assert choose_attributes([], 3) == []


def words(text: str) -> int:
    return len(text.replace(",", " ").split())


class TestRendering:
    criteria = parse_criteria(tiny.CRITERIA, "tiny.yaml")

    def forms(self, *names: str) -> list[tuple[Attribute, str]]:
        """Attributes by id, with a leading minus for the negative form."""
        return [
            (self.criteria.find(name.removeprefix("-")), "negative" if name[0] == "-" else "positive")
            for name in names
        ]

    def test_order_and_forms(self):
        """The prompt, then the attributes in the given order, each in its form."""
        assert render_prompt("a", self.forms("pet", "-hue", "kind")) == ("a, cat, blue, circle", 0)
        assert render_prompt("a", self.forms("-kind", "hue")) == ("a, square, red", 0)

    @pytest.mark.parametrize("separator", [" ", "; ", " | ", ""])
    def test_separator(self, separator):
        """The separator is between the parts, never at an end."""
        text, _ = render_prompt("a dog", self.forms("hue", "pet"), separator)
        assert text == f"a dog{separator}red{separator}cat"

    def test_no_prompt_or_no_attributes(self):
        """An empty prompt gives the attributes alone, no attributes give the prompt, and both give an empty text."""
        assert render_prompt("", self.forms("hue", "pet")) == ("red, cat", 0)
        assert render_prompt("a dog", []) == ("a dog", 0)
        assert render_prompt("", []) == ("", 0)

    @pytest.mark.parametrize(
        ("maximum", "expected"),
        [
            (0, ("a", 3)),
            (1, ("a, red", 2)),
            (2, ("a, red, square", 1)),
            (3, ("a, red, square, cat", 0)),
            (9, ("a, red, square, cat", 0)),
            (None, ("a, red, square, cat", 0)),
        ],
    )
    def test_maximum(self, maximum, expected):
        """At most `maximum` attributes are included, one of each dimension first, and the others are counted."""
        assert render_prompt("a", self.forms("hue", "-kind", "pet"), maximum=maximum) == expected

    def test_length_and_maximum_together(self):
        """Attributes that do not fit and those above the maximum are counted together."""
        attributes = self.forms("hue", "kind", "pet")
        assert render_prompt("a", attributes, maximum=2, fits=lambda text: words(text) <= 2) == ("a, red", 2)
        assert render_prompt("a", attributes, maximum=1, fits=lambda text: words(text) <= 3) == ("a, red", 2)

    @pytest.mark.parametrize("seed", range(30))
    def test_as_many_as_fit(self, seed):
        """The result fits if possible, one more attribute would not fit, and omitted ones are counted."""
        rng = random.Random(seed)
        attributes = random_choice(seed)
        prompt = " ".join(["word"] * rng.randrange(5))
        maximum = rng.choice([None, rng.randrange(1, 12)])
        most = len(attributes) if maximum is None else min(maximum, len(attributes))
        for limit in range(2 * len(attributes) + 7):

            def fits(text, limit=limit):
                return words(text) <= limit

            text, left_out = render_prompt(prompt, attributes, ", ", maximum, fits)
            written = len(attributes) - left_out
            assert 0 <= written <= most
            assert text == render_prompt(prompt, attributes, ", ", written)[0]
            assert words(text) == words(prompt) + 2 * written
            assert fits(text) or written == 0
            if written < most:
                assert not fits(render_prompt(prompt, attributes, ", ", written + 1)[0])

    @pytest.mark.parametrize("prompt", ["a red circle and a blue square", ""])
    def test_a_prompt_that_is_too_long_alone(self, prompt):
        """A prompt that is too long is not changed, and all attributes are left out."""
        assert render_prompt(prompt, self.forms("hue", "pet"), fits=lambda text: False) == (prompt, 2)

    def test_nothing_to_write_asks_nothing_wrong(self):
        """A prompt that is too long and has no attributes is returned unchanged."""
        assert render_prompt("a dog", [], fits=lambda text: False) == ("a dog", 0)
