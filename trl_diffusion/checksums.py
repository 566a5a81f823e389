# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Checksums inside the files that a later run uses again: of all that the file holds, and for an image also of what it was made of.

A file that was truncated, changed, replaced by another one or written by something else has another checksum, or none.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .files import write_file


CHECKSUM = "checksum"
MARK = b"checksum of this file: "  # before it
BLANK = b"0" * 32  # in its place while it is computed


class DamagedFile(ValueError):
    """A file is not as it was written."""


def digest_of(content: Any) -> str:
    """A checksum of what JSON can hold."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


# ----- tables -----


def write_table(path: Path, table: pa.Table, safe: str = "What was written before is safe") -> None:
    """
    Writes a Parquet file completely or not at all, with a checksum of all of its bytes in its metadata.

    Args:
        path (`Path`):
            The file.
        table (`pyarrow.Table`):
            The table.
        safe (`str`, *optional*):
            See [`files.write_file`].
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({CHECKSUM: (MARK + BLANK).decode()})
    content = buffer.getvalue()
    place = content.rindex(MARK + BLANK) + len(MARK)
    write_file(path, content[:place] + _hash(content) + content[place + len(BLANK) :], safe)


def read_table(path: Path) -> pa.Table:
    """
    Reads a Parquet file of [`write_table`].

    Args:
        path (`Path`):
            The file.

    Returns:
        `pyarrow.Table`: the table that was written.

    Raises:
        [`DamagedFile`]: If it is not as it was written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror})") from error
    place = content.rfind(MARK) + len(MARK)
    found = content[place : place + len(BLANK)]
    if MARK not in content or _hash(content[:place] + BLANK + content[place + len(BLANK) :]) != found:
        raise DamagedFile(f"{path} is cut off, damaged, or written by something else")
    table = pq.read_table(pa.BufferReader(content))
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != CHECKSUM.encode()}
    return table.replace_schema_metadata(metadata)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


# ----- JSON -----


def write_json(path: Path, content: dict[str, Any], safe: str = "What was written before is safe") -> None:
    """Writes a JSON file completely or not at all, with its checksum as the last entry."""
    text = json.dumps(content | {CHECKSUM: digest_of(content)}, indent=2)
    write_file(path, f"{text}\n".encode(), safe)


def read_json(path: Path) -> dict[str, Any]:
    """
    Reads a JSON file of [`write_json`].

    Args:
        path (`Path`):
            The file.

    Returns:
        `dict`: the content that was written.

    Raises:
        [`DamagedFile`]: If it is not as it was written.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise DamagedFile(f"{path} cannot be read ({' '.join(str(error).split())[:120]})") from error
    if content.pop(CHECKSUM, None) != digest_of(content):
        raise DamagedFile(f"{path} is not as it was written: its checksum is another one")
    return content
