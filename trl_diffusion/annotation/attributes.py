# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The annotation of CPO (arXiv 2601.04300): from images to attributes of a tree of criteria."""

from collections import Counter
from functools import partial
from typing import Any

from .attribute_expert import AttributeExpert
from .records import IMAGE_ANNOTATION_FEATURES, SCHEMA_VERSION, STATUSES, read_attribute_image
from .run import Row, Task


def attribute_task(
    expert: AttributeExpert, dataset: dict[str, Any], columns: dict[str, str], rows_per_shard: int = 128
) -> Task:
    """
    Annotating images with attributes.

    Args:
        expert ([`AttributeExpert`]):
            The role.
        dataset (`dict`):
            Where the rows come from, for the manifest: `name`, `split` and what else there is to say.
        columns (`dict[str, str]`):
            Which columns hold what, see [`annotation.records.image_columns`].
        rows_per_shard (`int`, *optional*, defaults to `128`):
            Rows of a shard, and what a stop costs at most.

    Returns:
        [`Task`]
    """
    return Task(
        read=partial(read_attribute_image, columns=columns),
        roles=(expert,),
        features=IMAGE_ANNOTATION_FEATURES,
        description={
            "task": "attributes",
            "schema_version": SCHEMA_VERSION,
            "dataset": dataset,
            "columns": columns,
            "attribute_expert": expert.describe(),
        },
        count=count_attributes,
        split=dataset["split"],
        rows_per_shard=rows_per_shard,
        images_per_row=1,
    )


def count_attributes(rows: list[Row]) -> Counter:
    """
    Figures of annotated images.

    Args:
        rows (`list[dict]`):
            Rows of annotations, with indices of class labels.

    Returns:
        `Counter`: `positive_attributes` and `negative_attributes` of the images that are ok, and how many of these are
        `without_attributes`.
    """
    ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
    return Counter(
        positive_attributes=sum(len(row["positive_attributes"]) for row in ok),
        negative_attributes=sum(len(row["negative_attributes"]) for row in ok),
        without_attributes=sum(not row["positive_attributes"] and not row["negative_attributes"] for row in ok),
    )
