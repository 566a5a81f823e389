# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Text of others, such as names and prompts, made safe for the place in a card where it stands."""

import json
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


HUB = "https://huggingface.co"
# Written as character references, which no Markdown reads as syntax: the backslash begins mathematics on the Hub, the dollar on GitHub
REFERENCES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "$": "&#36;", "@": "&#64;"})
# A line that begins so would be a list, a rule, the line under a heading or under the head of a table
BEGINNING = re.compile(r"^([+-](?=[\s-]|$)|:(?=-)|=|\d+(?=[.)](\s|$)))")


def visible(text: object) -> str:
    """A text without what would turn round or hide the text beside it. Its lines stay."""
    characters = (
        " " if each not in "\n\t" and (unicodedata.category(each) == "Cc" or each in "\u2028\u2029") else each
        for each in str(text)
        if unicodedata.bidirectional(each) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        and each not in "\u200b\u200e\u200f\u061c\ufeff"
    )
    return "".join(characters).encode("utf-8", "replace").decode()


def plain(text: object) -> str:
    """A text on one line, as [`cards.text.visible`] leaves it."""
    return " ".join(visible(text).split())


def shortened(text: object, length: int = 200) -> str:
    """A text on one line, cut to a number of characters."""
    text = plain(text)
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def one_line(text: object) -> str:
    """
    A text on one line, as Markdown that shows it as it is: no syntax of Markdown, no HTML, no mention, no link. In prose, in a table,
    as a heading and as the text of a link. Ordinary names stay readable.
    """
    text = plain(text).translate(REFERENCES)
    text = re.sub(r"([`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is no emphasis
    text = re.sub(r"(?<!\S)#", r"\\#", text)  # a heading, or the end of one
    text = re.sub(
        r"(?i)\b(https?|ftp|mailto|xmpp):|:(?=[a-z+-][\w+-]*:)", lambda found: f"{found[1] or ''}&#58;", text
    )
    text = re.sub(r"(?i)\b(www)\.", r"\1&#46;", text)
    return BEGINNING.sub(lambda found: f"{found[1][:-1]}&#{ord(found[1][-1])};", text)


def code_span(text: object) -> str:
    """A text as inline code, in a table too; one with a bar, which would end a cell of a table, as plain text."""
    text = plain(text)
    if "|" in text or not text:
        return one_line(text)
    fence = "`" * (max([0, *map(len, re.findall("`+", text))]) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def with_code(text: object) -> str:
    """A text of which what stands between two backticks is inline code."""
    parts = plain(text).split("`")
    if len(parts) % 2 == 0:
        return one_line(text)
    # The spaces beside the code are the text's own
    shown = (
        f"`{part}`" if index % 2 and part and "|" not in part else _spaced(part) for index, part in enumerate(parts)
    )
    return "".join(shown)


def _spaced(text: str) -> str:
    inner = one_line(text)
    return f"{' ' * text.startswith(' ')}{inner}{' ' * (text.endswith(' ') and bool(inner))}"


def fenced(text: str, language: str = "text") -> str:
    """A block of code, with a fence of more backticks than the text holds."""
    text = visible(text)
    fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def python_string(text: str) -> str:
    """A text as a string of Python, with double quotes, on one line, with escapes for what cannot be seen or would end a block of code."""
    escaped = (
        each if each.isprintable() else f"\\u{ord(each):04x}" if ord(each) < 0x10000 else f"\\U{ord(each):08x}"
        for each in json.dumps(text, ensure_ascii=False)
    )
    return "".join(escaped).replace("```", r"\x60\x60\x60")


def yaml_text(content: dict[str, Any]) -> str:
    """A dictionary as YAML, in its order; characters that cannot be seen are escaped."""
    settings = {"sort_keys": False, "width": 2**20}
    text = yaml.safe_dump(content, allow_unicode=True, **settings)
    if not text.replace("\n", "").isprintable():
        text = yaml.safe_dump(content, allow_unicode=False, **settings)
    return text


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be that of a repository on the Hub."""
    if not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_link(name: str, repo_type: str = "model") -> str:
    """A link to a repository by its name; the name alone where it can be none."""
    if not is_hub_id(name):
        return one_line(name)
    return f"[{one_line(name)}]({HUB}/{'datasets/' if repo_type == 'dataset' else ''}{name})"


def address(url: str) -> str | None:
    """An address of the web as the target of a link; `None` if it is none."""
    url = plain(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return None
    return quote(url, safe=":/?#@!$&'*+,;=%~")


def quoted(path: str) -> str:
    """A path as the target of a link."""
    return quote(path, errors="replace")


def picture(path: str | None, description: str) -> str | None:
    """A picture beside the card, by its path relative to it; `None` without one, or for a path that leads elsewhere."""
    return f"![{one_line(description)}]({quoted(path)})" if is_beside(path) else None


def is_beside(path: str | None) -> bool:
    """Whether a path is one to a file beside the card or below it."""
    if not path or "\\" in path or urlsplit(path).scheme:
        return False
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts
