# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A run annotates a dataset and writes Parquet shards. After an interruption, the same command continues it.

A shard holds the annotations of `rows_per_shard` rows in the order of the dataset, and is written completely or not at
all. Its content depends only on the rows and on what the manifest describes, so an interrupted run has the same
result.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset
from tqdm.auto import tqdm

from ..batching import CORES, in_threads
from ..checksums import DamagedFile, read_json, write_json, write_table
from ..files import hold, write_file
from ..messages import cut
from ..safe_names import check_part_of_path
from .records import INPUTS, Record, check_prompt, inputs_of, open_images
from .shards import MANIFEST, RUN, SHARD, fingerprint_of, manifest_of, read_shard
from .tables import STATUSES, encode_row, to_table


logger = logging.getLogger(__name__)

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

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the annotations and their shards depend on."""
        return fingerprint_of(self.description | {"rows_per_shard": self.rows_per_shard})

    def read_row(self, row: Row) -> Record:
        """Reads a row. One whose prompt is no text becomes an error before any model is asked about it."""
        record = self.read(row)
        check_prompt(record)
        record.inputs = inputs_of(record)
        return record

    def inputs_of(self, row: Row) -> tuple[str, str]:
        """The id of a row, and what its annotation is made of. Its images are not kept in memory."""
        record = self.read_row(row)
        return record.id, record.inputs

    def open(self, row: Row) -> Record:
        """Reads a row and decodes its images."""
        record = self.read_row(row)
        open_images(record)
        return record

    def annotate(self, records: list[Record]) -> list[Row]:
        """Runs all roles on the records."""
        for role in self.roles:
            role(records)
        return [finished_row(record) for record in records]


def finished_row(record: Record) -> Row:
    """The row to write of a record, and what it was made of."""
    return record.to_row() | {INPUTS: record.inputs}


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
    read_again: bool = False,
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
        read_again (`bool`, *optional*, defaults to `False`):
            Whether to read the finished rows of a stream again, as those of a dataset in memory, to find those that have changed.

    Returns:
        [`Run`]: the finished run.

    Raises:
        `ValueError`: If too many rows are errors, the disk is full, the dataset is not that of the earlier run, or
            another process works on the same run.
    """
    state = Run(task, output_dir)
    try:
        if retry_errors:
            state.forget([index for index, errors in state.errors.items() if errors])
        rest = state.rest(dataset, read_again)
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
        self.folder = Path(output_dir) / f"{check_part_of_path(task.split, 'split')}-{task.fingerprint}"
        self.lock = hold(self.folder, "annotating")
        self.saved_state = self.folder / STREAM_STATE
        for path in self.folder.glob("*.tmp"):
            path.unlink()  # unfinished files of a killed process
        self.read()

    def read(self) -> None:
        """Reads and counts the existing shards. Those that are not as they were written are named, and count as missing."""
        self.shards: dict[int, list[str]] = {}  # ids of each shard
        self.inputs: dict[int, list[str]] = {}  # what its rows were made of
        self.errors: dict[int, list[tuple[str, str]]] = {}  # id and reason of the errors of each shard
        self.counts: Counter[str] = Counter(dict.fromkeys(("rows", *STATUSES), 0))
        self.seen: set[str] = set()
        for path in sorted(self.folder.glob("annotations-*.parquet")):
            try:
                table = read_shard(path, self.task.fingerprint)
            except DamagedFile as error:
                logger.warning(f"{error}: its rows are annotated again.")
                continue
            inputs = json.loads(table.schema.metadata[INPUTS.encode()])
            self.add(int(path.stem.removeprefix("annotations-")), table.to_pylist(), inputs)
        # A damaged or missing shard makes a run incomplete that was not
        manifest = manifest_of(self.folder)
        self.complete = manifest.get("complete") is True and manifest.get("counts") == dict(self.counts)

    def path(self, index: int) -> Path:
        """The file of a shard."""
        return self.folder / f"annotations-{index:06d}.parquet"

    def next_index(self) -> int:
        """Index of the first missing shard."""
        return next(index for index in count() if index not in self.shards)

    def add(self, index: int, rows: list[Row], inputs: list[str]) -> None:
        """Adds a shard to the counts."""
        self.inputs[index] = inputs
        statuses = [STATUSES[row["status"]] for row in rows]
        self.shards[index] = [row["id"] for row in rows]
        self.errors[index] = [(row["id"], row["reason"]) for row, what in zip(rows, statuses) if what == "error"]
        self.seen.update(row["id"] for row in rows if row["reason"] != REPEATED_ID)
        self.counts.update({"rows": len(rows)})
        self.counts.update(statuses)
        self.counts.update(self.task.count(rows))

    def rest(self, dataset: Dataset | IterableDataset, read_again: bool = False) -> Rest:
        """
        Finds the remaining rows. Shards of rows whose prompt or images have changed since are annotated again. A stream continues
        at its saved state, without reading the earlier rows again, unless this is asked for. A finished stream is not read again.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                All rows.
            read_again (`bool`, *optional*, defaults to `False`):
                Whether to read the finished rows of a stream again.

        Returns:
            [`Rest`]

        Raises:
            `ValueError`: If the ids of the dataset are not those in the shards.
        """
        size = self.task.rows_per_shard
        if isinstance(dataset, Dataset):
            # Annotate the last shard again if it is not full and the dataset has grown
            self.forget(
                [i for i, ids in self.shards.items() if i * size + len(ids) < min((i + 1) * size, len(dataset))]
            )
        if isinstance(dataset, Dataset) or read_again:
            self.forget_changed(dataset)
        if isinstance(dataset, IterableDataset) and self.complete:
            return Rest(dataset.take(0))
        done = {index * size + place for index, ids in self.shards.items() for place in range(len(ids))}
        if isinstance(dataset, Dataset):
            return Rest(dataset.select([number for number in range(len(dataset)) if number not in done]))
        start = 0
        try:
            saved = read_json(self.saved_state) if self.saved_state.exists() else None
        except DamagedFile as error:
            logger.warning(f"{error}: the stream is read from its beginning.")
            saved = None
        if saved and saved["shards"] <= self.next_index():
            start = saved["shards"] * size
            dataset.load_state_dict(saved["state"])
        return Rest(dataset, start, frozenset(done))

    def forget_changed(self, dataset: Dataset | IterableDataset) -> None:
        """
        Reads the rows of all shards, and forgets the shards of which a row is not what was annotated.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                All rows.

        Raises:
            `ValueError`: If the ids of the dataset are not those in the shards.
        """
        size, changed, stream = self.task.rows_per_shard, {}, iter(dataset)
        for index in range(max(self.shards, default=-1) + 1):
            ids = self.shards.get(index)
            if isinstance(dataset, Dataset):
                rows = dataset.select(range(index * size, min(index * size + len(ids), len(dataset)))) if ids else []
            else:
                rows = list(islice(stream, size))
            if not ids:
                continue
            found = in_threads(self.task.inputs_of, rows)
            if ids != [row_id for row_id, _ in found]:
                raise ValueError(
                    f"{self.path(index)} holds annotations of other rows than the dataset now has at this position: "
                    "the rows or their order have changed. Use another `--output_dir`."
                )
            others = [row_id for (row_id, inputs), known in zip(found, self.inputs[index]) if inputs != known]
            changed |= {index: others} if others else {}
        if changed:
            ids = [row_id for others in changed.values() for row_id in others]
            logger.warning(
                f"Prompts or images have changed since they were annotated, in {len(ids):,} rows, such as {', '.join(ids[:5])}: the "
                f"shards of these rows, {len(changed):,} in all, are annotated again."
            )
            self.forget(list(changed))

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
        inputs = [row.pop(INPUTS) for row in rows]
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
        origin = {INPUTS: json.dumps(inputs), SHARD: self.path(index).name, RUN: self.task.fingerprint}
        table = table.replace_schema_metadata(table.schema.metadata | origin)
        write_table(self.path(index), table, self.safe)
        self.add(index, [encode_row(row) for row in rows], inputs)
        if stream_state is not None:
            write_json(self.saved_state, {"shards": index + 1, "state": stream_state}, self.safe)
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
        write_file(self.folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode(), self.safe)

    @property
    def safe(self) -> str:
        """What a failure does not affect."""
        return f"{self.counts['rows']} rows are written and safe"

    def forget(self, wanting: list[int]) -> None:
        """Deletes shards, so that their rows are annotated again."""
        if wanting:
            self.write_manifest(complete=False)
            self.saved_state.unlink(missing_ok=True)
            for index in wanting:
                self.path(index).unlink()
            self.read()


def listed(errors: list[tuple[str, str]], most: int = 10) -> str:
    """Formats errors, one per line."""
    lines = [f"  {cut(row_id, 100)}: {cut(reason, 600)}" for row_id, reason in errors[-most:]]
    return "\n".join(lines + ([f"  and {len(errors) - most} more"] if len(errors) > most else []))
