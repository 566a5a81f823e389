# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Several machines, which need not have a disk in common: who sees which folder, and whether all were started alike."""

import uuid
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object


def has_nodes() -> bool:
    """Whether the processes are on several machines. All processes must ask."""
    state = PartialState()
    return state.num_processes > 1 and gather_object([state.local_process_index]).count(0) > 1


def sharing(folder: Path) -> list[list[int]]:
    """
    Which processes see the same folder: each writes a file, and looks for those of the others. All processes must ask. Those of one
    machine are taken to see the same.

    Args:
        folder (`Path`):
            What each process calls the folder, which is created.

    Returns:
        `list[list[int]]`: for each process those that see its folder, itself included, in order.
    """
    state = PartialState()
    if not has_nodes():
        return [list(range(state.num_processes))] * state.num_processes
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".{uuid.uuid4().hex}.tmp"  # a new name, which no network drive has remembered as missing
    mark.touch()
    try:
        marks = gather_object([mark.name])
        seen = [process for process, name in enumerate(marks) if (folder / name).exists()]
        return gather_object([seen])
    finally:
        mark.unlink()


def is_shared(folder: Path) -> bool:
    """Whether all processes see the same folder. All processes must ask."""
    return all(len(seen) == PartialState().num_processes for seen in sharing(folder))


def different(described: dict[str, Any]) -> dict[str, tuple[int, Any, Any]]:
    """
    What is not alike in all processes. All processes must ask.

    Args:
        described (`dict[str, Any]`):
            What this process does, by name.

    Returns:
        `dict[str, tuple[int, Any, Any]]`: by name, the first process that differs from process 0, what process 0 has there, and what
        that process has; the same in all processes.
    """
    first, *others = gather_object([described])
    found = {}
    for process, other in enumerate(others, start=1):
        for name in first.keys() | other.keys():
            if first.get(name) != other.get(name):
                found.setdefault(name, (process, first.get(name), other.get(name)))
    return dict(sorted(found.items()))
