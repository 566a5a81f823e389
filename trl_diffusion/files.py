# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Writes files completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


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


def hold(folder: Path, doing: str) -> FileLock:
    """
    Locks a folder that only one run may write into at a time. The lock of a killed process ends with it.

    Args:
        folder (`Path`):
            The folder. It is created if it does not exist.
        doing (`str`):
            What the run does, such as `"annotating"`, for the message.

    Returns:
        [`~filelock.FileLock`]: the lock, to be released at the end.

    Raises:
        `ValueError`: If another process holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another process is {doing} into {folder}. Wait for it, or stop it.") from error
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to: {error.strerror}. Choose another folder, or make it writable."
        ) from error
    return lock


@contextmanager
def only_run(folder: Path, doing: str) -> Iterator[None]:
    """Holds the lock of a folder meanwhile, see [`hold`]."""
    lock = hold(folder, doing)
    try:
        yield
    finally:
        lock.release()
