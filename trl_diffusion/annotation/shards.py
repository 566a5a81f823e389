# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The files of an annotation run: shards, which say which one of which run they are, and the manifest."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..checksums import DamagedFile, read_table


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARD, RUN = b"shard", b"run"  # in the metadata of a shard: its name, and the fingerprint of its run
PROGRESS = ("complete", "counts", "versions")  # entries of a manifest that the annotations do not depend on


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """Hash of everything in a manifest that the annotations and their shards depend on."""
    payload = json.dumps({name: value for name, value in manifest.items() if name not in PROGRESS}, sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:8]


def read_shard(path: Path, fingerprint: str | None = None) -> pa.Table:
    """
    Reads a shard of a run.

    Args:
        path (`Path`):
            The file.
        fingerprint (`str`, *optional*):
            The fingerprint of the run, see [`annotation.run.Task`]. By default it may be that of any run.

    Returns:
        `pyarrow.Table`: its rows. The metadata have what they were made of, and of which run they are.

    Raises:
        [`checksums.DamagedFile`]: If it is not as it was written, or is another shard or one of another run.
    """
    table = read_table(path)
    shard, (_, run) = (table.schema.metadata or {}).get(SHARD, b"").decode(), rows_and_run(table)
    if shard != path.name or fingerprint not in (None, run):
        raise DamagedFile(f"{path} is another shard, or one of another run")
    return table


def rows_and_run(table: pa.Table) -> tuple[int, str]:
    """The number of rows of a shard, and the fingerprint of its run."""
    return table.num_rows, (table.schema.metadata or {}).get(RUN, b"").decode()


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a run, or nothing if there is none that can be read."""
    path = folder / MANIFEST
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        logger.warning(f"{path} cannot be read: it is written again.")
        return {}
