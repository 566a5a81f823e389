# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
The images of a folder that a run continues with: those whose content is what was sampled.

`SHA256SUMS` holds a line for each image, as `sha256sum` writes and checks them, and one for the manifest. Each process appends the
lines of a batch to a part of its own before it writes the images, so an image without a line was not sampled here.
"""

import hashlib
import logging
import os
import re
from pathlib import Path

from ..batching import in_threads
from ..files import describe_write_error, sha256_of, write_file


logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums of the files of a folder by their names, also those of a run that was stopped."""
    sums = {}
    for path in [folder / SUMS, *sorted(folder.glob(f"{SUMS}.part-*"))]:
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        # The last line of a killed process may be half of one
        sums |= {found[2]: found[1] for found in map(LINE.fullmatch, lines) if found}
    return sums


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Writes `SHA256SUMS`, and removes its parts."""
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()
    path = folder / SUMS
    if not path.exists() or path.read_bytes() != text:
        write_file(path, text)
    for part in folder.glob(f"{SUMS}.part-*"):
        part.unlink()


def write_images(files: dict[Path, bytes], process_index: int) -> None:
    """
    Writes images, each completely or not at all, after their checksums.

    Args:
        files (`dict[Path, bytes]`):
            What the files of one folder hold.
        process_index (`int`):
            Index of this process among those that write into the folder.

    Raises:
        `ValueError`: If a file cannot be written, for example because the disk is full.
    """
    folder = next(iter(files)).parent
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n" for path, content in files.items())
    part = folder / f"{SUMS}.part-{process_index:05d}"
    try:
        with part.open("ab") as file:
            file.write(b"\n" + lines.encode())  # the line before may be half of one
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason, way_out = describe_write_error(error)
        raise ValueError(
            f"{part} cannot be written: {reason}. What was written before is safe. {way_out} and repeat the same command to continue."
        ) from error
    in_threads(lambda item: write_file(*item), files.items())


def keep_sampled_images(folder: Path) -> dict[str, str]:
    """
    Removes what is not an image that was sampled into a folder: unfinished files, and images whose content has changed since or
    that something else has put there. They are named, and will be sampled again.

    Args:
        folder (`Path`):
            The folder, which no other process uses.

    Returns:
        `dict[str, str]`: the checksums of the images that are left, by their names.
    """
    for path in folder.glob("*.tmp"):
        path.unlink()
    sums = read_sums(folder)
    paths = sorted(folder.glob("*.png"))
    is_kept = in_threads(lambda path: sha256_of(path) == sums.get(path.name), paths)
    changed = [path for path, kept in zip(paths, is_kept, strict=True) if not kept]
    for path in changed:
        path.unlink()
    if changed:
        names = ", ".join(path.name for path in changed[:5])
        logger.warning(
            f"{len(changed)} of {len(paths)} images in {folder} are not those that were sampled there: {names}"
            f"{' and others' if len(changed) > 5 else ''}. They are sampled again."
        )
    return {path.name: sums[path.name] for path, kept in zip(paths, is_kept, strict=True) if kept}


def is_changed(path: Path) -> bool:
    """Whether `SHA256SUMS` beside a file says that the file held something else."""
    sums = read_sums(path.parent)
    return path.name in sums and sums[path.name] != sha256_of(path)
