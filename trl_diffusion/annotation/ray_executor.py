# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The roles of a task as actor pools of Ray Data: `--executor ray`.

Ray Data streams the shards through the pools, keeps their order, and does again what a lost process was at. A shard goes as
a whole, so that a role is given the very records that it is given locally. The run writes what comes out, as it does locally:
manifest, restart and error rate are the same, and either executor goes on where the other stopped.
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
from .run import Rest, Role, Row, Task


if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)


class RayExecutor:
    """
    Runs each role in a pool of actors, on the Ray cluster that this process is connected to or that `RAY_ADDRESS` names, or
    else on this machine.

    Args:
        vlm_actors (`int`, *optional*, defaults to `1`):
            Actors of each role that asks the vision-language model, that is of all but the detector. Each loads the model.
        vlm_gpus (`float`, *optional*):
            GPUs of each of them. Left out, it is one, or where the cluster has fewer than there are actors such a part of one
            that all find room, or 0 where it has none.
        detector_actors (`int`, *optional*, defaults to `1`):
            Actors of the detector.
        detector_gpus (`float`, *optional*):
            GPUs of each of them, in the same way.

    Raises:
        `ValueError`: If Ray Data is not installed.
    """

    def __init__(
        self,
        vlm_actors: int = 1,
        vlm_gpus: float | None = None,
        detector_actors: int = 1,
        detector_gpus: float | None = None,
    ):
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise ValueError(
                'The executor needs Ray Data: `pip install "trl-diffusion[ray]"`, or leave `--executor ray` out.'
            ) from error
        self.vlm_actors = vlm_actors
        self.vlm_gpus = vlm_gpus
        self.detector_actors = detector_actors
        self.detector_gpus = detector_gpus

    def __call__(self, task: Task, rest: Rest) -> Iterator[tuple[list[Row], dict | None]]:
        """Annotates what is left, see [`annotation.run.Executor`]. What a role raises is raised here, in its turn."""
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
        """The shards as a dataset that is computed as it is read: a row is a shard."""
        import ray

        shards = ray.data.from_items([{"shard": b""}])  # what the reader is called with, once
        context = shards.context
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # byte: no shard waits for another, to go on in the same block
        context.execution_no_progress_timeout_s = -1  # a shard may take its time, and so may loading a model
        context.enable_progress_bars = False  # the run has one
        context.print_on_execution_start = False

        # Files and caches that the dataset refers to are on the machine of this process.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        shards = add_pool(shards, Reader, (task.read, task.rows_per_shard, rest), 1, 0, here)
        pools = self.pools(task.roles, ray.cluster_resources().get("GPU", 0))
        for number, (role, (actors, gpus)) in enumerate(zip(task.roles, pools, strict=True), 1):
            shards = add_pool(shards, RoleWorker, (role, number == len(pools)), actors, gpus)
        return shards

    def pools(self, roles: tuple[Role, ...], gpus: float) -> list[tuple[int, float]]:
        """
        How many actors each role has, and how many GPUs each of them.

        Args:
            roles (`tuple`):
                The roles.
            gpus (`float`):
                GPUs of the cluster.

        Returns:
            `list[tuple[int, float]]`, in the order of the roles.
        """
        pools = [
            (self.detector_actors, self.detector_gpus)
            if isinstance(role, Detector)
            else (self.vlm_actors, self.vlm_gpus)
            for role in roles
        ]
        share = gpu_share(sum(actors for actors, own in pools if own is None), gpus)
        pools = [(actors, share if own is None else own) for actors, own in pools]
        asked = round(sum(actors * own for actors, own in pools), 4)
        if asked > gpus:
            logger.warning(
                f"The actors of all roles ask for {asked:g} GPUs, and the cluster has {gpus:g}: some wait until it has more. "
                "Ask for fewer with `--ray_vlm_actors`, `--ray_vlm_gpus` and `--ray_detector_gpus`."
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
    Sends shards through a pool.

    Args:
        shards (`ray.data.Dataset`):
            The shards, one a row.
        stage (`type`):
            Class of what is called with each of them.
        arguments (`tuple`):
            What its instances are made of.
        actors (`int`):
            How many instances there are, each in a process of its own.
        gpus (`float`):
            GPUs of each.
        labels (`dict[str, str]`, *optional*):
            Labels of the machines that they may be on.

    Returns:
        `ray.data.Dataset`: what comes out.
    """
    from ray.data import ActorPoolStrategy

    return shards.map_batches(
        stage,
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(size=actors),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,  # GPUs or a server do the work: no pool is to wait for a core that another has
        num_gpus=gpus,
        label_selector=labels,
    )


class Reader:
    """
    Reads the rows that are left, a shard at a time; when nobody takes them, Ray Data lets it wait.

    Args:
        read (`Callable`):
            From a row of the dataset to a record.
        rows_per_shard (`int`):
            Rows of a shard.
        rest ([`Rest`]):
            The rows.
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
    A role in a process of its own, which decodes the images once more: only files travel.

    Args:
        role (`Callable`):
            The role. It comes without its model, and loads it when it is first called.
        last (`bool`):
            Whether rows come out rather than records.
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
            return pack([record.to_row() for record in records] if self.last else records, stream_state)
        except Exception as error:
            return pack(portable(error))


def gpu_share(actors: int, gpus: float) -> float:
    """
    An even part of the GPUs, such that no actor needs parts of two.

    Args:
        actors (`int`):
            How many share them.
        gpus (`float`):
            How many there are.

    Returns:
        `float`: 0 without GPUs, else `1 / n` for the smallest `n` with room for all.
    """
    return 1 / max(1, math.ceil(actors / gpus)) if gpus else 0.0


def portable(error: Exception) -> Exception:
    """
    An error that another process can raise. Ray would raise it before its turn, and write advice of its own into its message.

    Args:
        error (`Exception`):
            An error that was raised here.

    Returns:
        `Exception`: the error, or what it says where it does not pickle, with the traceback as a note.
    """
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In another process:\n{text}")
    return error


def pack(content: list[Record] | list[Row] | Exception, stream_state: dict | None = None) -> pa.Table:
    """A shard as a row of Ray Data, with where the stream stands after it; or why there is none."""
    return pa.table({"shard": pa.array([pickle.dumps((content, stream_state))], pa.large_binary())})


def unpack(shard: pa.Table) -> tuple[Any, dict | None]:
    """What went into [`annotation.ray_executor.pack`]."""
    return pickle.loads(shard["shard"][0].as_buffer())
