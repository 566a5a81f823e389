# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The criteria tree of complex preference optimization (CPO, arXiv 2601.04300): loading, validation, search, prompts.

A tree is a YAML file. Its keys are ids, which are unique in the whole tree. A node with a `positive` and a `negative`
form is a leaf, called an attribute. Every other node is a group:

    name: still_life
    levels: [dimension, attribute]
    tree:
      light:
        shadow_edges:
          positive: soft shadow edges
          negative: cut out shadows
          definition: Whether cast shadows lose their edge with distance from the object.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path

import yaml

from .messages import CONTROL, cut, shown
from .yaml_files import LARGEST, compose


FORMS = ("positive", "negative")
LEAF_KEYS = (*FORMS, "definition")
LONGEST_NAME = 200  # characters of a text whose nearest attribute is looked for
ID = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Attribute:
    """
    A leaf of the tree: a quality of an image, with a positive and a negative form.

    Args:
        id (`str`):
            Stable id, unique in the tree.
        path (`tuple[str, ...]`):
            Ids of the parent nodes, from the dimension downwards.
        positive (`str`):
            Phrase for prompts of images with the quality.
        negative (`str`):
            Phrase for prompts of images with the opposite.
        definition (`str`):
            Instruction for annotators.
    """

    id: str
    path: tuple[str, ...]
    positive: str
    negative: str
    definition: str

    @property
    def dimension(self) -> str:
        """Id of the root node above the attribute."""
        return (*self.path, self.id)[0]


@dataclass(frozen=True)
class Criteria:
    """
    A tree of attributes.

    Args:
        name (`str`):
            Name of the tree.
        levels (`tuple[str, ...]`):
            Names of the levels, from the dimensions down to the attributes.
        attributes (`tuple[Attribute, ...]`):
            The leaves, in the order of the file.
    """

    name: str
    levels: tuple[str, ...]
    attributes: tuple[Attribute, ...]

    def __post_init__(self):
        object.__setattr__(self, "_by_id", {attribute.id: attribute for attribute in self.attributes})

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Criteria":
        """
        Reads a tree.

        Args:
            name_or_path (`str` or `Path`):
                A YAML file, or the name of a tree of this package: `"painting"`.

        Returns:
            [`Criteria`]

        Raises:
            `ValueError`: If there is no such file or tree, or if the tree is not valid, with file, line and node.
        """
        path = Path(name_or_path)
        if os.path.isfile(path):
            try:
                with path.open(encoding="utf-8") as file:
                    text = file.read(LARGEST + 1)
            except UnicodeDecodeError as error:
                raise ValueError(f"{name_or_path} is not UTF-8: {error}. Save the file as UTF-8.") from error
            except OSError as error:
                raise ValueError(f"{name_or_path} cannot be read: {error.strerror}.") from error
            return parse_criteria(text, cut(str(name_or_path)))
        shipped = resources.files("trl_diffusion").joinpath("criteria_trees")
        names = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir() if file.name.endswith(".yaml"))
        if str(name_or_path) not in names:
            raise ValueError(
                f"There is no file {shown(str(name_or_path))}, and no shipped criteria tree of that name; shipped: "
                f"{', '.join(names)}."
            )
        name = f"{name_or_path}.yaml"
        return parse_criteria(shipped.joinpath(name).read_text(encoding="utf-8"), name)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Ids of the roots, in the order of the file."""
        return tuple(self.counts())

    def counts(self) -> dict[str, int]:
        """
        Counts the attributes.

        Returns:
            `dict[str, int]`: number of attributes of each dimension, by its id.
        """
        counts = {}
        for attribute in self.attributes:
            counts[attribute.dimension] = counts.get(attribute.dimension, 0) + 1
        return counts

    def select(self, dimension: str) -> tuple[Attribute, ...]:
        """
        Selects the attributes of one dimension.

        Args:
            dimension (`str`):
                Id of a root node.

        Returns:
            `tuple[Attribute, ...]`: the attributes, in the order of the file.

        Raises:
            `ValueError`: If there is no such dimension.
        """
        if dimension not in self.dimensions:
            raise ValueError(
                f"The criteria {self.name!r} have no dimension {shown(dimension)}; they have {', '.join(self.dimensions)}."
            )
        return tuple(attribute for attribute in self.attributes if attribute.dimension == dimension)

    def walk(self) -> Iterator[tuple[int, str, Attribute | None]]:
        """
        Walks the tree depth first.

        Yields:
            `tuple[int, str, Attribute | None]`: depth (0 for a dimension), id, and the attribute if the node is a
            leaf.
        """
        previous: tuple[str, ...] = ()
        for attribute in self.attributes:
            for depth, node in enumerate(attribute.path):
                if previous[: depth + 1] != attribute.path[: depth + 1]:
                    yield depth, node, None
            yield len(attribute.path), attribute.id, attribute
            previous = attribute.path

    def find(self, attribute: str | int) -> Attribute:
        """
        Finds an attribute.

        Args:
            attribute (`str` or `int`):
                Id of the attribute, or its index in `attributes`, as in a [`~datasets.ClassLabel`].

        Returns:
            [`Attribute`]

        Raises:
            `ValueError`: If the tree has no such attribute, with the id of the nearest one.
        """
        if isinstance(attribute, str) and attribute in self._by_id:
            return self._by_id[attribute]
        if isinstance(attribute, int) and not isinstance(attribute, bool) and 0 <= attribute < len(self.attributes):
            return self.attributes[attribute]
        if not isinstance(attribute, str):
            raise ValueError(
                f"{shown(attribute)} is no attribute of the criteria {self.name!r}: expected an id, or an index from 0 to {len(self.attributes) - 1} (-1 and "
                "`None` are missing labels)"
            )
        names = {name: leaf.id for leaf in self.attributes for name in (leaf.positive, leaf.negative, leaf.id)}
        nearest = get_close_matches(attribute[:LONGEST_NAME], names, n=1, cutoff=0)[0]
        form = f" (a column holds its id, not its form {nearest!r})" if nearest != names[nearest] else ""
        raise ValueError(
            f"{shown(attribute)} is no attribute of the criteria {self.name!r}; the nearest is {names[nearest]!r}{form}"
        )


# ----- rendering -----


def choose_attributes(attributes: Sequence[tuple[Attribute, str]], maximum: int) -> list[tuple[Attribute, str]]:
    """
    Chooses attributes evenly over the dimensions: the first of each dimension, then the second of each, and so on. A
    larger maximum adds attributes to the choice of a smaller one.

    Args:
        attributes (`Sequence[tuple[Attribute, str]]`):
            Attributes with their form, `"positive"` or `"negative"`.
        maximum (`int`):
            Maximum number of attributes.

    Returns:
        `list[tuple[Attribute, str]]`: the chosen attributes, in the given order.
    """
    by_dimension = {}
    for index, (attribute, _) in enumerate(attributes):
        by_dimension.setdefault(attribute.dimension, []).append(index)
    turns = chain.from_iterable(zip_longest(*by_dimension.values()))
    chosen = [index for index in turns if index is not None][:maximum]
    return [attributes[index] for index in sorted(chosen)]


def render_prompt(
    prompt: str,
    attributes: Sequence[tuple[Attribute, str]],
    separator: str = ", ",
    maximum: int | None = None,
    fits: Callable[[str], bool] = lambda prompt: True,
) -> tuple[str, int]:
    """
    Joins a prompt with attributes, such as "a harbor, soft shadow edges, lopsided masses".

    Args:
        prompt (`str`):
            The prompt, which may be empty.
        attributes (`Sequence[tuple[Attribute, str]]`):
            Attributes with their form, `"positive"` or `"negative"`, in the order of the result.
        separator (`str`, *optional*, defaults to `", "`):
            Separator.
        maximum (`int`, *optional*):
            Maximum number of attributes.
        fits (`Callable[[str], bool]`, *optional*):
            Whether the text encoders can encode a prompt without truncation. If not, [`criteria.choose_attributes`]
            chooses fewer attributes.

    Returns:
        `tuple[str, int]`: the prompt, and the number of attributes that are left out.
    """

    def render(number: int) -> str:
        forms = [getattr(attribute, form) for attribute, form in choose_attributes(attributes, number)]
        return separator.join([prompt, *forms] if prompt else forms)

    number = len(attributes) if maximum is None else min(maximum, len(attributes))
    if not fits(render(number)):
        number = max(0, bisect_left(range(number), True, key=lambda count: not fits(render(count))) - 1)
    return render(number), len(attributes) - number


# ----- parsing -----


def parse_criteria(text: str, source: str) -> Criteria:
    """
    Parses a tree from YAML.

    Args:
        text (`str`):
            The YAML.
        source (`str`):
            Name of the file, for messages.

    Returns:
        [`Criteria`]

    Raises:
        `ValueError`: If the tree is not valid, with file, line and node.
    """
    try:
        root = compose(text, circles=True)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{source}{line}: this is not YAML: {cut(error.problem)}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"{source}, line {line}: this is not YAML: it has the character {chr(error.character)!r}."
        ) from error
    return _Parser(source).parse(root)


class _Parser:
    """Builds a tree from YAML nodes, which know their lines."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[str, int] = {}  # line of each id so far

    def parse(self, root: yaml.Node | None) -> Criteria:
        pairs = self.entries(root, "", "the file")
        entries, keys = {key.value: value for key, value in pairs}, {key.value: key for key, _ in pairs}
        if missing := [key for key in ("name", "levels", "tree") if key not in entries]:
            self.fail(root, "", f"`{missing[0]}` is missing; a tree has `name`, `levels` and `tree`")
        if unknown := set(entries) - {"name", "levels", "tree"}:
            self.fail(
                keys[min(unknown)],
                "",
                f"`{cut(min(unknown), 100)}` is an unknown key; a tree has `name`, `levels` and `tree`",
            )
        levels = entries["levels"]
        if not isinstance(levels, yaml.SequenceNode) or not levels.value:
            self.fail(levels, "levels", "must be a list of the names of the levels, from dimensions to attributes")
        self.levels = tuple(self.string(level, "levels") for level in levels.value)
        name = self.string(entries["name"], "name")
        return Criteria(name, self.levels, tuple(self.walk(entries["tree"], ())))

    def walk(self, node: yaml.Node, path: tuple[str, ...]) -> Iterator[Attribute]:
        where = ".".join(path) or "tree"
        entries = self.entries(node, where, "every node")
        if not entries:
            self.fail(node, where, "is empty: it needs nodes below it, or the forms of an attribute")
        for key, value in entries:
            if key.value in LEAF_KEYS and isinstance(value, yaml.MappingNode):
                self.fail(
                    key,
                    where,
                    f"{shown(key.value)} is not a valid id: it is a key of attributes ({', '.join(LEAF_KEYS)})",
                )
        if any(key.value in LEAF_KEYS for key, _ in entries):
            yield self.leaf(node, path, entries)
            return
        if len(path) == len(self.levels):
            self.fail(node, where, f"must be an attribute, at level {len(path)} ({self.levels[-1]}), but has no forms")
        for key, value in entries:
            if not ID.fullmatch(key.value):
                self.fail(
                    key, where, f"{shown(key.value)} is not a valid id: use lower case letters, digits and underscores"
                )
            if key.value in self.lines:
                self.fail(key, where, f"the id {shown(key.value)} is already used in line {self.lines[key.value]}")
            self.lines[key.value] = key.start_mark.line + 1
            yield from self.walk(value, (*path, key.value))

    def leaf(self, node: yaml.Node, path: tuple[str, ...], pairs: list[tuple[yaml.Node, yaml.Node]]) -> Attribute:
        entries, keys = {key.value: value for key, value in pairs}, {key.value: key for key, _ in pairs}
        where = ".".join(path) or "tree"
        if len(path) != len(self.levels):
            self.fail(
                node,
                where,
                f"has the forms of an attribute at level {len(path)}, but attributes are at level {len(self.levels)} "
                f"({self.levels[-1]})",
            )
        for key in LEAF_KEYS:
            if key not in entries:
                self.fail(node, where, f"lacks `{key}`")
        if unknown := set(entries) - set(LEAF_KEYS):
            self.fail(
                keys[min(unknown)],
                where,
                f"`{cut(min(unknown), 100)}` is an unknown key; an attribute has {', '.join(LEAF_KEYS)}",
            )
        positive, negative, definition = (self.string(entries[key], f"{where}.{key}") for key in LEAF_KEYS)
        if positive.lower() == negative.lower():
            self.fail(node, where, f"has two equal forms: {shown(positive)}")
        return Attribute(path[-1], path[:-1], positive, negative, definition)

    def entries(self, node: yaml.Node | None, where: str, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            empty = node is None or node.value == ""
            self.fail(node, where, "is empty" if empty else f"{what} must be a mapping")
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, where, "has a key that is not a text")
        lines = {}
        for key, _ in node.value:
            if key.value in lines:
                self.fail(key, where, f"the key {shown(key.value)} is already used in line {lines[key.value]}")
            lines[key.value] = key.start_mark.line + 1
        return node.value

    def string(self, node: yaml.Node, where: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null") or not node.value.strip():
            self.fail(node, where, "must be a non-empty text")
        if CONTROL.search(node.value):
            self.fail(node, where, f"has characters that are not printed: {shown(node.value)}")
        return node.value.strip()

    def fail(self, node: yaml.Node | None, where: str, what: str):
        line = node.start_mark.line + 1 if node is not None else 1
        raise ValueError(f"{self.source}, line {line}{f', node `{where}`' if where else ''}: {what}.")
