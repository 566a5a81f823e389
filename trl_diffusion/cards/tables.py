# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Tables of figures: how many digits are shown, which value is the best, and their Markdown."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .text import BEGINNING, plain


# Significant digits of the largest value of a column: 22.02 for a mean over images, 12.3 for a corpus metric
SCORE_DIGITS, CORPUS_DIGITS = 4, 3


@dataclass
class Cell:
    """
    A formatted cell of a table.

    Args:
        figure (`str`):
            The value, empty if it is missing.
        spread (`str`, *optional*, defaults to `""`):
            Standard error or interval.
        counted (`str`, *optional*, defaults to `""`):
            Number of images or pairs that count, if some are missing.
        is_best (`bool`, *optional*, defaults to `False`):
            Whether the value is the best of its column, or of its row if the columns are models.
    """

    figure: str
    spread: str = ""
    counted: str = ""
    is_best: bool = False


@dataclass
class Grid:
    """
    A table that can be written as Markdown or LaTeX.

    Args:
        title (`str`):
            Heading in the report.
        caption (`str`):
            Caption, in one sentence.
        head (`list[str]`):
            Names of the columns.
        rows (`list[tuple[str, list[Cell]]]`):
            Names and cells of the rows.
    """

    title: str
    caption: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def decimals(values: Sequence[float | None], digits: int) -> int:
    """The number of decimals that shows the largest value with `digits` significant digits; at most 6."""
    largest = max((abs(value) for value in values if value is not None), default=0)
    return min(6, max(0, digits - 1 - math.floor(math.log10(largest)))) if largest else 2


def best(values: Sequence[float | None], higher_is_better: bool, places: int) -> list[bool]:
    """
    Marks the best values.

    Args:
        values (`Sequence[float | None]`):
            The values, `None` if missing.
        higher_is_better (`bool`):
            Whether the highest value is the best.
        places (`int`):
            Number of decimals. Values that are equal after rounding share the mark.

    Returns:
        `list[bool]`: all `False` with fewer than two values.
    """
    shown = [None if value is None else round(value, places) for value in values]
    present = [value for value in shown if value is not None]
    if len(present) < 2:
        return [False] * len(shown)
    target = max(present) if higher_is_better else min(present)
    return [value == target for value in shown]


def markdown_text(text: str) -> str:
    """
    Escapes a text, on one line, as [`cards.text.one_line`] does, but with backslashes: a report is also read as it is, and is no page
    of the Hub.
    """
    text = re.sub(r"([\\`*_{}\[\]<>|#~]|&(?=#?\w+;)|:(?=//)|(?<=\bwww)\.)", r"\\\1", plain(text))
    return BEGINNING.sub(lambda found: f"{found[1][:-1]}&#{ord(found[1][-1])};", text)


def markdown_table(grid: Grid, escape: Callable[[str], str] = markdown_text) -> str:
    """
    A grid in Markdown.

    Args:
        grid ([`cards.tables.Grid`]):
            The grid.
        escape (`Callable`, *optional*, defaults to `markdown_text`):
            Escapes the names of columns and rows.

    Returns:
        `str`
    """
    lines = [
        "| " + " | ".join(escape(name) for name in grid.head) + " |",
        "|---" + "|---:" * (len(grid.head) - 1) + "|",
    ]
    for name, cells in grid.rows:
        lines.append("| " + " | ".join([escape(name), *(markdown_cell(cell) for cell in cells)]) + " |")
    return "\n".join(lines)


def markdown_cell(cell: Cell) -> str:
    figure = f"**{cell.figure}**" if cell.is_best else cell.figure or "n/a"
    return " ".join(part for part in (figure, cell.spread, cell.counted and f"({cell.counted})") if part)
