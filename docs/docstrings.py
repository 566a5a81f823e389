# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Reads docstrings in TRL's dialect, and finds the objects that pages document."""

import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Any


ENTRIES = ("Args", "Parameters", "Attributes")
SECTION = re.compile(r"^(Args|Parameters|Attributes|Returns|Yields|Raises|Example):$")
# A line of a page that documents an object, and the lines below it that name its members
AUTODOC = re.compile(r"^\[\[autodoc\]\] (\S+)\n?((?: +- \w+(?:\n|\Z))*)", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """
    One entry of `Args`, `Parameters` or `Attributes`.

    Attributes:
        kinds (`dict[str, str]`):
            What stands in parentheses behind each name: its type, its shape and its default. Empty for the title of a group.
        head (`str`):
            The line as it is written, without the colon at its end.
        text (`str`):
            What it means.
    """

    kinds: dict[str, str]
    head: str
    text: str


def find(name: str) -> Any:
    """
    Finds an object by the name that a page gives it.

    Args:
        name (`str`):
            Name within the package, such as `"InstanceDPOTrainer"`, `"losses.diffusion_dpo_loss"` or `"process.Process.target"`.

    Returns:
        `Any`: the object.

    Raises:
        `ValueError`: If there is no such object.
    """
    words = ["trl_diffusion", *name.split(".")]
    for length in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for word in words[length:]:
                found = getattr(found, word)
        except AttributeError:
            break
        return found
    raise ValueError(f"`{name}` is not in trl_diffusion; check its spelling.")


def autodocs(text: str) -> list[tuple[str, list[str]]]:
    """
    The objects that a page documents.

    Args:
        text (`str`):
            The page.

    Returns:
        `list[tuple[str, list[str]]]`: the name of each object, and the members that are listed below it.
    """
    return [(found[1], re.findall(r"- (\w+)", found[2])) for found in AUTODOC.finditer(text)]


def sections(docstring: str) -> list[tuple[str, str]]:
    """
    Cuts a docstring into its sections.

    Args:
        docstring (`str`):
            The docstring, without common indentation.

    Returns:
        `list[tuple[str, str]]`: title and text of each section in order. What belongs to no section has the title `""`.
    """
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in docstring.splitlines():
        title, lines = found[-1]
        if match := SECTION.match(line):
            found.append((match[1], []))
        elif title not in ("", "Example") and line and not line.startswith(" "):
            found.append(("", [line]))
        else:
            lines.append(line)
    return [(title, inspect.cleandoc("\n".join(["", *lines])).strip()) for title, lines in found if any(lines)]


def kinds_of(head: str) -> dict[str, str]:
    """
    Reads the first line of an entry.

    Args:
        head (`str`):
            The line, such as "``height (`int`), width (`int`)``".

    Returns:
        `dict[str, str]`: from each name to what stands in the parentheses behind it.
    """
    kinds, name, kind, depth = {}, "", "", 0
    for character in f"{head},":
        depth -= character == ")"
        if depth:
            kind += character
        elif character == ",":
            kinds[name.strip()], name, kind = kind.strip(), "", ""
        elif character not in "()":
            name += character
        depth += character == "("
    return kinds


def entries(text: str) -> list[Entry]:
    """
    Cuts the text of `Args`, `Parameters` or `Attributes` into entries.

    Args:
        text (`str`):
            The text of the section.

    Returns:
        `list[Entry]`: the entries, and the titles of groups (`> Parameters that control the model`) among them.
    """
    found: list[Entry] = []
    for block in re.split(r"\n(?=\S)", text):
        if block.startswith("> "):
            found.append(Entry({}, block.removeprefix("> ").strip(), ""))
            continue
        # A head that goes on in the next line ends with the first line that ends in a colon.
        head, _, body = re.sub(r",\n\s+", ", ", block).partition(":\n")
        head = head.removesuffix(":")
        found.append(Entry(kinds_of(head), head, inspect.cleandoc(f"\n{body}").strip()))
    return found


def described(documented: Any) -> dict[str, tuple[str, str]]:
    """
    The arguments and attributes that the docstring of an object describes.

    Args:
        documented (`Any`):
            A class or a function.

    Returns:
        `dict[str, tuple[str, str]]`: from each name to what stands in the parentheses behind it, and its text.
    """
    return {
        name.lstrip("*"): (kind, entry.text)
        for title, text in sections(inspect.getdoc(documented) or "")
        if title in ENTRIES
        for entry in entries(text)
        for name, kind in entry.kinds.items()
    }
