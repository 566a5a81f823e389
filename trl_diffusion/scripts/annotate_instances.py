# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[ray]",
# ]
# ///

"""
Annotates image pairs with instances, the first stage of IAPO: a planner names the objects that both images show, a detector
finds them, and a judge decides which image shows each of them better. With `--segmenter`, a segmenter outlines what the detector
has found.

```bash
trl-diffusion annotate-instances \
    --dataset_name user/pick-a-pic-v2 --dataset_streaming \
    --vlm Qwen/Qwen2.5-VL-7B-Instruct \
    --detector IDEA-Research/grounding-dino-base \
    --output_dir annotations
```

If it is stopped, the same command continues. `--preview 20` shows some annotated pairs before the run.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.scripts.annotation import AnnotationArguments
from trl_diffusion.scripts.judges import DTYPES, ORACLE, DetectorArguments


if TYPE_CHECKING:
    from trl_diffusion.annotation.segmenter import Segmenter


@dataclass
class AnnotateInstancesArguments(DetectorArguments, AnnotationArguments):
    """
    Arguments of `trl-diffusion annotate-instances` besides those that both annotation commands and the detector have.

    Parameters:
        tie_policy (`str`, *optional*, defaults to `"drop"`):
            Pairs in which neither image is better: `"drop"` rejects them, `"keep"` annotates and marks them.
        planner_prompt (`str`, *optional*), judge_prompt (`str`, *optional*):
            Files with your own prompts.
        max_instances (`int`, *optional*, defaults to `5`):
            Largest number of instances per pair.
        crop_size (`int`, *optional*, defaults to `336`):
            Width and height in pixels of the crops that the judge compares.
        segmenter (`str`, *optional*):
            The segmenter, which gives each instance a mask: a Hub id, a folder, or `oracle`. By default instances have boxes alone.
        segmenter_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        segmenter_dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the segmenter's weights.
        segmenter_batch_size (`int`, *optional*, defaults to `4`):
            Images per batch of the segmenter.
        ray_detector_actors (`int`, *optional*, defaults to `1`), ray_segmenter_actors (`int`, *optional*, defaults to `1`):
            Number of actors for the detector, and for the segmenter.
        ray_detector_gpus (`float`, *optional*), ray_segmenter_gpus (`float`, *optional*):
            GPUs of each of these actors. Defaults to 1 if the cluster has GPUs, else 0.
    """

    tie_policy: str = field(
        default="drop",
        metadata={"help": "Reject pairs in which neither image is better, or keep them.", "choices": ["drop", "keep"]},
    )
    planner_prompt: str | None = field(default=None, metadata={"help": "A file with your own prompt for the planner."})
    judge_prompt: str | None = field(default=None, metadata={"help": "A file with your own prompt for the judge."})
    max_instances: int = field(default=5, metadata={"help": "Largest number of instances per pair."})
    crop_size: int = field(
        default=336, metadata={"help": "Width and height in pixels of the crops that the judge compares."}
    )
    segmenter: str | None = field(
        default=None,
        metadata={"help": "The segmenter, which gives each instance a mask: a Hub id, a folder, or `oracle`."},
    )
    segmenter_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    segmenter_dtype: str = field(default="float32", metadata={"help": "Type of the segmenter's weights."})
    segmenter_batch_size: int = field(default=4, metadata={"help": "Images per batch of the segmenter."})
    ray_detector_actors: int = field(default=1, metadata={"help": "Number of actors for the detector."})
    ray_detector_gpus: float | None = field(default=None, metadata={"help": "GPUs of each of these actors."})
    ray_segmenter_actors: int = field(default=1, metadata={"help": "Number of actors for the segmenter."})
    ray_segmenter_gpus: float | None = field(default=None, metadata={"help": "GPUs of each of these actors."})

    def __post_init__(self):
        super().__post_init__()
        if self.segmenter_batch_size < 1:
            raise ValueError(f"`--segmenter_batch_size` must be at least 1, got {self.segmenter_batch_size}.")
        if self.segmenter is None and self.segmenter_revision is not None:
            raise ValueError("`--segmenter_revision` is the revision of a segmenter: name it with `--segmenter`.")


def get_segmenter(args: AnnotateInstancesArguments) -> "Segmenter | None":
    """
    Loads the segmenter that the flags name.

    Args:
        args ([`AnnotateInstancesArguments`]):
            The flags.

    Returns:
        [`Segmenter`], or `None` if none is named.

    Raises:
        `ValueError`: If there is no such model.
    """
    if args.segmenter is None:
        return None
    if args.segmenter == ORACLE:
        from trl_diffusion.quickstart.oracle import OracleSegmenter

        return OracleSegmenter()
    from trl_diffusion.annotation.segmenter import TransformersSegmenter

    return TransformersSegmenter(
        args.segmenter,
        revision=args.segmenter_revision,
        batch_size=args.segmenter_batch_size,
        dtype=DTYPES.get(args.segmenter_dtype, args.segmenter_dtype),
    )


def main(args: AnnotateInstancesArguments) -> None:
    from trl_diffusion.annotation.instances import instance_task
    from trl_diffusion.annotation.judge import Judge
    from trl_diffusion.annotation.planner import Planner
    from trl_diffusion.annotation.records import pair_columns
    from trl_diffusion.scripts.annotation import annotate, get_executor, load_rows
    from trl_diffusion.scripts.judges import get_detector, get_vlm

    dataset, columns, num_rows = load_rows(args, pair_columns)
    vlm = get_vlm(args)
    task = instance_task(
        Planner(vlm, args.planner_prompt, max_instances=args.max_instances),
        get_detector(args),
        Judge(vlm, args.judge_prompt, crop_size=args.crop_size),
        args.source,
        columns,
        tie_policy=args.tie_policy,
        rows_per_shard=args.rows_per_shard,
        segmenter=get_segmenter(args),
    )
    executor = get_executor(
        args,
        detector_actors=args.ray_detector_actors,
        detector_gpus=0 if args.detector == ORACLE else args.ray_detector_gpus,
        segmenter_actors=args.ray_segmenter_actors,
        segmenter_gpus=0 if args.segmenter == ORACLE else args.ray_segmenter_gpus,
    )
    annotate(args, task, dataset, num_rows, executor)


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser((AnnotateInstancesArguments,), prog=prog)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("annotate-instances", lambda: sys.modules[__name__]))
