# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Notebooks with the outputs that they keep, as Markdown for MyST."""

import base64
import json
from collections.abc import Callable
from pathlib import Path


def notebook_markdown(path: Path, pictures: Path, change: Callable[[str], str]) -> str:
    """
    Turns a notebook into a page.

    Args:
        path (`Path`):
            The notebook, of version 4 of its format.
        pictures (`Path`):
            Folder beside the page, to which the pictures of its outputs are written.
        change (`Callable`):
            What a text of it goes through, for its links.

    Returns:
        `str`: its cells, code with its outputs below.
    """
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(change(source))
        elif cell["cell_type"] == "code" and source.strip():
            # A line such as `!pip install` is no Python; the rest of the cell is coloured all the same.
            parts.append(fenced("{code-block} python\n:force:\n", source))
            parts += [
                output_markdown(output, pictures, f"{len(parts)}-{i}") for i, output in enumerate(cell["outputs"])
            ]
    return "\n\n".join(parts) + "\n"


def output_markdown(output: dict, pictures: Path, name: str) -> str:
    """An output in the richest form that it has."""
    if output["output_type"] == "stream":
        return fenced("text", joined(output["text"]))
    if output["output_type"] == "error":
        return fenced("text", f"{output['ename']}: {output['evalue']}")
    data = output["data"]
    if "image/png" in data:
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / f"{name}.png").write_bytes(base64.b64decode(joined(data["image/png"])))
        return f"![Output of the cell above]({pictures.name}/{name}.png)"
    if "text/html" in data:
        return fenced("{raw} html", f'<div class="output">{joined(data["text/html"])}</div>')
    return fenced("text", joined(data.get("text/plain", "")))


def joined(text: str | list[str]) -> str:
    """The format keeps a text as one string or as its lines."""
    return text if isinstance(text, str) else "".join(text)


def fenced(language: str, text: str) -> str:
    return f"``````{language}\n{text.rstrip()}\n``````"
