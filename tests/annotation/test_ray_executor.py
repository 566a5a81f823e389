# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.annotation.ray_roles import (
    PARCELS,
    Scales,
    Watched,
    processes,
    read_parcel,
    read_rows,
    stream,
    wait_for,
    weigh,
)
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.ray_executor import RayExecutor, Reader, RoleWorker, gpu_share, pack, portable, unpack
from trl_diffusion.annotation.records import STATUSES, pair_columns, prepare_rows
from trl_diffusion.annotation.run import Rest, Run, run, run_locally
from trl_diffusion.quickstart.oracle import OracleDetector, OracleSegmenter, OracleVLM
from trl_diffusion.quickstart.world import preference_dataset


# Every actor imports torch, which takes seconds, so several tests share a run, and roles are in a module of few imports.

OBJECT_STORE = 80_000_000  # bytes, about the minimum of Ray


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2,
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={
            "worker_niceness": 0
        },  # else its processes, for which these tests wait, give way to all others
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},  # for this module's roles
    )
    yield
    ray.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a finished run, except its lock and the state of the stream."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def read(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_ray_that_is_not_installed_is_asked_for(monkeypatch):
    """Without Ray, the error names what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install "trl-diffusion\[ray\]"'):
        RayExecutor()


@pytest.mark.parametrize(
    ("actors", "gpus", "share"), [(3, 0, 0), (3, 1, 1 / 3), (3, 2, 1 / 2), (3, 3, 1), (3, 8, 1), (9, 8, 1 / 2)]
)
def test_actors_share_the_gpus(actors, gpus, share):
    """An actor gets a whole GPU, or 1 / n of one for the smallest n for which all fit."""
    assert gpu_share(actors, gpus) == share
    assert share == 0 or gpus * int(1 / share) >= actors


@pytest.mark.parametrize(
    ("options", "gpus", "pools"),
    [
        ({}, 0, [(1, 0), (1, 0), (1, 0)]),
        ({}, 1, [(1, 1 / 3), (1, 1 / 3), (1, 1 / 3)]),
        ({"vlm_actors": 2, "detector_actors": 3}, 8, [(2, 1), (3, 1), (2, 1)]),
        ({"vlm_gpus": 0}, 1, [(1, 0), (1, 1), (1, 0)]),
        ({"vlm_gpus": 0.4, "detector_gpus": 0.2}, 1, [(1, 0.4), (1, 0.2), (1, 0.4)]),
        ({"vlm_gpus": 2}, 4, [(1, 2), (1, 1), (1, 2)]),
    ],
)
def test_roles_have_their_pools(options, gpus, pools, caplog):
    """Planner, detector and judge get actors and GPUs according to the options, with a warning if there are too few
    GPUs."""
    pytest.importorskip("ray")
    vlm = OracleVLM()
    assert RayExecutor(**options).pools((Planner(vlm), OracleDetector(), Judge(vlm)), gpus) == pools
    warned = [record.message for record in caplog.records]
    assert len(warned) == (sum(actors * each for actors, each in pools) > gpus + 1e-9)
    assert not warned or "request 5 GPUs, but the cluster has 4" in warned[0]


# ----- pairs, and the roles of IAPO -----


POISON = {
    5: {"bytes": b"", "path": None},
    17: {"bytes": b"GIF89a, or so it says", "path": None},
    18: {"bytes": None, "path": "/no/such/file.png"},
}


@pytest.fixture(scope="module")
def pairs(cluster, tmp_path_factory) -> tuple[Run, Run, Path]:
    """A local run, a run with Ray in which a process is killed, and the records about that process."""
    notes = tmp_path_factory.mktemp("notes")
    dataset, columns = prepare_rows(preference_dataset(60, 0), pair_columns)
    dataset = dataset.map(lambda row, number: {"chosen": POISON.get(number, row["chosen"])}, with_indices=True)
    vlm = OracleVLM()
    planner, judge = Planner(vlm), Judge(vlm, crop_size=64)

    def annotate(detector, name: str, executor) -> Run:
        task = instance_task(planner, detector, judge, {"name": "world", "split": "train"}, columns, rows_per_shard=8)
        return run(dataset, task, tmp_path_factory.mktemp(name), executor, max_error_rate=0.1)

    local = annotate(OracleDetector(), "local", run_locally)
    return local, annotate(Watched(OracleDetector(), notes, fatal_id=dataset["id"][30]), "ray", RayExecutor()), notes


def test_a_segmenter_has_its_own_pool():
    """The segmenter has its own actors and GPUs, and shares the GPUs with the others by default."""
    pytest.importorskip("ray")
    vlm = OracleVLM()
    roles = Planner(vlm), OracleDetector(), OracleSegmenter(), Judge(vlm)
    assert RayExecutor().pools(roles, 1) == [(1, 1 / 4)] * 4
    options = {"vlm_gpus": 1, "detector_gpus": 0, "segmenter_actors": 2, "segmenter_gpus": 0.5}
    assert RayExecutor(**options).pools(roles, 4) == [(1, 1), (1, 0), (2, 0.5), (1, 1)]


def test_masks_are_those_of_a_local_run(cluster, tmp_path):
    """With a segmenter in its own process, shards and manifest are those of a local run."""
    rows, columns = prepare_rows(preference_dataset(12, 0), pair_columns)
    vlm, source = OracleVLM(), {"name": "world", "split": "train"}
    roles = Planner(vlm), OracleDetector(), Judge(vlm, crop_size=64)
    task = instance_task(*roles, source, columns, rows_per_shard=4, segmenter=OracleSegmenter())
    local, remote = (run(rows, task, tmp_path / name, how) for name, how in (("a", run_locally), ("b", RayExecutor())))
    assert read(remote.folder) == read(local.folder) and remote.counts == local.counts
    assert remote.counts["masks"] == 48


def test_shards_and_manifest_are_those_of_a_local_run(pairs):
    """Both executors write the same bytes."""
    local, ray, _ = pairs
    assert len(contents(local.folder)) == 9
    assert ray.folder.name == local.folder.name
    assert contents(ray.folder) == contents(local.folder)


def test_the_batch_of_a_killed_process_is_done_again(pairs):
    """A killed process is replaced, and every row is written once and in order."""
    _, ray, notes = pairs
    killed = int((notes / "killed").read_text())
    assert len(processes(notes)) == 2 and killed in processes(notes)
    assert [row["id"] for row in read(ray.folder)] == [f"world-0-{number:05d}" for number in range(60)]
    assert ray.counts["ok"] == 60 - len(POISON) and ray.counts["instances"] > 0


def test_images_that_cannot_be_read_are_errors(pairs):
    """Exactly the rows with empty, invalid and missing images are errors, with a reason."""
    errors = {number: row["reason"] for number, row in enumerate(read(pairs[1].folder)) if row["status"] == 2}
    assert STATUSES[2] == "error" and sorted(errors) == sorted(POISON)
    assert "expected an image" in errors[5]
    assert "not an image that can be read" in errors[17]
    assert "No such file" in errors[18]


# ----- a stream that is larger than Ray's memory, and a role that weighs -----


class Stop(Exception):
    pass


@dataclass
class StoppedRun:
    """A run that was interrupted locally after 10 shards, and with Ray and two actors after 10 more."""

    folder: Path
    notes: Path
    read_at_first_shard: list[int]


@pytest.fixture(scope="module")
def stopped(cluster, tmp_path_factory) -> StoppedRun:
    notes, folder = tmp_path_factory.mktemp("notes"), tmp_path_factory.mktemp("stopped")
    progress = []

    def ten_shards(executor):
        def stop(task, rest):
            for number, shard in enumerate(executor(task, rest)):
                progress.append(read_rows(notes / "log"))
                if number == 10:
                    raise Stop
                yield shard

        return stop

    for executor, role in (
        (run_locally, Scales()),
        (RayExecutor(vlm_actors=2), Watched(Scales(seconds=0.05), notes, expected=2)),
    ):
        (notes / "log").unlink(missing_ok=True)
        progress.clear()
        with pytest.raises(Stop):
            run(stream(notes / "log"), weigh(role), folder, ten_shards(executor))
    return StoppedRun(folder, notes, progress[0])


def test_a_stream_is_read_as_it_is_used(stopped):
    """When the first shard is done, less than half of the stream is read, which is the size of the object store."""
    assert PARCELS / 2 == OBJECT_STORE / 200_000
    assert 16 <= len(stopped.read_at_first_shard) < PARCELS / 2


def test_actors_share_the_work(stopped):
    """Two actors are two processes that run at the same time."""
    assert len(processes(stopped.notes)) == 2


def test_a_stopped_run_leaves_no_process_behind(stopped):
    """The actors end when the iteration of the driver ends."""
    wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in processes(stopped.notes)))


def test_either_executor_goes_on_where_the_other_stopped(stopped, tmp_path):
    """A run with interruptions of both executors, a killed reader and a failing role, finished locally, has the same
    bytes as an uninterrupted run. Errors of roles are the same as locally, after the same shards, with a traceback."""
    uninterrupted = run(stream(tmp_path / "log"), weigh(Scales()), tmp_path / "uninterrupted", run_locally)
    assert uninterrupted.counts["weight"] == sum(200_000 + number % 256 for number in range(PARCELS))
    errors = {}
    for name, executor, fatal in (("local", run_locally, None), ("ray", RayExecutor(), 420)):
        shutil.copytree(stopped.folder, tmp_path / name)
        assert len(read(tmp_path / name)) == 320
        with pytest.raises(KeyError) as caught:
            run(stream(tmp_path / f"{name}.log", fatal), weigh(Scales("500")), tmp_path / name, executor)
        errors[name] = caught.value
        assert len(read(tmp_path / name)) == 496
    assert str(errors["ray"]) == str(errors["local"]) == "'the scales broke under parcel 500'"
    assert "in __call__\n    raise KeyError" in errors["ray"].__notes__[0]
    rows = read_rows(tmp_path / "ray.log")
    assert rows.count(420) == 2 and rows.index(420) < rows.index(421)  # the one that was killed, and the one after it
    assert min(rows) >= 304  # a shard of the stream before what was missing, at most
    assert contents(tmp_path / "ray") == contents(tmp_path / "local") != contents(tmp_path / "uninterrupted")
    run(stream(tmp_path / "log"), weigh(Scales()), tmp_path / "ray", run_locally)
    assert contents(tmp_path / "ray") == contents(tmp_path / "uninterrupted")
    assert [row["id"] for row in read(tmp_path / "ray")] == [str(number) for number in range(PARCELS)]


def test_what_a_role_raises_passes_by_the_later_roles():
    """A role passes an error on unchanged, and does nothing."""
    shard = pack(KeyError("no scales"))
    assert RoleWorker(Scales(), last=True)(shard) is shard


def test_what_reading_raises_comes_after_the_shards_before_it():
    """An error while reading comes after the shards before it."""
    rows = Dataset.from_list([{"id": str(number), "content": b"x"} for number in range(5)] + [{"id": "5"}])

    def read_checked(row):
        if row["content"] is None:
            raise ValueError(f"parcel {row['id']} is empty")
        return read_parcel(row)

    *shards, (error, _) = (unpack(shard) for shard in Reader(read_checked, 2, Rest(rows))(pack([])))
    assert [[parcel.id for parcel in parcels] for parcels, _ in shards] == [["0", "1"], ["2", "3"]]
    assert (type(error), str(error)) == (ValueError, "parcel 5 is empty")


class Awkward(Exception):
    """An error that does not pickle, because it takes two arguments and keeps one."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}, {why}")


def test_an_error_that_does_not_pickle_still_says_what_happened():
    """It becomes a `RuntimeError` with the same text."""
    error = portable(Awkward("no", "because"))
    assert (type(error), str(error)) == (RuntimeError, "Awkward: no, because")
