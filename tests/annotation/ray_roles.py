# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Roles and a stream for Ray. Every actor imports this module, and each import is paid in every one of them."""

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Features, IterableDataset, Value

from trl_diffusion.annotation.records import STATUSES, Record
from trl_diffusion.annotation.run import Task


PARCELS = 800  # of 200 kB each: twice the size of the object store


class Watched:
    """A role that records its processes, waits for the expected number of them, and kills the first that processes a
    certain record."""

    def __init__(self, role, notes: Path, expected: int = 1, fatal_id: str | None = None):
        self.role = role
        self.notes = notes
        self.expected = expected
        self.fatal_id = fatal_id

    def describe(self) -> dict:
        return self.role.describe()

    def __call__(self, records):
        (self.notes / f"process-{os.getpid()}").touch()
        wait_for(lambda: len(processes(self.notes)) >= self.expected)
        self.role(records)
        killed = self.notes / "killed"
        if self.fatal_id in [record.id for record in records] and not killed.exists():
            killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


def processes(notes: Path) -> set[int]:
    return {int(path.name.removeprefix("process-")) for path in notes.glob("process-*")}


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class Parcel(Record):
    content: bytes = b""
    weight: int = 0

    def to_row(self) -> dict:
        return {"id": self.id, "status": self.status, "reason": self.reason, "weight": self.weight}


def read_parcel(row: dict) -> Parcel:
    return Parcel(row["id"], "", content=row["content"])


class Scales:
    """A role that may be slow, and that fails at a certain record."""

    def __init__(self, broken_by: str | None = None, seconds: float = 0.0):
        self.broken_by = broken_by
        self.seconds = seconds

    def __call__(self, parcels: list[Parcel]) -> None:
        time.sleep(self.seconds)
        for parcel in parcels:
            if parcel.id == self.broken_by:
                raise KeyError(f"the scales broke under parcel {parcel.id}")
            parcel.weight = len(parcel.content) + parcel.content[0]


def weigh(role) -> Task:
    return Task(
        read=read_parcel,
        roles=(role,),
        features=Features(
            id=Value("string"),
            status=ClassLabel(names=list(STATUSES)),
            reason=Value("string"),
            weight=Value("int64"),
        ),
        description={"task": "weigh", "columns": {"id": "id"}},
        count=lambda rows: Counter(weight=sum(row["weight"] for row in rows)),
        split="train",
        rows_per_shard=16,
        images_per_row=1,
    )


def make_parcels(starts: list[int], log: Path, fatal: int | None):
    """Yields parcels and logs them; the first process that reaches a certain one is killed."""
    for start in starts:
        for number in range(start, start + 16):
            first_time = number == fatal and (not log.exists() or number not in read_rows(log))
            with log.open("a") as file:
                print(number, file=file)
            if first_time:
                os.kill(os.getpid(), signal.SIGKILL)
            yield {"id": str(number), "content": bytes([number % 256]) * 200_000}


def stream(log: Path, fatal: int | None = None) -> IterableDataset:
    starts = list(range(0, PARCELS, 16))
    return IterableDataset.from_generator(make_parcels, gen_kwargs={"starts": starts, "log": log, "fatal": fatal})


def read_rows(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]
