# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A picture of a criteria tree, with a panel for each dimension."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .criteria import Criteria


POSITIVE_COLOR, NEGATIVE_COLOR = (0, 112, 60), (186, 38, 28)
BAND_COLOR, BRANCH_COLOR, STRIPE_COLOR = (38, 50, 66), (166, 176, 188), (242, 245, 248)
# Headings by depth: font size, color and space above. The last entry also applies to deeper headings.
HEADINGS = ((30, "white", 0), (25, (17, 24, 34), 16), (21, (52, 64, 80), 6), (18, (98, 108, 122), 0))
FORM_SIZE = 18
MARGIN, GAP, PADDING, INDENT, BAND_HEIGHT = 40, 32, 18, 24, 52
HEAD_HEIGHT = BAND_HEIGHT + 10
TEXT_WIDTH = 400  # pixels; longer texts are wrapped


@dataclass
class Row:
    """
    A row of a panel: the heading of a node, or the two forms of an attribute side by side.

    Args:
        depth (`int`):
            Depth of the node in the panel, from 1.
        texts (`list[list[str]]`):
            Lines of the heading, or lines of the positive form and lines of the negative form.
    """

    depth: int
    texts: list[list[str]]

    @property
    def is_attribute(self) -> bool:
        return len(self.texts) == 2

    @property
    def style(self) -> tuple:
        return (FORM_SIZE, None, 0) if self.is_attribute else HEADINGS[min(self.depth, len(HEADINGS) - 1)]

    @property
    def line_height(self) -> int:
        return math.ceil(1.4 * self.style[0])

    @property
    def height(self) -> int:
        return self.style[2] + self.line_height * max(len(lines) for lines in self.texts)

    @property
    def left(self) -> int:
        return PADDING + INDENT * (self.depth - 1)

    def width(self, column: int) -> int:
        """Width in pixels of the widest line in a column."""
        return math.ceil(max(_font(self.style[0]).getlength(line) for line in self.texts[column]))


def criteria_picture(criteria: Criteria) -> PIL.Image.Image:
    """
    Draws a criteria tree: an overview, then a panel for each dimension. Nodes are indented headings, and the two forms
    of an attribute are side by side, the positive one in green and the negative one in red.

    Args:
        criteria ([`Criteria`]):
            The tree.

    Returns:
        `PIL.Image.Image`: the picture, large enough to read all of it.
    """
    counts = criteria.counts()
    panels = [(_title(criteria.name, len(criteria.attributes)), _overview(criteria))]
    panels += [(_title(dimension, counts[dimension]), _dimension(criteria, dimension)) for dimension in counts]

    # All panels have the same width, and their negative forms start at the same position
    rows = [row for _, panel in panels for row in panel]
    middle = max(row.left + row.width(0) for row in rows if row.is_attribute) + PADDING
    width = max(
        *(middle + row.width(1) for row in rows if row.is_attribute),
        *(row.left + row.width(0) for row in rows),
        *(PADDING + math.ceil(_font(HEADINGS[0][0]).getlength(title)) for title, _ in panels),
    )
    width += PADDING
    heights = [HEAD_HEIGHT + sum(row.height for row in panel) for _, panel in panels]

    # Choose the grid with the shortest diagonal
    grids = []
    for columns in range(1, len(panels) + 1):
        lines = [max(heights[start : start + columns]) for start in range(0, len(panels), columns)]
        size = (2 * MARGIN + columns * (width + GAP) - GAP, 2 * MARGIN + sum(lines) + GAP * (len(lines) - 1))
        grids.append((math.hypot(*size), size, columns, lines))
    _, size, columns, lines = min(grids)

    picture = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(picture)
    for index, (title, panel) in enumerate(panels):
        left = MARGIN + index % columns * (width + GAP)
        top = MARGIN + sum(lines[: index // columns]) + GAP * (index // columns)
        _draw_panel(draw, left, top, width, middle, title, panel)
    return picture


def _overview(criteria: Criteria) -> list[Row]:
    """A legend of the two colors, and the number of attributes of the dimensions and their children."""
    # An attribute counts for its parent nodes, or for itself if it is a dimension
    counts = Counter(node for attribute in criteria.attributes for node in attribute.path or (attribute.id,))
    rows = [Row(1, [_lines("positive form", FORM_SIZE), _lines("negative form", FORM_SIZE)])]
    for depth, node, _ in criteria.walk():
        if depth < 2 and node in counts:
            rows.append(_heading(depth + 1, _title(node, counts[node])))
    return rows


def _dimension(criteria: Criteria, dimension: str) -> list[Row]:
    """The rows of a dimension."""
    rows = []
    for depth, node, attribute in Criteria(criteria.name, criteria.levels, criteria.select(dimension)).walk():
        if attribute is not None:
            forms = [_lines(form, FORM_SIZE) for form in (attribute.positive, attribute.negative)]
            rows.append(Row(max(1, depth), forms))
        elif depth > 0:
            rows.append(_heading(depth, node.replace("_", " ")))
    return rows


def _heading(depth: int, text: str) -> Row:
    return Row(depth, [_lines(text, HEADINGS[min(depth, len(HEADINGS) - 1)][0])])


def _title(node: str, count: int) -> str:
    return f"{node.replace('_', ' ')} ({count})"


def _draw_panel(
    draw: PIL.ImageDraw.ImageDraw, left: int, top: int, width: int, middle: int, title: str, rows: list[Row]
) -> None:
    size, color, _ = HEADINGS[0]
    draw.rectangle((left, top, left + width - 1, top + BAND_HEIGHT - 1), fill=BAND_COLOR)
    draw.text((left + PADDING, top + BAND_HEIGHT // 2), title, color, _font(size), anchor="lm")
    top += HEAD_HEIGHT
    parents = {}  # by depth, the start of the line to the child nodes
    for row in rows:
        size, color, space = row.style
        bottom = top + row.height
        top += space
        center = top + row.line_height // 2
        if row.is_attribute:
            draw.rectangle((left + row.left - 6, top + 1, left + width - 1, bottom - 2), fill=STRIPE_COLOR)
        if row.depth > 1:
            x, y = parents[row.depth - 1]
            draw.line((x, y, x, center, left + row.left - 6, center), fill=BRANCH_COLOR, width=2)
        parents[row.depth] = (left + row.left + 6, bottom)
        colors = (POSITIVE_COLOR, NEGATIVE_COLOR) if row.is_attribute else (color,)
        for text, color, x in zip(row.texts, colors, (row.left, middle)):
            for index, line in enumerate(text):
                y = center + index * row.line_height
                draw.text((left + x, y), line, color, _font(size), anchor="lm")
        top = bottom


def _lines(text: str, size: int) -> list[str]:
    """Wraps a text into lines of at most `TEXT_WIDTH` pixels, except for longer words."""
    lines = []
    for word in text.split():
        if lines and _font(size).getlength(f"{lines[-1]} {word}") <= TEXT_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@cache
def _font(size: int) -> PIL.ImageFont.ImageFont:
    return PIL.ImageFont.load_default(size)
