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
SHARD = "shard"  # in the metadata of a shard: which one of which run it is
PROGRESS = ("complete", "counts", "versions")  # entries of a manifest that the annotations do not depend on


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """Hash of everything in a manifest that the annotations and their shards depend on."""
    payload = json.dumps({name: value for name, value in manifest.items() if name not in PROGRESS}, sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:8]


def shard_name(fingerprint: str, index: int) -> str:
    """Which shard of which run a file is."""
    return f"{fingerprint}-{index:06d}"


def read_shard(path: Path, fingerprint: str) -> pa.Table:
    """
    Reads a shard of a run.

    Args:
        path (`Path`):
            The file.
        fingerprint (`str`):
            The fingerprint of the run, see [`Task`].

    Returns:
        `pyarrow.Table`: its rows. The metadata name what they were made of.

    Raises:
        [`checksums.DamagedFile`]: If it is not as it was written, or is another shard or one of another run.
    """
    table = read_table(path)
    name = (table.schema.metadata or {}).get(SHARD.encode(), b"").decode()
    if name != shard_name(fingerprint, int(path.stem.removeprefix("annotations-"))):
        raise DamagedFile(f"{path} is the shard {name or 'of no run'}")
    return table


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a run, or nothing if there is none that can be read."""
    path = folder / MANIFEST
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        logger.warning(f"{path} cannot be read: it is written again.")
        return {}
