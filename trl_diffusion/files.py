# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Writes files completely or not at all."""

import os
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, content: bytes, safe: str = "What was written before is safe") -> None:
    """
    Writes a temporary file and renames it, so that an interruption never leaves an incomplete file.

    Args:
        path (`Path`):
            The file. Its folder is created if it does not exist.
        content (`bytes`):
            Content of the file.
        safe (`str`, *optional*, defaults to `"What was written before is safe"`):
            For the error message: what a failure does not affect.

    Raises:
        `ValueError`: If the file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path} cannot be written: {error.strerror}. {safe}. Free some disk space and repeat the same command to "
            "continue."
        ) from error
