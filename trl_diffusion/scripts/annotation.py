# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the annotation commands share: their flags, loading the rows, and running the annotation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from .dataset_arguments import COLUMNS_HELP, read_mapping
from .judges import ORACLE, VLMArguments


if TYPE_CHECKING:
    from ..annotation.run import Executor, Task


@dataclass
class AnnotationArguments(VLMArguments):
    """
    Arguments of the annotation commands besides those of the vision-language model.

    Parameters:
        dataset_name (`str`, *optional*):
            The dataset: a Hub id, a file or a folder, see [`data.sources.load_source`].
        dataset_config (`str`, *optional*):
            Configuration of the dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            The split to annotate.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Stream the dataset, so that it is not stored on the disk.
        columns (`str`, *optional*):
            JSON that maps the names used here to the dataset's columns. A name with a dot is a field of a column of objects,
            such as `json.caption`.
        output_dir (`str`, *optional*, defaults to `"annotations"`):
            Where the folder of the run is created.
        rows_per_shard (`int`, *optional*, defaults to `128`):
            Rows per shard. At most so many rows are lost when the run is stopped.
        max_error_rate (`float`, *optional*, defaults to `0.01`):
            The run stops when a larger share of the rows are errors.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Annotate shards that contain errors again.
        preview (`int`, *optional*):
            Annotate only this many rows, and show them in `preview.html`.
        executor (`str`, *optional*, defaults to `"local"`):
            `"local"`: this process; `"ray"`: actor pools of Ray Data.
        ray_vlm_actors (`int`, *optional*, defaults to `1`):
            Number of actors for each role that uses the vision-language model.
        ray_vlm_gpus (`float`, *optional*):
            GPUs of each of these actors. Defaults to 1 if the cluster has GPUs and the model runs in the actors, else 0.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A Hub id, a file of rows, or a folder of files or images."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "The split to annotate."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Stream the dataset, so that it is not stored on the disk."}
    )
    columns: str | None = field(default=None, metadata={"help": COLUMNS_HELP})
    output_dir: str = field(default="annotations", metadata={"help": "Where the folder of the run is created."})
    rows_per_shard: int = field(
        default=128, metadata={"help": "Rows per shard, and the most rows that are lost when the run is stopped."}
    )
    max_error_rate: float = field(
        default=0.01, metadata={"help": "The run stops when a larger share of the rows are errors."}
    )
    retry_errors: bool = field(default=False, metadata={"help": "Annotate shards that contain errors again."})
    preview: int | None = field(
        default=None, metadata={"help": "Annotate only this many rows, and show them in `preview.html`."}
    )
    executor: str = field(
        default="local",
        metadata={"help": "Run in this process, or in actor pools of Ray Data.", "choices": ["local", "ray"]},
    )
    ray_vlm_actors: int = field(
        default=1, metadata={"help": "Number of actors for each role that uses the vision-language model."}
    )
    ray_vlm_gpus: float | None = field(default=None, metadata={"help": "GPUs of each of these actors."})

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
        """`columns` as a dictionary."""
        return read_mapping(self.columns)

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
    args: AnnotationArguments,
    detector_actors: int = 1,
    detector_gpus: float | None = None,
    segmenter_actors: int = 1,
    segmenter_gpus: float | None = None,
) -> "Executor":
    """
    Returns the executor that runs the roles.

    Args:
        args ([`AnnotationArguments`]):
            The flags.
        detector_actors (`int`, *optional*, defaults to `1`), segmenter_actors (`int`, *optional*, defaults to `1`):
            Number of actors for the detector, and for the segmenter, with Ray.
        detector_gpus (`float`, *optional*), segmenter_gpus (`float`, *optional*):
            GPUs of each of these actors.

    Returns:
        `Executor`

    Raises:
        `ValueError`: If Ray is requested but not installed.
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
        segmenter_actors=segmenter_actors,
        segmenter_gpus=segmenter_gpus,
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
            Tells which columns hold what, such as [`annotation.records.pair_columns`].

    Returns:
        `tuple`: the rows, which columns hold what, and the number of rows if it is known.

    Raises:
        `ValueError`: If no dataset is named, or if it lacks the split or the columns.
    """
    from ..annotation.records import prepare_rows
    from .utils import get_split, load_splits

    splits = load_splits(args.dataset_name, args.dataset_config, args.dataset_revision, args.dataset_streaming)
    dataset = get_split(splits, args.dataset_split, "--dataset_split")
    declared = dataset.info.splits or {}
    rows = declared[args.dataset_split].num_examples if args.dataset_split in declared else None
    dataset, columns = prepare_rows(dataset, find_columns, args.mapping)
    if changed := [f"`{column}` as `{name}`" for name, column in columns.items() if name != column]:
        print(f"Read {', '.join(changed)}.")
    return dataset, columns, len(dataset) if isinstance(dataset, Dataset) else rows


def annotate(
    args: AnnotationArguments,
    task: "Task",
    dataset: Dataset | IterableDataset,
    num_rows: int | None,
    executor: "Executor",
) -> None:
    """
    Annotates a split, or previews it, and prints the counts.

    Args:
        args ([`AnnotationArguments`]):
            The flags.
        task ([`Task`]):
            What is done with each row.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        num_rows (`int`, *optional*):
            Number of rows.
        executor (`Executor`):
            What runs the roles.

    Raises:
        `ValueError`: See [`annotation.run.run`].
    """
    from ..annotation.preview import preview
    from ..annotation.run import run
    from ..data.sources import is_pattern
    from ..files import write_file

    if args.preview is not None:
        page = Path(args.output_dir) / "preview.html"
        write_file(page, preview(task, dataset.take(args.preview)).encode())
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
        read_again=Path(args.dataset_name).expanduser().exists() or is_pattern(args.dataset_name),
    )
    figures = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in finished.counts.items())
    print(f"Annotated into {finished.folder}: {figures}.")
