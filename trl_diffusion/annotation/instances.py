# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The first stage of IAPO (Sun et al., CVPR 2026): annotates image pairs with instances and their preferences.

The planner lists the instances that both images show, the detector locates them in both images, and the judge decides
which image shows each instance better. If that is the rejected image, the instance contradicts the pair's label: it is
a *conflict*. A segmenter may outline what the detector has located.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

from ..data.formats import PREFERENCES
from .detector import Detector
from .judge import Judge
from .planner import Planner
from .records import read_pair
from .run import Row, Task
from .segmenter import Segmenter
from .tables import PAIR_ANNOTATION_FEATURES, PAIR_MASK_FEATURES, SCHEMA_VERSION, STATUSES


def instance_task(
    planner: Planner,
    detector: Detector,
    judge: Judge,
    dataset: dict[str, Any],
    columns: dict[str, str],
    tie_policy: str = "drop",
    rows_per_shard: int = 128,
    segmenter: Segmenter | None = None,
) -> Task:
    """
    Builds the task of annotating pairs with instances.

    Args:
        planner ([`Planner`]), detector ([`Detector`]), judge ([`Judge`]):
            The roles.
        dataset (`dict`):
            Description of the dataset for the manifest: `name`, `split` and anything else.
        columns (`dict[str, str]`):
            From our column names to the dataset's, see [`annotation.records.pair_columns`].
        tie_policy (`str`, *optional*, defaults to `"drop"`):
            `"drop"` or `"keep"`, see [`annotation.records.read_pair`].
        rows_per_shard (`int`, *optional*, defaults to `128`):
            Rows per shard. An interrupted run loses at most one shard of work.
        segmenter ([`Segmenter`], *optional*):
            A role after the detector, which gives instances masks. Without it, they have boxes alone.

    Returns:
        [`Task`]
    """
    task = Task(
        read=partial(read_pair, columns=columns, tie_policy=tie_policy),
        roles=(planner, detector, judge),
        features=PAIR_ANNOTATION_FEATURES,
        description={
            "task": "instances",
            "schema_version": SCHEMA_VERSION,
            "dataset": dataset,
            "columns": columns,
            "tie_policy": tie_policy,
            "planner": planner.describe(),
            "detector": detector.describe(),
            "judge": judge.describe(),
        },
        count=count_instances,
        split=dataset["split"],
        rows_per_shard=rows_per_shard,
        images_per_row=2,
    )
    if segmenter is None:
        return task
    return replace(
        task,
        roles=(planner, detector, segmenter, judge),
        features=PAIR_MASK_FEATURES,
        description=task.description | {"segmenter": segmenter.describe()},
        count=count_masks,
    )


def count_instances(rows: list[Row]) -> Counter:
    """
    Counts the instances of annotated pairs.

    Args:
        rows (`list[dict]`):
            Annotation rows, with class labels as indices.

    Returns:
        `Counter`: `tie`, the pairs that are ties; and over the pairs with the status `ok`, `without_instances`
        (pairs), `instances`, the `conflicts` and `instance_ties` among them, and `dropped_instances` (planned, but not
        kept).
    """
    ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
    preferences = Counter(PREFERENCES[instance["preference"]] for row in ok for instance in row["instances"])
    return Counter(
        tie=sum(bool(row["tie"]) for row in rows),
        without_instances=sum(not row["instances"] for row in ok),
        instances=preferences.total(),
        conflicts=preferences["rejected"],
        instance_ties=preferences["tie"],
        dropped_instances=sum(len(row["dropped"]) for row in ok),
    )


def count_masks(rows: list[Row]) -> Counter:
    """
    Counts the instances of annotated pairs that a segmenter has seen.

    Args:
        rows (`list[dict]`):
            Annotation rows, with class labels as indices.

    Returns:
        `Counter`: as [`annotation.instances.count_instances`], and over the pairs with the status `ok` `masks`, at most two of an
        instance, and `without_mask`, the images of instances that have boxes alone.
    """
    instances = [instance for row in rows if STATUSES[row["status"]] == "ok" for instance in row["instances"]]
    masks = [instance[name] for instance in instances for name in ("chosen_mask", "rejected_mask")]
    has_mask = Counter(mask is not None for mask in masks)
    counts = count_instances(rows)
    counts.update(masks=has_mask[True], without_mask=has_mask[False])
    return counts
