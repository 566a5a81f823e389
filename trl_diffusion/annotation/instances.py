# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The first stage of IAPO (Sun et al., CVPR 2026): from image pairs to instances, and which image draws each better.

The planner names what both images show, the detector finds it in both, the judge says where it is drawn better. Where that is
the rejected image, the instance contradicts the pair's label: it is in *conflict*.
"""

from collections import Counter
from functools import partial
from typing import Any

from ..data.formats import PREFERENCES
from .detector import Detector
from .judge import Judge
from .planner import Planner
from .records import PAIR_ANNOTATION_FEATURES, SCHEMA_VERSION, STATUSES, read_pair
from .run import Row, Task


def instance_task(
    planner: Planner,
    detector: Detector,
    judge: Judge,
    dataset: dict[str, Any],
    columns: dict[str, str],
    tie_policy: str = "drop",
    rows_per_shard: int = 128,
) -> Task:
    """
    Annotating pairs with instances.

    Args:
        planner ([`Planner`]), detector ([`Detector`]), judge ([`Judge`]):
            The roles.
        dataset (`dict`):
            Where the rows come from, for the manifest: `name`, `split` and what else there is to say.
        columns (`dict[str, str]`):
            Which columns hold what, see [`annotation.records.pair_columns`].
        tie_policy (`str`, *optional*, defaults to `"drop"`):
            `"drop"` or `"keep"`, see [`annotation.records.read_pair`].
        rows_per_shard (`int`, *optional*, defaults to `128`):
            Rows of a shard, and what a stop costs at most.

    Returns:
        [`Task`]
    """
    return Task(
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


def count_instances(rows: list[Row]) -> Counter:
    """
    Figures of annotated pairs.

    Args:
        rows (`list[dict]`):
            Rows of annotations, with indices of class labels.

    Returns:
        `Counter`: `tie` pairs; among those that are ok the pairs `without_instances`, the `instances`, and of these the
        `conflicts` and the `instance_ties`; `dropped_instances` that were planned and not found.
    """
    ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
    preferences = Counter(PREFERENCES[instance["preference"]] for row in ok for instance in row["instances"])
    return Counter(
        tie=sum(row["tie"] for row in rows),
        without_instances=sum(not row["instances"] for row in ok),
        instances=preferences.total(),
        conflicts=preferences["rejected"],
        instance_ties=preferences["tie"],
        dropped_instances=sum(len(row["dropped"]) for row in ok),
    )
