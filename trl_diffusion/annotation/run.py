# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A run annotates a dataset and writes Parquet shards. After an interruption, the same command continues it.

A shard holds the annotations of `rows_per_shard` rows in the order of the dataset, and is written completely or not at
all. Its content depends only on the rows and on what the manifest describes, so an interrupted run has the same
result.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..batching import CORES
from ..files import write_file
from ..messages import cut, shown
from .records import STATUSES, Record, check_prompt, encode_row, open_images, to_table


MANIFEST = "manifest.json"
STREAM_STATE = ".stream_state.json"
PACKAGES = ("trl-diffusion", "transformers", "datasets", "torch", "pillow")
REPEATED_ID = "the id stands in an earlier row"
ALLOWANCE_ROWS = 1000  # until this many rows are done, the error rate is computed over this number

Row = dict[str, Any]
Role = Callable[[list[Record]], list[Record]]


@dataclass(frozen=True)
class Task:
    """
    What a run does with each row.

    Args:
        read (`Callable`):
            Turns a row of the dataset into a record.
        roles (`tuple`):
            The roles, in order: each fills in a list of records.
        features ([`~datasets.Features`]):
            Columns of the annotations.
        description (`dict`):
            Everything that the annotations depend on. A run continues an earlier one with the same description.
        count (`Callable`):
            Turns annotation rows into the counts of the manifest.
        split (`str`):
            Name of the split, part of the name of the run's folder.
        rows_per_shard (`int`):
            Rows per shard.
        images_per_row (`int`):
            Images per row, for the progress bar.
    """

    read: Callable[[Row], Record]
    roles: tuple[Role, ...]
    features: Features
    description: dict[str, Any]
    count: Callable[[list[Row]], Counter]
    split: str
    rows_per_shard: int
    images_per_row: int

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.%:+\[\]-]{0,99}", self.split):
            raise ValueError(
                f"The split {shown(self.split)} is no name of a split, which a folder of annotations is named after."
            )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the annotations and their shards depend on."""
        payload = json.dumps({**self.description, "rows_per_shard": self.rows_per_shard}, sort_keys=True)
        return hashlib.sha256(payload.encode()).hexdigest()[:8]

    def read_row(self, row: Row) -> Record:
        """Reads a row. One whose prompt is no text becomes an error before any model is asked about it."""
        record = self.read(row)
        check_prompt(record)
        return record

    def open(self, row: Row) -> Record:
        """Reads a row and decodes its images."""
        record = self.read_row(row)
        open_images(record)
        return record

    def annotate(self, records: list[Record]) -> list[Row]:
        """Runs all roles on the records."""
        for role in self.roles:
            role(records)
        return [record.to_row() for record in records]


@dataclass
class Rest:
    """
    The remaining rows of a run, in order.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            A dataset of exactly these rows, or a stream that may also contain finished rows.
        start (`int`, *optional*, defaults to `0`):
            Row number of the first row of the stream.
        done (`frozenset[int]`, *optional*):
            Row numbers of the finished rows of the stream.
    """

    dataset: Dataset | IterableDataset
    start: int = 0
    done: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[Row]:
        return (row for number, row in enumerate(self.dataset, self.start) if number not in self.done)

    def stream_state(self) -> dict | None:
        """State of a stream after the rows read so far, `None` for a dataset in memory."""
        return self.dataset.state_dict() if isinstance(self.dataset, IterableDataset) else None


# Runs the roles of a task on the remaining rows. Yields annotations in the same order, one shard at a time, with the state of
# the stream after it if known.
Executor = Callable[[Task, Rest], Iterator[tuple[list[Row], dict | None]]]


def run(
    dataset: Dataset | IterableDataset,
    task: Task,
    output_dir: str | Path,
    executor: Executor,
    max_error_rate: float = 0.01,
    retry_errors: bool = False,
    num_rows: int | None = None,
    disable_tqdm: bool = False,
) -> "Run":
    """
    Annotates a dataset, or continues an interrupted run.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows, with undecoded images.
        task ([`Task`]):
            The task.
        output_dir (`str` or `Path`):
            Parent of the run's folder.
        executor (`Callable`):
            Function that runs the roles, such as [`annotation.run.run_locally`].
        max_error_rate (`float`, *optional*, defaults to `0.01`):
            Maximum share of rows with errors. Above it, the run stops.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Whether to annotate the shards of an earlier run that contain errors again.
        num_rows (`int`, *optional*):
            Number of rows of a stream, for the progress bar.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`Run`]: the finished run.

    Raises:
        `ValueError`: If too many rows are errors, the disk is full, the dataset is not that of the earlier run, or
            another process works on the same run.
    """
    state = Run(task, output_dir)
    try:
        if retry_errors:
            state.forget(lambda index: bool(state.errors[index]))
        rest = state.rest(dataset)
        if isinstance(dataset, Dataset):
            num_rows = len(dataset)
        with tqdm(
            total=num_rows and num_rows * task.images_per_row,
            initial=state.counts["rows"] * task.images_per_row,
            unit="image",
            desc="Annotating",
            disable=disable_tqdm,
        ) as bar:
            for rows, stream_state in executor(task, rest):
                state.write(rows, stream_state, max_error_rate)
                bar.set_postfix(errors=state.counts["error"], refresh=False)
                bar.update(len(rows) * task.images_per_row)
        state.finish(max_error_rate)
    finally:
        state.lock.release()
    return state


def run_locally(task: Task, rest: Rest) -> Iterator[tuple[list[Row], dict | None]]:
    """Runs the roles in this process. Threads read and decode the next shard in the meantime."""
    rows = iter(rest)

    def read_block() -> tuple[list[Record], dict | None]:
        block = list(islice(rows, task.rows_per_shard))
        stream_state = rest.stream_state()
        return list(decoders.map(task.open, block)), stream_state

    with ThreadPoolExecutor(CORES) as decoders, ThreadPoolExecutor(1) as reader:
        following = reader.submit(read_block)
        while (block := following.result())[0]:
            following = reader.submit(read_block)
            yield task.annotate(block[0]), block[1]


class Run:
    """
    The folder of a run: its shards and its manifest.

    Args:
        task ([`Task`]):
            The task.
        output_dir (`str` or `Path`):
            Parent of the run's folder. The folder is named after the split and the fingerprint of the task, so a
            changed prompt or model starts a new run.

    Raises:
        `ValueError`: If another process works on this run.
    """

    def __init__(self, task: Task, output_dir: str | Path):
        self.task = task
        self.folder = Path(output_dir) / f"{task.split}-{task.fingerprint}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"Another process is annotating into {self.folder}. Wait for it, or stop it.") from error
        self.saved_state = self.folder / STREAM_STATE
        for path in self.folder.glob("*.tmp"):
            path.unlink()  # unfinished files of a killed process
        self.read()

    def read(self) -> None:
        """Reads and counts the existing shards."""
        self.shards: dict[int, list[str]] = {}  # ids of each shard
        self.errors: dict[int, list[tuple[str, str]]] = {}  # id and reason of the errors of each shard
        self.counts: Counter[str] = Counter(dict.fromkeys(("rows", *STATUSES), 0))
        self.seen: set[str] = set()
        manifest = self.folder / MANIFEST
        self.complete = manifest.exists() and json.loads(manifest.read_text())["complete"]
        for path in sorted(self.folder.glob("annotations-*.parquet")):
            self.add(int(path.stem.removeprefix("annotations-")), pq.read_table(path).to_pylist())

    def path(self, index: int) -> Path:
        """The file of a shard."""
        return self.folder / f"annotations-{index:06d}.parquet"

    def next_index(self) -> int:
        """Index of the first missing shard."""
        return next(index for index in count() if index not in self.shards)

    def add(self, index: int, rows: list[Row]) -> None:
        """Adds a shard to the counts."""
        statuses = [STATUSES[row["status"]] for row in rows]
        self.shards[index] = [row["id"] for row in rows]
        self.errors[index] = [(row["id"], row["reason"]) for row, what in zip(rows, statuses) if what == "error"]
        self.seen.update(row["id"] for row in rows if row["reason"] != REPEATED_ID)
        self.counts.update({"rows": len(rows)})
        self.counts.update(statuses)
        self.counts.update(self.task.count(rows))

    def rest(self, dataset: Dataset | IterableDataset) -> Rest:
        """
        Finds the remaining rows. A stream continues at its saved state, without reading the earlier rows again. A
        finished stream is not read again.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                All rows.

        Returns:
            [`Rest`]

        Raises:
            `ValueError`: If the ids of a dataset in memory are not those in the shards.
        """
        size = self.task.rows_per_shard
        if isinstance(dataset, Dataset):
            # Annotate the last shard again if it is not full and the dataset has grown
            self.forget(lambda index: index * size + len(self.shards[index]) < min((index + 1) * size, len(dataset)))
        elif self.complete:
            return Rest(dataset.take(0))
        done = {index * size + place for index, ids in self.shards.items() for place in range(len(ids))}
        if isinstance(dataset, Dataset):
            present = dataset[self.task.description["columns"]["id"]]
            for index, ids in self.shards.items():
                if ids != [str(value) for value in present[index * size : index * size + len(ids)]]:
                    raise ValueError(
                        f"{self.path(index)} holds annotations of other rows than the dataset now has at this position: "
                        "the rows or their order have changed. Use another `--output_dir`."
                    )
            return Rest(dataset.select([number for number in range(len(dataset)) if number not in done]))
        start = 0
        if self.saved_state.exists():
            saved = json.loads(self.saved_state.read_text())
            if saved["shards"] <= self.next_index():
                start = saved["shards"] * size
                dataset.load_state_dict(saved["state"])
        return Rest(dataset, start, frozenset(done))

    def write(self, rows: list[Row], stream_state: dict | None, max_error_rate: float) -> None:
        """
        Writes the next missing shard, then the manifest.

        Args:
            rows (`list[dict]`):
                Rows of the shard. A row with the id of an earlier row is rejected. A row that does not fit the columns
                becomes an error, which costs the others nothing.
            stream_state (`dict`, *optional*):
                State of the stream after these rows.
            max_error_rate (`float`):
                Maximum share of rows with errors. Above it, the shard is not written.

        Raises:
            `ValueError`: If too many rows are errors, or the disk is full.
        """
        for row in rows:
            if row["id"] in self.seen:
                row.update(status="rejected", reason=REPEATED_ID)
            self.seen.add(row["id"])
        rows, table = to_table(rows, self.task.features.arrow_schema)
        errors = [(row["id"], row["reason"]) for row in rows if row["status"] == "error"]
        num_rows, num_errors = self.counts["rows"] + len(rows), self.counts["error"] + len(errors)
        if num_errors > max_error_rate * max(num_rows, ALLOWANCE_ROWS):
            raise ValueError(
                f"Stopped: {num_errors} of {num_rows} rows are errors, more than `--max_error_rate` "
                f"{max_error_rate:g} allows. {self.counts['rows']} rows are written, and the same command continues after "
                f"them. The last errors:\n{listed(errors)}"
            )
        index = self.next_index()
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        self.write_file(self.path(index), buffer.getvalue())
        self.add(index, [encode_row(row) for row in rows])
        if stream_state is not None:
            state = {"shards": index + 1, "state": stream_state}
            self.write_file(self.saved_state, json.dumps(state).encode())
        self.write_manifest(complete=False)

    def finish(self, max_error_rate: float) -> None:
        """
        Writes the final manifest.

        Args:
            max_error_rate (`float`):
                Maximum share of rows with errors.

        Raises:
            `ValueError`: If more rows are errors.
        """
        self.write_manifest(complete=True)
        if self.counts["error"] > max_error_rate * self.counts["rows"]:
            raise ValueError(
                f"{self.counts['error']} of {self.counts['rows']} rows are errors, more than `--max_error_rate` "
                f"{max_error_rate:g} allows. All rows are written to {self.folder}. Remove the broken rows from the "
                "dataset, annotate the errors again with `--retry_errors`, or accept them with a larger "
                "`--max_error_rate`. The errors:\n"
                f"{listed([error for errors in self.errors.values() for error in errors])}"
            )

    def write_manifest(self, complete: bool) -> None:
        manifest = {
            **self.task.description,
            "rows_per_shard": self.task.rows_per_shard,
            "complete": complete,
            "counts": dict(sorted(self.counts.items())),
            "versions": {package: version(package) for package in PACKAGES},
        }
        self.write_file(self.folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())

    def write_file(self, path: Path, content: bytes) -> None:
        write_file(path, content, safe=f"{self.counts['rows']} rows are written and safe")

    def forget(self, is_wanting: Callable[[int], bool]) -> None:
        """Deletes the shards for whose index `is_wanting` returns `True`, so that their rows are annotated again."""
        if wanting := [index for index in self.shards if is_wanting(index)]:
            self.write_manifest(complete=False)
            self.saved_state.unlink(missing_ok=True)
            for index in wanting:
                self.path(index).unlink()
            self.read()


def listed(errors: list[tuple[str, str]], most: int = 10) -> str:
    """Formats errors, one per line."""
    lines = [f"  {cut(row_id, 100)}: {cut(reason, 600)}" for row_id, reason in errors[-most:]]
    return "\n".join(lines + ([f"  and {len(errors) - most} more"] if len(errors) > most else []))
