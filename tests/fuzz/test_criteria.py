# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""YAML of strangers: trees of criteria and the files of commands."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import CONTROL, NASTY_TEXTS, few, json_values, lawful, many, texts
from trl_diffusion.cli.config_file import read_config
from trl_diffusion.criteria import Criteria, parse_criteria, render_prompt
from trl_diffusion.scripts.check_dataset import make_parser
from trl_diffusion.yaml_files import LARGEST


TREE = """name: still_life
levels: [dimension, attribute]
tree:
  light:
    shadow_edges:
      positive: soft shadow edges
      negative: cut out shadows
      definition: Whether cast shadows lose their edge.
    glow: {positive: a glow, negative: dull, definition: Whether it glows.}
"""
CONFIG = "output_dir: here\nresolution: 64\ncolumns: {prompt: caption}\nenv: {A: b}\n"
PIECES = (
    *(
        "&a ",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system ''",
        "!x ",
        "!!binary aGk=",
    ),
    *(
        "!!int x",
        "!!bool x",
        "!!timestamp x",
        "!!float x",
        "!!set {a}",
        "!!omap [a: b]",
        "? [a]",
        "? {a: b}",
        "? ",
        ": ",
    ),
    *("2001-99-99", "0x_", "1:99:99", ".inf", ".nan", "~", "null", "yes", "012", "1e999", "=", "<<"),
    *(
        "[",
        "]",
        "{",
        "}",
        "- ",
        "|\n ",
        ">\n ",
        "'",
        '"',
        '"\\e[2J"',
        '"\\ud800"',
        '"\\u202e"',
        "#",
        "%YAML 9.9\n---\n",
        "---\n",
        "...\n",
    ),
    *(
        "\n",
        "  ",
        "\t",
        ",",
        "name: x\n",
        "levels: [a]\n",
        "tree: *a\n",
        "light: ",
        "positive: x\n",
        "\u2028",
        "\x85",
        "\x00",
        "\x1b",
    ),
)


@st.composite
def broken(draw, text: str) -> str:
    """YAML with a few pieces put in or taken out."""
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, len(text)))
        end = min(len(text), place + draw(st.sampled_from([0, 0, 0, 1, 5, 20])))
        text = text[:place] + draw(st.one_of(st.sampled_from(PIECES), texts)) + text[end:]
    return text


anything_as_yaml = json_values.map(lambda value: yaml.safe_dump(value))  # its texts are escaped


def any_tree(text: str) -> None:
    tree = lawful(lambda: parse_criteria(text, "tree.yaml"), "tree.yaml", seconds=30)
    if isinstance(tree, Criteria):
        written = [tree.name, *tree.levels, *render_prompt("x", [(each, "negative") for each in tree.attributes])[:1]]
        assert not any(CONTROL.search(each) for each in written)
        assert [each for _, each, _ in tree.walk()]


def any_config(text: str, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    lawful(lambda: read_config(str(tmp_path / "config.yaml")), "config.yaml", seconds=30)


@few(150)
@given(st.one_of(broken(TREE), broken(TREE), anything_as_yaml, texts))
@example("name: a\nlevels: [a]\ntree: {x: {positive: '\x85', negative: b, definition: c}}")
@example('name: "\\e[2J"\nlevels: [a]\ntree: {x: {positive: a, negative: b, definition: c}}')
@example('name: a\nlevels: [a]\ntree: {x: {positive: "\\ud800", negative: b, definition: c}}')
@example("name: a\nlevels: [a]\n'\\e[2J': b\ntree: {}")
@example("name: !!python/object/apply:os.system ['touch /tmp/x']\nlevels: [a]\ntree: {}")
@example("a" * 10**6)
def test_any_tree(text):
    """A tree is read, or the file is named; what is read can be printed."""
    any_tree(text)


@pytest.mark.slow
@many(2000)
@given(st.one_of(broken(TREE), broken(TREE), anything_as_yaml))
def test_many_trees(text):
    """A tree is read, or the file is named; what is read can be printed."""
    any_tree(text)


@few(100)
@given(st.one_of(broken(CONFIG), anything_as_yaml, texts))
@example("resolution: 2001-99-99")  # each of these was another error, without the file
@example("resolution: !!int x")
@example("resolution: !!bool x")
@example("resolution: !!timestamp x")
@example("resolution: 0x_")
@example("1: 2")
def test_any_config(tmp_path_factory, text):
    """The file of a command is read, or is named."""
    any_config(text, tmp_path_factory.mktemp("config"))


@pytest.mark.slow
@many(2000)
@given(st.one_of(broken(CONFIG), anything_as_yaml))
def test_many_configs(tmp_path_factory, text):
    """The file of a command is read, or is named."""
    any_config(text, tmp_path_factory.getbasetemp())


VALUES = [
    *({"columns": value} for value in ([1], {"a": 1}, "x", 5, None, "\ud800", "\x1b[2J")),
    *(
        {"env": value}
        for value in ({"a": None}, {"\0": "x"}, {"": "x"}, {"a=b": "c"}, [1], {"x": "\ud800"}, {"x": "a\0b"})
    ),
    *(
        {"resolution": value}
        for value in ("x", [1], 2**70, 1e308, float("inf"), float("nan"), {"a": 1}, True, "\x1b", -1.5)
    ),
    *({"dataset_streaming": value} for value in ("x", 5, [1])),
    *({"\x1b[2J": 1}, {"\ud800": 1}, {1: 2}, {None: 3}, {"dataset_name": "\ud800"}, {"dataset_name": 5}, {"": 1}),
]


@pytest.mark.parametrize("config", VALUES, ids=range(len(VALUES)))
def test_any_values_of_flags(tmp_path, monkeypatch, config):
    """Every value of a flag in a file is taken, or the file is named."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(config))
    lawful(lambda: make_parser().parse_args_and_config(["--config", str(tmp_path / "values.yaml")]), "values.yaml")


def laughs(depth: int) -> str:
    lines = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "\n".join(["l0: &l0 [lol, lol]", *lines])


BOMBS = {
    "billion laughs": (laughs(40), "more than 100,000 values"),
    "laughs by merges": (
        "a0: &a0 {k: v}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)),
        "more than",
    ),
    "a circle": ("&a [*a]", "holds itself"),
    "a circle below": ("name: x\nlevels: [a, b]\ntree: &a {x: {y: *a}}", "holds itself"),
    "deep": ("[" * 3000, "nested too deeply"),
    "deep mappings": ("{a: " * 2000, "nested too deeply"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(700)), "nested too deeply"),
    "deep and closed": ("[" * 700 + "]" * 700, "nested too deeply"),
    "large": ("# " + "x" * 100 * 2**20, "at most 1,048,576 are read"),
    "dashes": ("- " * 10**5, "nested too deeply"),
    "python": ("name: !!python/object/new:os.system [ls]", "tag"),
    "a module": ("name: !!python/module:os ''", "tag"),
    "another tag": ("name: !ruby/object:Gem x", "tag"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    """What would fill the memory, end in a circle or make objects is refused within seconds, in both kinds of files."""
    text, reason = BOMBS[name]
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    for read in (lambda: Criteria.load(path), lambda: read_config(str(path))):
        message = lawful(read, "bomb.yaml", seconds=30)
        assert reason in message or (name.startswith("a circle") and "--config" not in message)


def test_the_longest_files_take_seconds(tmp_path):
    """Of the largest size that is read, every kind of text takes no longer than a few seconds."""
    for text in ("'", '"', "a", "a: b\n", "- a\n", "? a\n", "&a ", "*a ", "[a, ", "!a ", "|\n", "\n", "%", "# \n"):
        text = (text * LARGEST)[: LARGEST // 32]  # the time is linear
        lawful(lambda text=text: parse_criteria(text, "tree.yaml"), "tree.yaml", seconds=10)


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "/etc", "/", "a" * 5000, "a\0b", "\ud800", "../../etc/passwd", "painting\n", "", *NASTY_TEXTS],
)
def test_names_that_are_no_tree(tmp_path, monkeypatch, name):
    """Names of devices, folders, and what no name can be."""
    monkeypatch.chdir(tmp_path)
    assert isinstance(lawful(lambda: Criteria.load(name)), str)


def test_only_safe_loaders():
    """Nothing in the package loads YAML with another loader than a safe one."""
    root = Path(__file__).parents[2]
    for path in [
        *root.glob("trl_diffusion/**/*.py"),
        *root.glob("datasets_builders/**/*.py"),
        *root.glob("examples/**/*.py"),
    ]:
        text = path.read_text(encoding="utf-8")
        for wrong in ("yaml.load(", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "UnsafeLoader", "FullLoader"):
            assert wrong not in text, path
