# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Writes what is computed into Arrow files, while more is read and computed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features

from .content import SealedFile
from .pipelining import CORES, ahead, behind


FILE = "_file"  # in an example, the name of the file that it is written to
ROWS_AT_ONCE = 100  # that are written at once


def write_files(
    parts: dict[Path, range | list[int]],
    features: Features,
    read: Callable[[range | list[int]], list],
    encode: Callable[[list], list[dict[str, Any]]],
    batch_size: int,
    done: Callable[[int], Any],
    label: str,
    pack: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """
    Writes examples into Arrow files, whole or not at all: reads rows ahead, and writes behind.

    Args:
        parts (`dict[Path, range | list[int]]`):
            The numbers of the rows of each file.
        features ([`~datasets.Features`]):
            Columns of the files.
        read (`Callable`):
            From the numbers of some rows to what `encode` is given of them, in threads.
        encode (`Callable`):
            From what several rows gave to an example for each.
        batch_size (`int`):
            Number of rows that are encoded at once.
        done (`Callable`):
            Is told how many rows were encoded.
        label (`str`):
            What the files are, see [`data.content.SealedFile`].
        pack (`Callable`):
            From an example, with the name of its file as `FILE`, to a row.
    """
    each = -(-batch_size // CORES)  # so that all threads work on one batch, and few rows are handed over one by one
    pieces = (
        part[start : start + batch_size][first : first + each]
        for part in parts.values()
        for start in range(0, len(part), batch_size)
        for first in range(0, min(batch_size, len(part) - start), each)
    )
    read_ahead = ahead(read, pieces, 2 * -(-batch_size // each))
    with ExitStack() as files, closing(read_ahead), behind(1) as write:
        rows = chain.from_iterable(read_ahead)
        for path, part in parts.items():
            file = files.enter_context(ArrowFile(path, features, label, pack))
            for start in range(0, len(part), batch_size):
                batch = list(islice(rows, min(batch_size, len(part) - start)))
                write(file.write, encode(batch))
                done(len(batch))
            write(file.finish)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what to do where a file or a folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}. What was precomputed before is safe. Free some disk space there, or set "
            "`precompute_dir` to a folder that can be written, and repeat the command."
        ) from error


class ArrowFile:
    """
    A file of examples, which has its name once it is whole, see [`data.content.SealedFile`].

    Args:
        path (`Path`):
            The file.
        features ([`~datasets.Features`]):
            Its columns.
        label (`str`):
            What the file is.
        pack (`Callable`):
            From an example, with the name of its file as `FILE`, to a row.

    Raises:
        `ValueError`: If it cannot be written, for example because the disk is full.
    """

    def __init__(self, path: Path, features: Features, label: str, pack: Callable):
        self.path, self.schema, self.label, self.pack = path, features.arrow_schema, label, pack
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "ArrowFile":
        with writing(self.path):
            self.file = SealedFile(self.path, self.label)
            self.stream = pa.ipc.new_stream(self.file, self.schema)
        return self

    def write(self, examples: list[dict[str, Any]]) -> None:
        """Writes examples."""
        self.rows += [self.pack(example | {FILE: self.path.name}) for example in examples]
        if len(self.rows) >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        with writing(self.path):
            self.stream.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows = []

    def finish(self) -> None:
        """Gives the file its name."""
        self.flush()
        with writing(self.path):
            self.stream.close()
            self.file.finish()

    def __exit__(self, *_: Any) -> None:
        self.file.discard()
