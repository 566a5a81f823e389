# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Writes files completely or not at all, and keeps a folder for one process."""

import errno
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import PIL.Image
from filelock import FileLock, Timeout


LOCK_NAME = ".lock"
TEMPORARY = ".tmp"  # behind the name of a file that is being written
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
# How the writers of PyTorch and of safetensors, which raise no `OSError`, say that a file could not be written
FROM_SYSTEM, OF_PYTORCH = re.compile(r"\(os error (\d+)\)"), re.compile(r"PytorchStreamWriter|inline_container")


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
    temporary = path.with_name(path.name + TEMPORARY)
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
        reason, way_out = describe_write_error(error)
        raise ValueError(
            f"{path} cannot be written: {reason}. {safe}. {way_out} and repeat the same command to continue."
        ) from error


def save_picture(path: Path, image: PIL.Image.Image) -> None:
    """Writes an image completely or not at all, in the format that the name of the file says."""
    endings = PIL.Image.registered_extensions()
    if path.suffix.lower() not in endings:
        raise ValueError(f"{path} cannot be written: its name must end in that of a format of images, such as .png.")
    buffer = io.BytesIO()
    image.save(buffer, format=endings[path.suffix.lower()])
    write_file(path, buffer.getvalue())


def describe_write_error(error: Exception) -> tuple[str, str] | None:
    """
    Says why something could not be written.

    Args:
        error (`Exception`):
            What was raised, by Python, PyTorch or safetensors.

    Returns:
        `tuple[str, str]`: the reason, and the first words of the way out; `None` if the error is not one of writing.
    """
    found = FROM_SYSTEM.search(str(error))
    number = error.errno if isinstance(error, OSError) else found and int(found[1])
    if number is None:
        return (
            ("it could not be written to its end", "Free some disk space") if OF_PYTORCH.search(str(error)) else None
        )
    if number in NO_SPACE:
        return os.strerror(number), "Free some disk space"
    way_out = "Make its folder writable, or name another one," if number in FORBIDDEN else "See to the disk"
    return os.strerror(number), way_out


def lock_folder(folder: Path, in_use: str, is_shared: bool = False) -> FileLock:
    """
    Keeps a folder for this process until the lock is released or the process ends, however it ends.

    Args:
        folder (`Path`):
            The folder, which exists.
        in_use (`str`):
            What is said where another process has it.
        is_shared (`bool`, *optional*, defaults to `False`):
            Whether this process may lock it more than once.

    Returns:
        [`~filelock.FileLock`], acquired.

    Raises:
        `ValueError`: If another process has the folder.
    """
    lock = FileLock(folder / LOCK_NAME, is_singleton=is_shared, thread_local=not is_shared)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(in_use) from error
    return lock


def hold(folder: Path, doing: str) -> FileLock:
    """
    Makes a folder, and keeps it for this process, see [`lock_folder`].

    Args:
        folder (`Path`):
            The folder.
        doing (`str`):
            What the process does, such as `"annotating"`, for the message.

    Returns:
        [`~filelock.FileLock`], acquired.

    Raises:
        `ValueError`: If another process has the folder, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock_folder(folder, f"Another process is {doing} into {folder}. Wait for it, or stop it.")
    except OSError as error:
        reason, way_out = describe_write_error(error)
        raise ValueError(
            f"{folder} cannot be written to: {reason}. {way_out} and repeat the same command to continue."
        ) from error


@contextmanager
def only_run(folder: Path, doing: str) -> Iterator[None]:
    """Keeps a folder for this process meanwhile, see [`hold`]."""
    lock = hold(folder, doing)
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(*paths: Path) -> None:
    """Waits until files, and the names in folders, are on the disk and not only in memory."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
