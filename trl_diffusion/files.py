# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Files that are there whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, content: bytes, safe: str = "What was written before is safe") -> None:
    """
    Writes a file under another name first, so that a stop at any moment leaves none that is cut short.

    Args:
        path (`Path`):
            The file. Its folder is made where there is none.
        content (`bytes`):
            What it holds.
        safe (`str`, *optional*, defaults to `"What was written before is safe"`):
            For the message: what a failure does not touch.

    Raises:
        `ValueError`: If it cannot be written, as on a full disk.
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
            f"{path} cannot be written: {error.strerror}. {safe}: make room, and the same command goes on."
        ) from error
