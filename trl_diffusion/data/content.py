# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What files hold, by their content: hashes that a second start does not compute again, and files that show when they are damaged."""

import io
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from .pipelining import CORES


try:
    import fcntl
except ImportError:  # on Windows, where what killed writers left stays
    fcntl = None


ABSENT = "absent"  # the content of a file that is not there
SEAL = b"trl_diffusion 1\n"  # before the checksum at the end of a file
SEAL_BYTES = len(SEAL) + 16
BLOCK_BYTES = 1 << 22
FILES_AT_ONCE = 256
TICK_NS = 2 * 10**9  # a file that changes twice within a tick of a file system's clock may show one time for both
STATE = ("size", "mtime_ns", "ctime_ns", "inode")
INDEX_SCHEMA = pa.schema(
    [("path", pa.large_binary()), *((name, pa.int64()) for name in STATE), ("value", pa.string())]
)


# ----- the content of files -----


def state_of(path: str | Path) -> tuple[int, int, int, int]:
    """Size, times of the last change of content and of status, and inode of a file: another content has another one."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def file_hash(path: str | Path) -> str:
    """A hash of a file's content."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class FileIndex:
    """
    What was found out about files, such as the hashes of their contents. It is kept in a file, as long as the state of a file, see
    [`data.content.state_of`], is the same: a second start then reads none of them. `os.utime` does not restore the time of status.

    Args:
        path (`Path`):
            The file of the index. Where it is damaged or cannot be written, files are read again.
        find (`Callable`, *optional*, defaults to [`data.content.file_hash`]):
            From the path of a file to what is to be known of it, in threads.
    """

    def __init__(self, path: Path, find: Callable[[str], str] = file_hash):
        self.path, self.find = path, find
        self.table = read_sealed(path) or INDEX_SCHEMA.empty_table()

    def of(self, paths: Iterable[str | Path]) -> list[str]:
        """
        What is known of files.

        Args:
            paths (`Iterable[str]`):
                The files.

        Returns:
            `list[str]`: for each of them the result of `find`, or `"absent"` where there is no such file.

        Raises:
            `OSError`: If a file cannot be read.
        """
        paths = [os.path.abspath(path) for path in paths]
        names, begin = list(dict.fromkeys(paths)), time.time_ns()
        if not names:
            return []
        with ThreadPoolExecutor(CORES) as threads:
            pieces = [names[start : start + FILES_AT_ONCE] for start in range(0, len(names), FILES_AT_ONCE)]
            states = np.array([state for piece in threads.map(_states, pieces) for state in piece])
            found = self._kept(names, states)
            new = [place for place, value in enumerate(found) if value is None]
            for place, (state, value) in zip(new, threads.map(self._find, [names[place] for place in new])):
                states[place], found[place] = state, value
        lasting = [place for place in new if 0 <= states[place, 1:3].max() < begin - TICK_NS]
        self._keep([names[place] for place in lasting], states[lasting], [found[place] for place in lasting])
        values = dict(zip(names, found, strict=True))
        return [values[path] for path in paths]

    def keep(self, values: dict[Path, tuple[tuple[int, int, int, int], str]]) -> None:
        """Keeps what is known of files without reading them: their states, and what `find` would find."""
        states = np.array([state for state, _ in values.values()]).reshape(-1, len(STATE))
        self._keep([os.path.abspath(path) for path in values], states, [value for _, value in values.values()])

    def _kept(self, names: list[str], states: np.ndarray) -> list[str | None]:
        places = pc.index_in(_encoded(names), value_set=self.table["path"].combine_chunks())
        kept = self.table.take(places)
        same = np.all(
            [pc.fill_null(kept[name], -2).to_numpy() == states[:, place] for place, name in enumerate(STATE)], 0
        )
        found = [value if is_same else None for value, is_same in zip(kept["value"].to_pylist(), same, strict=True)]
        return [ABSENT if size < 0 else value for size, value in zip(states[:, 0], found, strict=True)]

    def _find(self, name: str) -> tuple[tuple[int, int, int, int], str]:
        """Again where the file changes meanwhile."""
        state = state_of(name)
        while True:
            value, after = self.find(name), state_of(name)
            if state == after:
                return state, value
            state = after

    def _keep(self, names: list[str], states: np.ndarray, values: list[str]) -> None:
        if not names:
            return
        paths = _encoded(names)
        columns = [paths, *(pa.array(states[:, place]) for place in range(len(STATE))), pa.array(values, pa.string())]
        others = self.table.filter(pc.invert(pc.is_in(self.table["path"], value_set=paths)))
        self.table = pa.concat_tables([others, pa.table(columns, schema=INDEX_SCHEMA)]).combine_chunks()
        with suppress(OSError):  # then files are read again
            write_sealed(self.path, self.table)


def _encoded(names: list[str]) -> pa.LargeBinaryArray:
    return pa.array([os.fsencode(name) for name in names], pa.large_binary())


def _states(paths: list[str]) -> list[tuple[int, int, int, int]]:
    states = []
    for path in paths:
        try:
            states.append(state_of(path))
        except (FileNotFoundError, NotADirectoryError):
            states.append((-1, -1, -1, -1))
    return states


# ----- files that end in the checksum of what is before -----


class SealedFile(io.RawIOBase):
    """
    Writes a file that ends in a checksum, whole or not at all: it has its name once it is finished. Until then it is locked, by which
    [`data.content.clear_unfinished`] knows that its writer lives.

    Args:
        path (`Path`):
            The file.
        label (`str`, *optional*, defaults to `""`):
            What the file is. It is part of the checksum, so that no other file is taken for it.
    """

    def __init__(self, path: Path, label: str = ""):
        self.path = path
        self.digest = xxhash.xxh3_128(label.encode())
        self.temporary, self.file = self._create()

    def _create(self) -> tuple[Path, BinaryIO]:
        while True:
            temporary = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.tmp")
            file = temporary.open("wb")
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            if temporary.exists():  # not cleared before it was locked
                return temporary, file
            file.close()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def finish(self) -> None:
        """Writes the checksum, and gives the file its name."""
        self.file.write(SEAL + self.digest.digest())
        self.file.flush()
        os.fsync(self.file.fileno())
        if fcntl is None:  # Windows renames no open file
            self.file.close()
        self.temporary.replace(self.path)
        self.file.close()

    def discard(self) -> None:
        """Removes what was not finished."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def clear_unfinished(folder: Path, name: str = "") -> None:
    """
    Removes what writers that were killed left of files that they did not finish.

    Args:
        folder (`Path`):
            The folder.
        name (`str`, *optional*, defaults to `""`):
            What the names of these files begin with.
    """
    for path in folder.glob("*.tmp") if fcntl is not None else ():
        if not re.fullmatch(r".+\.[0-9a-f]{32}\.tmp", path.name) or not path.name.startswith(name):
            continue
        with suppress(OSError), path.open("rb") as file:  # locked by a writer that lives, or renamed by it just now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def damage_of(path: str | Path, label: str = "") -> str:
    """
    What is wrong with a file of [`data.content.SealedFile`].

    Args:
        path (`str` or `Path`):
            The file.
        label (`str`, *optional*, defaults to `""`):
            What it is said to be.

    Returns:
        `str`: empty for the file that was written.
    """
    digest = xxhash.xxh3_128(label.encode())
    try:
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - SEAL_BYTES
            if left < 0:
                return "it is cut off"
            while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
            seal = file.read()
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if not seal.startswith(SEAL):
        return "it is cut off, or no file of this library"
    return "" if seal[len(SEAL) :] == digest.digest() else "its content is not what was written"


def write_sealed(path: Path, table: pa.Table) -> None:
    """
    Writes a table as an Arrow file with a checksum. Its folder is created if it does not exist.

    Args:
        path (`Path`):
            The file.
        table (`pa.Table`):
            The table.

    Raises:
        `OSError`: If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(path.parent, path.name)
    file = SealedFile(path)
    try:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        file.finish()
    finally:
        file.discard()


def read_sealed(path: Path) -> pa.Table | None:
    """
    Reads a table of [`data.content.write_sealed`].

    Args:
        path (`Path`):
            The file.

    Returns:
        `pa.Table` or `None`: `None` where there is none, or a damaged one.
    """
    if not path.exists() or damage_of(path):
        return None
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()
