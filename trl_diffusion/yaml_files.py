# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""YAML of strangers: plain values alone, and never more of them than the file is long."""

from typing import Any

import yaml


LARGEST = 2**20  # characters
MOST_NODES = 100_000  # with what aliases repeat
PLAIN = ("null", "bool", "int", "float", "str", "timestamp")


def compose(text: str, circles: bool = False) -> yaml.Node | None:
    """
    Parses YAML without making values of it.

    Args:
        text (`str`):
            The YAML.
        circles (`bool`, *optional*, defaults to `False`):
            Whether the caller finds nodes within themselves, and says more of them.

    Returns:
        `yaml.Node` or `None`: the root; `None` of an empty file.

    Raises:
        `yaml.MarkedYAMLError` or `yaml.reader.ReaderError`: If it is no YAML, too large, nested too deeply or within itself, or has a
            tag that asks for anything but plain values.
    """
    if len(text) > LARGEST:
        raise yaml.MarkedYAMLError(problem=f"it has {len(text):,} characters; at most {LARGEST:,} are read")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            count_nodes(root, {}, circles)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from error
    return root


def count_nodes(node: yaml.Node, known: dict[int, int | None], circles: bool) -> int:
    """The number of nodes in a node and below, each as often as aliases repeat it. `known` are the numbers of earlier nodes."""
    if id(node) in known:
        if known[id(node)] is None and circles:
            return 0
        if known[id(node)] is None:
            raise yaml.MarkedYAMLError(problem="it holds itself, by an alias", problem_mark=node.start_mark)
        return known[id(node)]
    check_tag(node)
    known[id(node)], below = None, []
    if isinstance(node, yaml.SequenceNode):
        below = node.value
    elif isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    number = known[id(node)] = 1 + sum(count_nodes(part, known, circles) for part in below)
    if number > MOST_NODES:
        raise yaml.MarkedYAMLError(problem=f"it has more than {MOST_NODES:,} values", problem_mark=node.start_mark)
    return number


def check_tag(node: yaml.Node) -> None:
    """Refuses a node with another tag than that of a plain value, such as `!!python/object`."""
    kinds = {yaml.SequenceNode: ("seq",), yaml.MappingNode: ("map",)}.get(type(node), (*PLAIN, "merge"))
    if node.tag.removeprefix("tag:yaml.org,2002:") not in kinds:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is not read", problem_mark=node.start_mark)


def construct(root: yaml.Node | None, loader: type[yaml.SafeLoader]) -> Any:
    """
    Makes values of nodes.

    Args:
        root (`yaml.Node` or `None`):
            What [`yaml_files.compose`] returned.
        loader (`type[yaml.SafeLoader]`):
            What makes them.

    Returns:
        The values; `None` of an empty file.

    Raises:
        `yaml.YAMLError`: If a value is none of its kind, such as a date in a thirteenth month.
    """
    try:
        return None if root is None else loader("").construct_document(root)
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # so PyYAML says it, without the line
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
