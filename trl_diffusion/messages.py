# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Values of others in messages: short, on one line, and without characters that move a terminal's cursor."""

import re
import reprlib
from collections.abc import Iterable
from typing import Any


# No text needs them: control characters but tabs and line feeds, turns of the direction, halves of characters
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 300  # characters of a text
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 4, 8, 8, 8
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


def shown(value: Any) -> str:
    """
    A value for a message, as Python writes it.

    Args:
        value (`Any`):
            The value.

    Returns:
        `str`: of a long or deep value its ends, with dots between.
    """
    try:
        return cut(_REPR.repr(value))
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return f"a value of the type {type(value).__name__}"


def printable(text: str) -> str:
    """A text on one line, with escapes instead of what is not printed: control characters, turns of the direction, surrogates."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def cut(text: str, longest: int = LONGEST) -> str:
    """A text as [`messages.printable`] leaves it, without what is beyond a number of characters."""
    line = printable(text[: 2 * longest])
    return line if len(line) <= longest and len(text) <= 2 * longest else f"{line[:longest]}..."


def quoted(names: Iterable[Any], maximum: int = 20) -> str:
    """Names between backticks: the first ones, and how many more there are."""
    names = list(names)
    more = len(names) - maximum
    return ", ".join(f"`{cut(str(name), 100)}`" for name in names[:maximum]) + (
        f" and {more} more" if more > 0 else ""
    )


def shortened(ids: list, maximum: int = 20) -> str:
    """Ids for a message: the first ones, and how many more there are."""
    more = len(ids) - maximum
    return ", ".join(cut(str(each), 100) for each in ids[:maximum]) + (f" and {more} more" if more > 0 else "")
