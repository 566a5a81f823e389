# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs the roles of a task as actor pools of Ray Data: `--executor ray`.

Ray Data streams whole shards through the pools, keeps their order, and repeats the work of a lost process. A role
receives the same records as in a local run, and the run writes the results in the same way: manifest, restart and
error rate are the same, and each executor can continue a run of the other.
"""

import logging
import math
import pickle
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..batching import in_threads
from .detector import Detector
from .records import Record, open_images
from .run import Rest, Role, Row, Task, finished_row
from .segmenter import Segmenter


if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)


class RayExecutor:
    """
    Runs each role in a pool of actors, on the Ray cluster that this process is connected to, else on the cluster at
    `RAY_ADDRESS`, else on this machine.

    Args:
        vlm_actors (`int`, *optional*, defaults to `1`):
            Actors of each role that uses the vision-language model (every role but the detector and the segmenter). Each actor
            loads the model.
        vlm_gpus (`float`, *optional*):
            GPUs per such actor. Defaults to 1, or to an equal share if the cluster has fewer GPUs than actors, or to 0
            if it has none.
        detector_actors (`int`, *optional*, defaults to `1`):
            Actors of the detector.
        detector_gpus (`float`, *optional*):
            GPUs per actor of the detector, with the same default as `vlm_gpus`.
        segmenter_actors (`int`, *optional*, defaults to `1`):
            Actors of the segmenter, if there is one.
        segmenter_gpus (`float`, *optional*):
            GPUs per actor of the segmenter, with the same default as `vlm_gpus`.

    Raises:
        `ValueError`: If Ray Data is not installed.
    """

    def __init__(
        self,
        vlm_actors: int = 1,
        vlm_gpus: float | None = None,
        detector_actors: int = 1,
        detector_gpus: float | None = None,
        segmenter_actors: int = 1,
        segmenter_gpus: float | None = None,
    ):
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise ValueError(
                '`--executor ray` needs Ray Data: run `pip install "trl-diffusion[ray]"`, or leave this flag out.'
            ) from error
        self.vlm = (vlm_actors, vlm_gpus)
        self.others = {Detector: (detector_actors, detector_gpus), Segmenter: (segmenter_actors, segmenter_gpus)}

    def __call__(self, task: Task, rest: Rest) -> Iterator[tuple[list[Row], dict | None]]:
        """Annotates the remaining rows, see [`annotation.run.Executor`]. Raises errors of roles in shard order."""
        import ray

        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        shards = self.pipeline(task, rest)
        for shard in shards.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            content, stream_state = unpack(shard)
            if isinstance(content, Exception):
                raise content
            yield content, stream_state

    def pipeline(self, task: Task, rest: Rest) -> "ray.data.Dataset":
        """The shards as a lazy dataset with one shard per row."""
        import ray

        shards = ray.data.from_items([{"shard": b""}])  # one row, so that the reader is called once
        context = shards.context
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # byte, so that each shard is a block of its own and never waits for another
        context.execution_no_progress_timeout_s = -1  # a shard, or loading a model, may take long
        context.enable_progress_bars = False  # the run has one
        context.print_on_execution_start = False

        # The files and caches of the dataset are on this machine.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        shards = add_pool(shards, Reader, (task.read_row, task.rows_per_shard, rest), 1, 0, here)
        pools = self.pools(task.roles, ray.cluster_resources().get("GPU", 0))
        for number, (role, (actors, gpus)) in enumerate(zip(task.roles, pools, strict=True), 1):
            shards = add_pool(shards, RoleWorker, (role, number == len(pools)), actors, gpus)
        return shards

    def pools(self, roles: tuple[Role, ...], gpus: float) -> list[tuple[int, float]]:
        """
        Determines the number of actors of each role, and the GPUs per actor.

        Args:
            roles (`tuple`):
                The roles.
            gpus (`float`):
                GPUs of the cluster.

        Returns:
            `list[tuple[int, float]]`: actors and GPUs per actor of each role, in the order of the roles.
        """
        pools = [
            next((pool for kind, pool in self.others.items() if isinstance(role, kind)), self.vlm) for role in roles
        ]
        share = gpu_share(sum(actors for actors, own in pools if own is None), gpus)
        pools = [(actors, share if own is None else own) for actors, own in pools]
        asked = round(sum(actors * own for actors, own in pools), 4)
        if asked > gpus:
            logger.warning(
                f"The actors of all roles request {asked:g} GPUs, but the cluster has {gpus:g}: some actors wait until it "
                "has more. Request fewer with `--ray_vlm_actors`, `--ray_vlm_gpus`, `--ray_detector_gpus` and `--ray_segmenter_gpus`."
            )
        return pools


def add_pool(
    shards: "ray.data.Dataset",
    stage: type,
    arguments: tuple,
    actors: int,
    gpus: float,
    labels: dict[str, str] | None = None,
) -> "ray.data.Dataset":
    """
    Sends shards through a pool of actors.

    Args:
        shards (`ray.data.Dataset`):
            The shards, one per row.
        stage (`type`):
            Class of the actors, which are called with one shard at a time.
        arguments (`tuple`):
            Constructor arguments of the class.
        actors (`int`):
            Number of actors, each in its own process.
        gpus (`float`):
            GPUs per actor.
        labels (`dict[str, str]`, *optional*):
            Labels of the machines that the actors may run on.

    Returns:
        `ray.data.Dataset`: the resulting shards.
    """
    from ray.data import ActorPoolStrategy

    return shards.map_batches(
        stage,
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(size=actors),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,  # GPUs or a server do the work, so no pool has to wait for a free core
        num_gpus=gpus,
        label_selector=labels,
    )


class Reader:
    """
    Reads the remaining rows, one shard at a time. Ray Data makes it wait while the pools are busy.

    Args:
        read (`Callable`):
            Turns a row of the dataset into a record.
        rows_per_shard (`int`):
            Rows per shard.
        rest ([`Rest`]):
            The remaining rows.
    """

    def __init__(self, read: Callable[[Row], Record], rows_per_shard: int, rest: Rest):
        self.read = read
        self.rows_per_shard = rows_per_shard
        self.rest = rest

    def __call__(self, _: pa.Table) -> Iterator[pa.Table]:
        rows = iter(self.rest)
        try:
            while block := list(islice(rows, self.rows_per_shard)):
                stream_state = self.rest.stream_state()
                yield pack(in_threads(self.read, block), stream_state)
        except Exception as error:
            yield pack(portable(error))


class RoleWorker:
    """
    Runs a role in its own process. It decodes the images again, because only encoded files are sent between processes.

    Args:
        role (`Callable`):
            The role. It is sent without its model, and loads it at the first call.
        last (`bool`):
            Whether this is the last role, which returns rows instead of records.
    """

    def __init__(self, role: Role, last: bool):
        self.role = role
        self.last = last

    def __call__(self, shard: pa.Table) -> pa.Table:
        records, stream_state = unpack(shard)
        if isinstance(records, Exception):
            return shard
        try:
            in_threads(open_images, records)
            self.role(records)
            return pack([finished_row(record) for record in records] if self.last else records, stream_state)
        except Exception as error:
            return pack(portable(error))


def gpu_share(actors: int, gpus: float) -> float:
    """
    Computes an equal share of the GPUs, such that no actor is split over two GPUs.

    Args:
        actors (`int`):
            Number of actors.
        gpus (`float`):
            Number of GPUs.

    Returns:
        `float`: 0 without GPUs, else `1 / n` for the smallest `n` for which all actors fit.
    """
    return 1 / max(1, math.ceil(actors / gpus)) if gpus else 0.0


def portable(error: Exception) -> Exception:
    """
    Makes an error that another process can raise. If Ray raised the error itself, it would do so before the earlier
    shards are written, and would add its own advice to the message.

    Args:
        error (`Exception`):
            An error that was raised in this process.

    Returns:
        `Exception`: the error with its traceback as a note, or a `RuntimeError` with its message if it does not
        pickle.
    """
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In another process:\n{text}")
    return error


def pack(content: list[Record] | list[Row] | Exception, stream_state: dict | None = None) -> pa.Table:
    """Packs a shard, and the stream's state after it, into a row of Ray Data; or the error that replaces the shard."""
    return pa.table({"shard": pa.array([pickle.dumps((content, stream_state))], pa.large_binary())})


def unpack(shard: pa.Table) -> tuple[Any, dict | None]:
    """The inverse of [`annotation.ray_executor.pack`]."""
    return pickle.loads(shard["shard"][0].as_buffer())
