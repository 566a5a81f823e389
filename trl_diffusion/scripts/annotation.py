# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the annotation commands share: where rows come from, what runs the roles."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from .judges import ORACLE, VLMArguments


if TYPE_CHECKING:
    from ..annotation.run import Executor, Task


@dataclass
class AnnotationArguments(VLMArguments):
    """
    Arguments of the annotation commands besides those of the vision-language model.

    Parameters:
        dataset_name (`str`, *optional*):
            The dataset: a Hub id, a folder of Parquet files or images, or what `save_to_disk` wrote.
        dataset_config (`str`, *optional*):
            Its configuration.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            The split to annotate.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Stream the dataset: nothing of it is kept on the disk.
        columns (`str`, *optional*):
            JSON, from our names to the dataset's columns.
        output_dir (`str`, *optional*, defaults to `"annotations"`):
            Where the run's folder goes.
        rows_per_shard (`int`, *optional*, defaults to `128`):
            Rows of a shard, and what a stop costs at most.
        max_error_rate (`float`, *optional*, defaults to `0.01`):
            Share of error rows at which the run stops.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Annotate the shards with errors again.
        preview (`int`, *optional*):
            Annotate so many rows into `preview.html`, and nothing else.
        executor (`str`, *optional*, defaults to `"local"`):
            `"local"`: this process; `"ray"`: actor pools of Ray Data.
        ray_vlm_actors (`int`, *optional*, defaults to `1`):
            Actors of each role that asks the vision-language model.
        ray_vlm_gpus (`float`, *optional*):
            GPUs of each of them. Defaults to 1 where the cluster has any and the model runs in the actors, else 0.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A Hub id, a folder of Parquet files or images, or what `save_to_disk` wrote."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "The split to annotate."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Stream the dataset: nothing of it is kept on the disk."}
    )
    columns: str | None = field(default=None, metadata={"help": "JSON, from our names to the dataset's columns."})
    output_dir: str = field(default="annotations", metadata={"help": "Where the run's folder goes."})
    rows_per_shard: int = field(default=128, metadata={"help": "Rows of a shard, and what a stop costs at most."})
    max_error_rate: float = field(default=0.01, metadata={"help": "Share of error rows at which the run stops."})
    retry_errors: bool = field(default=False, metadata={"help": "Annotate the shards with errors again."})
    preview: int | None = field(
        default=None, metadata={"help": "Annotate so many rows into `preview.html`, and nothing else."}
    )
    executor: str = field(
        default="local",
        metadata={"help": "This process, or actor pools of Ray Data.", "choices": ["local", "ray"]},
    )
    ray_vlm_actors: int = field(default=1, metadata={"help": "Actors of each role that asks the model."})
    ray_vlm_gpus: float | None = field(default=None, metadata={"help": "GPUs of each of them."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("rows_per_shard", "ray_vlm_actors"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if self.preview is not None and self.preview < 1:
            raise ValueError(f"`--preview` must be at least 1, got {self.preview}.")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"`--max_error_rate` must be in [0, 1], got {self.max_error_rate}.")

    @property
    def mapping(self) -> dict[str, str] | None:
        """`columns`, read."""
        if self.columns is None or isinstance(self.columns, dict):  # a YAML file gives a dictionary
            return self.columns
        try:
            mapping = json.loads(self.columns)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--columns` is no JSON: {error}.") from error
        if not isinstance(mapping, dict) or not all(isinstance(column, str) for column in mapping.values()):
            raise ValueError(f"`--columns` must be a JSON object of names of columns, got {self.columns}.")
        return mapping

    @property
    def source(self) -> dict[str, Any]:
        """The dataset, as the manifest names it."""
        source = {
            "name": self.dataset_name,
            "config": self.dataset_config,
            "revision": self.dataset_revision,
            "split": self.dataset_split,
        }
        return {name: value for name, value in source.items() if value is not None}


def get_executor(
    args: AnnotationArguments, detector_actors: int = 1, detector_gpus: float | None = None
) -> "Executor":
    """
    What runs the roles.

    Args:
        args ([`AnnotationArguments`]):
            The flags.
        detector_actors (`int`, *optional*, defaults to `1`):
            Actors of the detector, with Ray.
        detector_gpus (`float`, *optional*):
            GPUs of each of them.

    Returns:
        `Executor`

    Raises:
        `ValueError`: If Ray is asked for and not installed.
    """
    if args.executor == "local":
        from ..annotation.run import run_locally

        return run_locally
    from ..annotation.ray_executor import RayExecutor

    return RayExecutor(
        vlm_actors=args.ray_vlm_actors,
        vlm_gpus=0 if args.vlm_base_url or args.vlm == ORACLE else args.ray_vlm_gpus,
        detector_actors=detector_actors,
        detector_gpus=detector_gpus,
    )


def load_rows(
    args: AnnotationArguments, find_columns: Callable[[list[str], dict[str, str] | None], dict[str, str]]
) -> tuple[Dataset | IterableDataset, dict[str, str], int | None]:
    """
    Loads the split to annotate.

    Args:
        args ([`AnnotationArguments`]):
            The flags.
        find_columns (`Callable`):
            Decides which columns hold what, such as [`annotation.records.pair_columns`].

    Returns:
        `tuple`: the rows, which columns hold what, and how many rows there are where that is known.

    Raises:
        `ValueError`: If no dataset is named, or it has no such split or columns.
    """
    from ..annotation.records import prepare_rows
    from .utils import get_split, load_splits

    splits = load_splits(args, revision=args.dataset_revision)
    dataset = get_split(splits, args.dataset_split, "--dataset_split")
    declared = dataset.info.splits or {}
    rows = declared[args.dataset_split].num_examples if args.dataset_split in declared else None
    dataset, columns = prepare_rows(dataset, find_columns, args.mapping)
    return dataset, columns, len(dataset) if isinstance(dataset, Dataset) else rows


def annotate(
    args: AnnotationArguments,
    task: "Task",
    dataset: Dataset | IterableDataset,
    num_rows: int | None,
    executor: "Executor",
) -> None:
    """
    Annotates a split, or previews it, and says what came out.

    Args:
        args ([`AnnotationArguments`]):
            The flags.
        task ([`Task`]):
            What is done.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        num_rows (`int`, *optional*):
            How many.
        executor (`Executor`):
            What runs the roles.

    Raises:
        `ValueError`: See [`annotation.run.run`].
    """
    from ..annotation.preview import preview
    from ..annotation.run import run

    if args.preview is not None:
        page = Path(args.output_dir) / "preview.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(preview(task, dataset.take(args.preview)), encoding="utf-8")
        print(f"Open {page}. Nothing else was written.")
        return
    finished = run(
        dataset,
        task,
        args.output_dir,
        executor,
        max_error_rate=args.max_error_rate,
        retry_errors=args.retry_errors,
        num_rows=num_rows,
    )
    figures = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in finished.counts.items())
    print(f"Annotated into {finished.folder}: {figures}.")
