# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The annotation of CPO (arXiv 2601.04300): labels images with attributes of a criteria tree."""

from collections import Counter
from functools import partial
from typing import Any

from .attribute_expert import AttributeExpert
from .records import read_attribute_image
from .run import Row, Task
from .tables import IMAGE_ANNOTATION_FEATURES, SCHEMA_VERSION, STATUSES


def attribute_task(
    expert: AttributeExpert, dataset: dict[str, Any], columns: dict[str, str], rows_per_shard: int = 128
) -> Task:
    """
    Builds the task of annotating images with attributes.

    Args:
        expert ([`AttributeExpert`]):
            The role.
        dataset (`dict`):
            Description of the dataset for the manifest: `name`, `split` and anything else.
        columns (`dict[str, str]`):
            From our column names to the dataset's, see [`annotation.records.image_columns`].
        rows_per_shard (`int`, *optional*, defaults to `128`):
            Rows per shard. An interrupted run loses at most one shard of work.

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
    Counts the attributes of annotated images.

    Args:
        rows (`list[dict]`):
            Annotation rows, with class labels as indices.

    Returns:
        `Counter`: `positive_attributes`, `negative_attributes`, and the number of images `without_attributes`, all
        over the images with the status `ok`.
    """
    ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
    return Counter(
        positive_attributes=sum(len(row["positive_attributes"]) for row in ok),
        negative_attributes=sum(len(row["negative_attributes"]) for row in ok),
        without_attributes=sum(not row["positive_attributes"] and not row["negative_attributes"] for row in ok),
    )
