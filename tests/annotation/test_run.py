# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import errno
import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from tests.cli.processes import SERVER
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import PAIR_ANNOTATION_FEATURES, STATUSES, pair_columns, prepare_rows
from trl_diffusion.annotation.run import MANIFEST, Run, run, run_locally
from trl_diffusion.annotation.vlm import GenerationError, OutOfQuota
from trl_diffusion.quickstart.oracle import OracleDetector, OracleVLM
from trl_diffusion.quickstart.world import preference_dataset


def world(num_pairs: int = 20, seed: int = 0) -> Dataset:
    return preference_dataset(num_pairs, seed).remove_columns("instances")


def make_task(columns, vlm=None, rows_per_shard: int = 4, split: str = "train", **kwargs):
    vlm = vlm or OracleVLM()
    dataset = {"name": "world", "split": split}
    roles = Planner(vlm, **kwargs), OracleDetector(), Judge(vlm, crop_size=64)
    return instance_task(*roles, dataset, columns, rows_per_shard=rows_per_shard)


def annotate(dataset, folder: Path, vlm=None, rows_per_shard: int = 4, **kwargs) -> Run:
    rows, columns = prepare_rows(dataset, pair_columns)
    return run(rows, make_task(columns, vlm, rows_per_shard), folder, run_locally, **kwargs)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a finished run, except the lock and the state of the stream."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def read(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    annotate(world(), folder)
    return contents(folder)


class Crash(BaseException):
    """Simulates a killed process."""


def test_every_row_comes_out_once_and_in_order(tmp_path):
    """All ids are written in order, in typed Parquet shards of the given size, and counted in the manifest."""
    finished = annotate(world(10), tmp_path)
    assert [path.name for path in sorted(finished.folder.glob("*.parquet"))] == [
        f"annotations-{index:06d}.parquet" for index in range(3)
    ]
    shards = load_dataset(
        "parquet", data_files=str(finished.folder / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert shards.features == PAIR_ANNOTATION_FEATURES
    assert shards["id"] == world(10)["id"]
    manifest = json.loads((finished.folder / MANIFEST).read_text())
    assert manifest["complete"] and manifest["counts"]["rows"] == manifest["counts"]["ok"] == 10
    assert manifest["counts"]["conflicts"] == 5  # 46 % of 10, rounded
    assert manifest["counts"] == dict(finished.counts)
    assert set(manifest) >= {"dataset", "columns", "planner", "detector", "judge", "schema_version", "versions"}
    assert manifest["planner"]["prompt"]["sha256"] and manifest["planner"]["prompt"]["text"]


def test_a_stream_gives_the_same_shards(tmp_path, uninterrupted):
    """Streaming writes the same files."""
    annotate(world().to_iterable_dataset(num_shards=3), tmp_path)
    assert contents(tmp_path) == uninterrupted


class Dying:
    """Ends the process before or after the n-th replacement of a file."""

    def __init__(self, monkeypatch, number: int, after: bool):
        self.number, self.after, self.count, self.replace = number, after, 0, Path.replace
        monkeypatch.setattr(Path, "replace", lambda path, target: self(path, target))

    def __call__(self, path: Path, target: Path):
        self.count += 1
        if self.count == self.number and not self.after:
            raise Crash
        self.replace(path, target)
        if self.count == self.number:
            raise Crash


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 11])
def test_a_run_that_dies_at_a_file_ends_as_one_that_does_not(
    number, after, streaming, tmp_path, monkeypatch, uninterrupted
):
    """An interruption between the writing of shard, stream state and manifest does not change the result."""

    def source():
        return world().to_iterable_dataset(num_shards=2) if streaming else world()

    with monkeypatch.context() as patch:
        Dying(patch, number, after)
        with pytest.raises(Crash):
            annotate(source(), tmp_path)
    annotate(source(), tmp_path)
    assert contents(tmp_path) == uninterrupted


def annotate_in_child(folder: Path, num_pairs: int, streaming: bool):
    dataset = world(num_pairs)
    annotate(dataset.to_iterable_dataset(num_shards=4) if streaming else dataset, folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_twenty_kills(streaming, tmp_path):
    """Runs that are killed twenty times at random moments, and then finish, have the shards of an uninterrupted one."""
    num_pairs, rng, killed = 160, random.Random(0), 0
    expected, folder = tmp_path / "undisturbed", tmp_path / "killed"
    start = time.monotonic()
    assert in_child(expected, num_pairs, streaming, None) == 0
    taken = time.monotonic() - start
    while killed < 20:
        exitcode = in_child(folder, num_pairs, streaming, rng.uniform(0.1, 0.9) * taken)
        assert exitcode in (0, -signal.SIGKILL)  # it may end by itself right before it is killed
        killed += exitcode != 0
        if exitcode == 0:
            assert contents(folder) == contents(expected)
            shutil.rmtree(folder)
    annotate_in_child(folder, num_pairs, streaming)
    assert contents(folder) == contents(expected)
    assert [row["id"] for row in read(folder)] == world(num_pairs)["id"]


def in_child(folder: Path, num_pairs: int, streaming: bool, seconds: float | None) -> int:
    """Annotates in a process of its own, which is killed after some seconds, and returns its exit code."""
    child = SERVER.Process(target=annotate_in_child, args=(folder, num_pairs, streaming))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode


class Asked(OracleVLM):
    """Counts the prompts of plans, and fails for some."""

    def __init__(self, failing: str | None = None):
        self.prompts, self.failing = Counter(), failing

    def describe(self) -> dict:
        return OracleVLM().describe()

    def generate(self, requests):
        self.prompts.update(request.text for request in requests if "Which things" in request.text)
        failing = self.failing and f"\n{self.failing}\n"
        return [
            GenerationError("the server is out") if failing and failing in request.text else answer
            for request, answer in zip(requests, super().generate(requests), strict=True)
        ]


def test_done_rows_are_not_asked_again(tmp_path):
    """A finished run makes no requests, and a longer dataset only those for its new rows."""
    annotate(world(8), tmp_path)
    vlm = Asked()
    annotate(world(8), tmp_path, vlm)
    assert vlm.prompts.total() == 0
    longer = Dataset.from_list([*world(8), *world(4, seed=1)], features=world(1).features)
    finished = annotate(longer, tmp_path, vlm)
    assert vlm.prompts.total() == 4 and finished.counts["rows"] == 12


def test_a_dataset_that_grows(tmp_path):
    """If a dataset grows, an incomplete last shard is annotated again, and the result is that of one run."""
    for number in (6, 10, 10):
        vlm = Asked()
        annotate(world(20).select(range(number)), tmp_path / "grown", vlm)
    assert vlm.prompts.total() == 0
    annotate(world(20).select(range(10)), tmp_path / "at once")
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")


def test_a_finished_stream_is_not_read_again(tmp_path):
    """Repeating the command after the end of a stream reads nothing."""
    read = []

    def rows():
        for row in world(6):
            read.append(row["id"])
            yield row

    for _ in range(2):
        finished = annotate(IterableDataset.from_generator(rows, features=world(1).features), tmp_path)
        assert finished.counts["rows"] == len(read) == 6


def test_a_stream_goes_on_where_it_stood(tmp_path):
    """After an interruption, a stream of several files does not open finished files again."""
    opened = []

    def rows(parts):
        for part in parts:
            opened.append(part)
            yield from world(4, seed=part)

    def stream():
        return IterableDataset.from_generator(rows, gen_kwargs={"parts": list(range(6))}, features=world(1).features)

    class Stopping(OracleVLM):
        asked = 0

        def generate(self, requests):
            self.asked += 1
            if self.asked > 6:  # three shards, planned and judged
                raise Crash
            return super().generate(requests)

    with pytest.raises(Crash):
        annotate(stream(), tmp_path, Stopping())
    opened.clear()
    finished = annotate(stream(), tmp_path)
    assert finished.counts["rows"] == 24 and 0 not in opened and 1 not in opened


def test_a_changed_prompt_or_model_is_another_run(tmp_path):
    """The name of the folder depends on everything that annotations depend on, and on nothing else."""
    _, columns = prepare_rows(world(1), pair_columns)
    prompt = tmp_path / "prompt.md"
    prompt.write_text("Which things do both show? {{ prompt }} {{ max_instances }}")
    base = make_task(columns)

    class OtherVLM(OracleVLM):
        def describe(self):
            return {"model": "other", "revision": "2"}

    others = [
        make_task(columns, prompt_path=prompt),
        make_task(columns, vlm=OtherVLM()),
        make_task(columns, max_instances=3),
        make_task(columns, rows_per_shard=5),
    ]
    assert len({task.fingerprint for task in [base, *others]}) == 5
    assert make_task(columns).fingerprint == base.fingerprint
    Run(base, tmp_path).lock.release()
    assert Run(make_task(columns, split="test"), tmp_path).folder.name.startswith("test-")


def test_another_dataset_in_the_same_place_is_refused(tmp_path):
    """A dataset with other ids than the finished rows is refused."""
    annotate(world(8), tmp_path)
    with pytest.raises(ValueError, match="holds annotations of other rows"):
        annotate(world(8).select(range(7, -1, -1)), tmp_path)


def test_an_id_that_comes_twice_is_rejected_the_second_time(tmp_path):
    """Rows with a repeated id are all written, and only the first is ok, across shards and restarts."""
    dataset = world(10)
    doubled = dataset.select([0, 1, 1, 2, 3, 4, 5, 0, 6])
    annotate(doubled.select(range(6)), tmp_path / "a", rows_per_shard=3)
    for folder in ("a", "b"):
        finished = annotate(doubled, tmp_path / folder, rows_per_shard=3)
        assert [row["id"] for row in read(tmp_path / folder)] == doubled["id"]
        rejected = [row for row in read(tmp_path / folder) if STATUSES[row["status"]] == "rejected"]
        assert [row["id"] for row in rejected] == [dataset["id"][1], dataset["id"][0]]
        assert {row["reason"] for row in rejected} == {"the id stands in an earlier row"}
        assert finished.counts["rejected"] == 2 and finished.counts["instances"] == 14


def test_a_repeated_id_whose_first_row_is_an_error(tmp_path):
    """When an error is annotated again, the later row with its id stays rejected."""
    dataset = world(5)
    doubled = dataset.select([0, 1, 2, 3, 0, 4])
    with pytest.raises(ValueError, match="rows are errors"):
        annotate(doubled, tmp_path, Asked(failing=dataset["prompt"][0]))
    finished = annotate(doubled, tmp_path, retry_errors=True)
    assert finished.counts["error"] == 0 and finished.counts["rejected"] == 1
    assert [STATUSES[row["status"]] for row in read(tmp_path)] == ["ok", "ok", "ok", "ok", "rejected", "ok"]


def test_errors_are_rows_with_a_reason_and_a_limit(tmp_path):
    """Errors are rows; an error rate above the limit fails the run with a list of errors, and no row is lost."""
    dataset = world(12)
    vlm = Asked(failing=dataset["prompt"][5])
    failing = [row["id"] for row in dataset if row["prompt"] == vlm.failing]
    with pytest.raises(ValueError, match=f"{len(failing)} of 12 rows are errors") as error:
        annotate(dataset, tmp_path, vlm)
    assert "--retry_errors" in str(error.value) and f"{failing[0]}: planner: the server is out" in str(error.value)
    assert [row["id"] for row in read(tmp_path) if STATUSES[row["status"]] == "error"] == failing
    assert annotate(dataset, tmp_path, vlm, max_error_rate=1).counts["error"] == len(failing)
    # When the server works again
    healthy = Asked()
    finished = annotate(dataset, tmp_path, healthy, retry_errors=True)
    assert finished.counts["error"] == 0 and finished.counts["ok"] == 12
    assert healthy.prompts.total() == 4 * len({dataset["id"].index(row_id) // 4 for row_id in failing})
    annotate(dataset, tmp_path / "fresh")
    assert contents(tmp_path / "fresh") == contents(tmp_path.joinpath(finished.folder.name))


def test_a_run_that_goes_wrong_stops_before_it_writes(tmp_path):
    """If everything fails, the run stops within its first rows; later, the same command annotates all of them."""
    dataset = world(60)

    class Dead(OracleVLM):
        def generate(self, requests):
            return [GenerationError("connection refused")] * len(requests)

    with pytest.raises(ValueError, match="Stopped: 12 of 12 rows are errors.* 8 rows are written") as error:
        annotate(dataset, tmp_path, Dead())
    assert "connection refused" in str(error.value)
    assert len(read(tmp_path)) == 8
    assert annotate(dataset, tmp_path, retry_errors=True).counts["ok"] == 60


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch, uninterrupted):
    """If the disk is full, the run stops with an error, keeps its shards, and continues when there is space."""
    replace, written = Path.replace, []

    def full(path, target):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(
            ValueError, match="No space left on device. 12 rows are written and safe. Free some disk space"
        ):
            annotate(world(), tmp_path)
    assert len(read(tmp_path)) == 12 and not list(tmp_path.rglob("*.tmp"))
    annotate(world(), tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_one_process_a_run(tmp_path):
    """A second process for the same run is refused, but not for another run."""
    _, columns = prepare_rows(world(1), pair_columns)
    held = Run(make_task(columns), tmp_path)
    with pytest.raises(ValueError, match="Another process is annotating"):
        Run(make_task(columns), tmp_path)
    Run(make_task(columns, max_instances=1), tmp_path).lock.release()
    held.lock.release()
    Run(make_task(columns), tmp_path).lock.release()


def test_a_mistake_in_the_code_is_not_an_error_row(tmp_path):
    """An exception in a role stops the run with its own message."""

    class Broken(OracleVLM):
        def generate(self, requests):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        annotate(world(4), tmp_path, Broken())


def test_a_row_without_an_id_is_named(tmp_path):
    """An empty id stops the run."""
    rows = [dict(row) for row in world(3)]
    rows[1]["id"] = None
    with pytest.raises(ValueError, match="A row has no `id`"):
        annotate(Dataset.from_list(rows, features=world(1).features), tmp_path)


ODD_PROMPTS = [
    (7, "7", "the prompt is no text but int: 7"),
    (2.5, "2.5", "the prompt is no text but float: 2.5"),
    (["a", "b"], "['a', 'b']", "the prompt is no text but list: ['a', 'b']"),
    ({"en": "a cat"}, "{'en': 'a cat'}", "the prompt is no text but dict: {'en': 'a cat'}"),
    (b"a cat", "b'a cat'", "the prompt is no text but bytes: b'a cat'"),
    ("half of \ud83d", "half of ?", "the prompt is no valid text: it holds single surrogates"),
]


@pytest.mark.parametrize("prompt, written, reason", ODD_PROMPTS)
def test_a_prompt_that_is_no_text_costs_one_row(prompt, written, reason, tmp_path):
    """In a shard with such a prompt, its row is an error with the reason, no model is asked about it, and the others are as
    without it."""
    rows = [dict(row) for row in world(4)]
    fine = annotate(world(4), tmp_path / "fine").folder
    rows[2]["prompt"] = prompt
    vlm = Asked()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    finished = annotate(stream, tmp_path / "odd", vlm, max_error_rate=1)
    assert finished.counts["rows"] == 4 and finished.counts["error"] == 1 and vlm.prompts.total() == 3
    annotated, expected = read(finished.folder), read(fine)
    assert annotated[2]["prompt"] == written and annotated[2]["reason"].startswith(reason)
    assert annotated[2]["instances"] == []
    assert [row for i, row in enumerate(annotated) if i != 2] == [row for i, row in enumerate(expected) if i != 2]


@pytest.mark.parametrize("prompt", ["", "a\0b", "x" * 3_000_000, "a cat\n\twith 犬 and 🐶"])
def test_unusual_prompts_are_written(prompt, tmp_path):
    """Empty prompts, long ones, and those with NUL or of other scripts are written as they are."""
    rows = [{**row, "prompt": prompt} for row in world(2)]

    class Silent(OracleVLM):
        def generate(self, requests):
            return ['{"instances": []}' for request in requests]

    dataset = Dataset.from_list(rows, features=world(1).features)
    finished = annotate(dataset, tmp_path, Silent())
    assert finished.counts["ok"] == 2 and [row["prompt"] for row in read(tmp_path)] == [prompt] * 2


ODD_VALUES = [
    ("planner_answer", "half of \ud83d", "half of ?", "planner_answer: "),
    ("planner_answer", 5, "5", "planner_answer: "),
    ("chosen_uid", 12, "12", "chosen_uid: "),
    ("labels", None, None, None),  # not written
    ("dropped", [{"label": 3, "reason": "x"}], None, "dropped: "),
    ("tie", "maybe", None, "tie: "),
]


@pytest.mark.parametrize("name, value, written, reason", ODD_VALUES)
def test_a_row_that_cannot_be_written_costs_no_other(name, value, written, reason, tmp_path):
    """A row whose values do not fit the columns is an error that names the column, with the rest of it; the other rows of its
    shard keep their answers."""

    def spoil(records):
        setattr(records[1], name, value)

    rows, columns = prepare_rows(world(4), pair_columns)
    task = make_task(columns)
    spoiled = replace(task, roles=(*task.roles, spoil))
    finished = run(rows, spoiled, tmp_path / "odd", run_locally, max_error_rate=1)
    annotated = read(finished.folder)
    expected = read(run(rows, task, tmp_path / "fine", run_locally).folder)
    if reason is None:
        assert annotated == expected
        return
    assert STATUSES[annotated[1]["status"]] == "error" and finished.counts["error"] == 1
    assert annotated[1]["reason"].startswith(f"the row cannot be written: {reason}")
    assert annotated[1][name] == written and annotated[1]["instances"] == []
    assert annotated[1]["id"] == expected[1]["id"] and annotated[1]["prompt"] == expected[1]["prompt"]
    assert [annotated[0], *annotated[2:]] == [expected[0], *expected[2:]]


def test_a_stop_of_the_server_costs_no_rows(tmp_path):
    """When a quota is used up, the run stops with the server's words, whatever `max_error_rate` allows; no row is an error,
    and the same command continues."""
    dataset = world(12)

    class Poor(Asked):
        def generate(self, requests):
            if self.prompts.total() >= 8 and "Which things" in requests[0].text:
                return [OutOfQuota("the server answers 402: no money")] * len(requests)
            return super().generate(requests)

    with pytest.raises(
        ValueError, match="^Stopped: the server answers 402: no money. Once that is settled, the same command"
    ):
        annotate(dataset, tmp_path, Poor(), max_error_rate=1)
    assert [STATUSES[row["status"]] for row in read(tmp_path)] == ["ok"] * 8
    assert annotate(dataset, tmp_path).counts["ok"] == 12
