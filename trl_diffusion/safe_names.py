# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Names that become parts of paths: ids, models, metrics, splits. None of them leads out of the folder that it is for."""

import re
from pathlib import PurePosixPath

from .messages import shown


SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
MAX_BYTES = 255  # of a file's name, on most systems
WHAT_IT_IS = (
    "at most 200 letters from a to z, digits, '.', '_' and '-' that begins with a letter or digit"  # after "a name of"
)


def check_safe_name(name: str, what: str) -> str:
    """
    Refuses a name that cannot be part of a file's name on every system.

    Args:
        name (`str`):
            The name.
        what (`str`):
            What it is the name of, for the message.

    Returns:
        `str`: the name.

    Raises:
        `ValueError`: If it has other characters, or too many.
    """
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
        raise ValueError(f"The {what} {shown(name)} cannot be part of a file's name. Choose a name of {WHAT_IT_IS}.")
    return name


def check_part_of_path(name: str, what: str) -> str:
    """
    Refuses a name that would lead to another folder.

    Args:
        name (`str`):
            The name, which may have any other characters.
        what (`str`):
            What it is the name of, for the message.

    Returns:
        `str`: the name.

    Raises:
        `ValueError`: If it is no part of a path.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or set("/\\\0") & set(name)
        or not name.isprintable()
        or len(name.encode(errors="replace")) > MAX_BYTES
        or re.match("[A-Za-z]:", name)
    ):
        raise ValueError(
            f"The {what} {shown(name)} is part of a path, and would lead to another folder. Choose another name."
        )
    return name


def check_relative_path(path: str, what: str) -> str:
    """The same for each part of a path that is below a folder, with `/` between them."""
    if not isinstance(path, str) or PurePosixPath(path).is_absolute() or "//" in path:
        raise ValueError(f"The {what} {shown(path)} leads out of its folder. Name a path below it.")
    for part in path.split("/"):
        check_part_of_path(part, what)
    return path
