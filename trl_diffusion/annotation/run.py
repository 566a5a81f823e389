# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The run: a dataset in, Parquet shards out, and after a stop the same command again.

A shard holds the annotations of `rows_per_shard` rows in the order of the dataset, and is there whole or not at all. What is
in it follows from the rows and from what the manifest describes, so a run that was stopped ends as one that was not.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..batching import CORES
from ..files import write_file
from .records import STATUSES, Record, encode_row, open_images


MANIFEST = "manifest.json"
STREAM_STATE = ".stream_state.json"
PACKAGES = ("trl-diffusion", "transformers", "datasets", "torch", "pillow")
REPEATED_ID = "the id stands in an earlier row"
ALLOWANCE_ROWS = 1000  # before that many rows are done, the rate of errors is counted as if they were

Row = dict[str, Any]
Role = Callable[[list[Record]], list[Record]]


@dataclass(frozen=True)
class Task:
    """
    What a run does with rows.

    Args:
        read (`Callable`):
            From a row of the dataset to a record.
        roles (`tuple`):
            The roles, in their order: each takes records, and fills them in.
        features ([`~datasets.Features`]):
            Columns of the annotations.
        description (`dict`):
            Everything that the annotations depend on. Runs with the same description continue one another.
        count (`Callable`):
            From rows of annotations to figures of the manifest.
        split (`str`):
            Name of the split, for the run's folder.
        rows_per_shard (`int`):
            Rows of a shard.
        images_per_row (`int`):
            For the progress bar.
    """

    read: Callable[[Row], Record]
    roles: tuple[Role, ...]
    features: Features
    description: dict[str, Any]
    count: Callable[[list[Row]], Counter]
    split: str
    rows_per_shard: int
    images_per_row: int

    @property
    def fingerprint(self) -> str:
        """Hash of what the annotations and their shards depend on."""
        payload = json.dumps({**self.description, "rows_per_shard": self.rows_per_shard}, sort_keys=True)
        return hashlib.sha256(payload.encode()).hexdigest()[:8]

    def open(self, row: Row) -> Record:
        """Reads a row and decodes its images."""
        record = self.read(row)
        open_images(record)
        return record

    def annotate(self, records: list[Record]) -> list[Row]:
        """Takes records through all roles."""
        for role in self.roles:
            role(records)
        return [record.to_row() for record in records]


@dataclass
class Rest:
    """
    The rows that are left to a run, in their order.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            A dataset of just these rows, or a stream that has others too.
        start (`int`, *optional*, defaults to `0`):
            Number of the stream's first row.
        done (`frozenset[int]`, *optional*):
            Numbers of the stream's rows that are done.
    """

    dataset: Dataset | IterableDataset
    start: int = 0
    done: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[Row]:
        return (row for number, row in enumerate(self.dataset, self.start) if number not in self.done)

    def stream_state(self) -> dict | None:
        """Where a stream stands after the rows read so far."""
        return self.dataset.state_dict() if isinstance(self.dataset, IterableDataset) else None


# What runs the roles: from a task and the rows that are left to their annotations, in the same order, a shard at a time,
# each with where the stream stands after it if that is known.
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
    Annotates a dataset, or what is left of it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows, with their images undecoded.
        task ([`Task`]):
            What is done.
        output_dir (`str` or `Path`):
            Where the run's folder goes.
        executor (`Callable`):
            What runs the roles, such as [`annotation.run.run_locally`].
        max_error_rate (`float`, *optional*, defaults to `0.01`):
            Share of error rows at which the run stops.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Annotate again what an earlier run left as errors, with the other rows of its shard.
        num_rows (`int`, *optional*):
            How many rows a stream has, for the progress bar.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress bar.

    Returns:
        [`Run`]: the finished run.

    Raises:
        `ValueError`: If too many rows are errors, the disk is full, the dataset is not the one of the earlier run, or
            another process is at the same run.
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
    """Runs the roles in this process, while threads read and decode the rows of the next shard."""
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
            What is done.
        output_dir (`str` or `Path`):
            Where the run's folder goes; it is called after the split and the task's fingerprint, so that a changed prompt or
            model is a run of its own.

    Raises:
        `ValueError`: If another process is at this run.
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
            path.unlink()  # what a killed process was writing
        self.read()

    def read(self) -> None:
        """Counts the shards that are there."""
        self.shards: dict[int, list[str]] = {}  # the ids of each shard
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
        """Number of the first shard that is not there."""
        return next(index for index in count() if index not in self.shards)

    def add(self, index: int, rows: list[Row]) -> None:
        """Counts a shard in."""
        statuses = [STATUSES[row["status"]] for row in rows]
        self.shards[index] = [row["id"] for row in rows]
        self.errors[index] = [(row["id"], row["reason"]) for row, what in zip(rows, statuses) if what == "error"]
        self.seen.update(row["id"] for row in rows if row["reason"] != REPEATED_ID)
        self.counts.update({"rows": len(rows)})
        self.counts.update(statuses)
        self.counts.update(self.task.count(rows))

    def rest(self, dataset: Dataset | IterableDataset) -> Rest:
        """
        What is left to do. A stream goes on where it stood, without reading what came before; one that was read to its end is
        not read again.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                All rows.

        Returns:
            [`Rest`]

        Raises:
            `ValueError`: If the dataset's ids are not those of the shards.
        """
        size = self.task.rows_per_shard
        if isinstance(dataset, Dataset):
            # A last shard that was not full, in a dataset that has grown since
            self.forget(lambda index: index * size + len(self.shards[index]) < min((index + 1) * size, len(dataset)))
        elif self.complete:
            return Rest(dataset.take(0))
        done = {index * size + place for index, ids in self.shards.items() for place in range(len(ids))}
        if isinstance(dataset, Dataset):
            present = dataset[self.task.description["columns"]["id"]]
            for index, ids in self.shards.items():
                if ids != [str(value) for value in present[index * size : index * size + len(ids)]]:
                    raise ValueError(
                        f"{self.path(index)} holds annotations of other rows than the dataset has in that place now: its "
                        "rows or their order have changed. Annotate it into another `--output_dir`."
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
                Its rows. One whose id was there before is rejected.
            stream_state (`dict`, *optional*):
                Where the stream stands after them.
            max_error_rate (`float`):
                Share of error rows at which nothing more is written.

        Raises:
            `ValueError`: If too many rows are errors, or the disk is full.
        """
        for row in rows:
            if row["id"] in self.seen:
                row.update(status="rejected", reason=REPEATED_ID)
            self.seen.add(row["id"])
        encoded = [encode_row(row) for row in rows]
        errors = [(row["id"], row["reason"]) for row in rows if row["status"] == "error"]
        num_rows, num_errors = self.counts["rows"] + len(rows), self.counts["error"] + len(errors)
        if num_errors > max_error_rate * max(num_rows, ALLOWANCE_ROWS):
            raise ValueError(
                f"Stopped: {num_errors} of {num_rows} rows are errors, more than `--max_error_rate` "
                f"{max_error_rate:g} allows. {self.counts['rows']} rows are written, and the same command goes on after them. "
                f"The last errors:\n{listed(errors)}"
            )
        index = self.next_index()
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(encoded, schema=self.task.features.arrow_schema), buffer)
        self.write_file(self.path(index), buffer.getvalue())
        self.add(index, encoded)
        if stream_state is not None:
            state = {"shards": index + 1, "state": stream_state}
            self.write_file(self.saved_state, json.dumps(state).encode())
        self.write_manifest(complete=False)

    def finish(self, max_error_rate: float) -> None:
        """
        Writes the finished manifest.

        Args:
            max_error_rate (`float`):
                Share of error rows that is allowed.

        Raises:
            `ValueError`: If more are errors.
        """
        self.write_manifest(complete=True)
        if self.counts["error"] > max_error_rate * self.counts["rows"]:
            raise ValueError(
                f"{self.counts['error']} of {self.counts['rows']} rows are errors, more than `--max_error_rate` "
                f"{max_error_rate:g} allows. All rows are written to {self.folder}. Drop the broken rows from the dataset, "
                "annotate the errors again with `--retry_errors`, or accept them with a larger `--max_error_rate`:\n"
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
        """Removes the shards of which this holds, by their numbers, so that their rows are missing."""
        if wanting := [index for index in self.shards if is_wanting(index)]:
            self.write_manifest(complete=False)
            self.saved_state.unlink(missing_ok=True)
            for index in wanting:
                self.path(index).unlink()
            self.read()


def listed(errors: list[tuple[str, str]], most: int = 10) -> str:
    """Errors as lines."""
    lines = [f"  {row_id}: {reason}" for row_id, reason in errors[-most:]]
    return "\n".join(lines + ([f"  and {len(errors) - most} more"] if len(errors) > most else []))
