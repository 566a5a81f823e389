# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Text of others, such as names and prompts, made safe for the place in a card where it stands."""

import html
import json
import re


def one_line(text: object) -> str:
    """A text on one line, as Markdown that shows it as it is: no syntax of Markdown, no HTML, no mention, no link."""
    text = " ".join(str(text).split())
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$:@-])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped)


def code_span(text: object) -> str:
    """A text as inline code, in a table too."""
    text = " ".join(str(text).split()).replace("|", "\\|") or " "
    fence = "`" * (max([0, *map(len, re.findall("`+", text))]) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(text: str, language: str = "text") -> str:
    """A block of code, with a fence of more backticks than the text holds."""
    fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def python_string(text: str) -> str:
    """A text as a string of Python, with double quotes."""
    return json.dumps(text, ensure_ascii=False)
