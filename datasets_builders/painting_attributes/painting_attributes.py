# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images with attributes of a criteria tree, for CPO (arXiv 2601.04300)."""

from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features, IterableDataset, Version

from datasets_builders.common import (
    ANNOTATIONS,
    AnnotatedDatasetBuilder,
    SourceConfig,
    blocks,
    count_reasons,
    count_statuses,
    describe_role,
    join_versions,
    public,
)
from trl_diffusion import AttributeSFTTrainer, Criteria, attribute_features
from trl_diffusion.annotation.attribute_expert import describe_criteria
from trl_diffusion.annotation.attributes import count_attributes
from trl_diffusion.annotation.join import load_annotations, read_manifest
from trl_diffusion.annotation.records import IMAGE_ANNOTATION_FEATURES, STATUSES, image_columns
from trl_diffusion.data.formats import ATTRIBUTE_COLUMNS


IMAGES = "images"
SPLITS = {"train": 8, "validation": 1, "test": 1}  # in tenths


def split_of(row_id: str) -> str:
    """
    Determines the split of a row. It depends only on the id, so new rows or another order do not change it.

    Args:
        row_id (`str`):
            Id of the row.

    Returns:
        `str`: a key of `SPLITS`.
    """
    tenths = [split for split, number in SPLITS.items() for _ in range(number)]
    return tenths[int(sha256(row_id.encode()).hexdigest(), 16) % len(tenths)]


class PaintingAttributes(AnnotatedDatasetBuilder):
    """
    The images of one run: eight tenths in the split `train`, one in `validation` and one in `test`.
    """

    VERSION = Version("1.0.0")
    BUILDER_CONFIGS = [
        SourceConfig(
            name=IMAGES,
            version=VERSION,
            description="The images, with the columns of AttributeSFTTrainer and ComplexPOTrainer.",
        ),
        SourceConfig(name=ANNOTATIONS, version=VERSION, description="All annotations, without images."),
    ]
    DEFAULT_CONFIG_NAME = IMAGES

    TASK = "attributes"
    TEMPLATE = Path(__file__).parent / "card.md"
    TAGS = ["cpo"]
    TRAINER = AttributeSFTTrainer

    def _info(self) -> DatasetInfo:
        typed = attribute_features(Criteria.load(self.config.criteria))
        features = typed
        if self.config.name == ANNOTATIONS:
            features = Features(
                {
                    name: typed[name] if name in ATTRIBUTE_COLUMNS else value
                    for name, value in IMAGE_ANNOTATION_FEATURES.items()
                }
            )
        return DatasetInfo(description=self.config.description, features=features)

    def run(self) -> Path:
        """
        Finds the run.

        Returns:
            `Path`: the folder of the run.

        Raises:
            `ValueError`: If there are several, or they were annotated with another tree.
        """
        runs = self.runs()
        if len(runs) > 1:
            raise ValueError(
                f"{self.config.annotations_dir} holds runs of several splits: "
                f"{', '.join(run.name for run in runs.values())}. This builder creates its own splits: pass the folder of "
                "one run as `--annotations_dir`."
            )
        (run,) = runs.values()
        criteria = Criteria.load(self.config.criteria)
        annotated = read_manifest(run)["attribute_expert"]["criteria"]
        if describe_criteria(criteria)["sha256"] != annotated["sha256"]:
            raise ValueError(
                f"The images were annotated with the criteria {annotated['name']!r} of {annotated['attributes']} "
                f"attributes, but {self.config.criteria} is another tree: {criteria.name!r} of "
                f"{len(criteria.attributes)} attributes. Pass the tree of the annotations as `--criteria`."
            )
        return run

    def annotations(self) -> dict[str, Dataset]:
        """The annotations of each split that has any, with the attributes of the tree as class labels."""
        annotations = load_annotations(self.run())
        labels = attribute_features(Criteria.load(self.config.criteria))
        annotations = annotations.cast(
            Features({**annotations.features, **{name: labels[name] for name in ATTRIBUTE_COLUMNS}})
        )
        numbers: dict[str, list[int]] = {split: [] for split in SPLITS}
        for number, row_id in enumerate(annotations["id"][:]):
            numbers[split_of(row_id)].append(number)
        return {split: annotations.select(chosen) for split, chosen in numbers.items() if chosen}

    def joined(self, annotations: dict[str, Dataset]) -> dict[str, IterableDataset]:
        """The images of each split."""
        stream, columns = self.config.load_stream(read_manifest(self.run())["dataset"]["split"], image_columns)
        rows = {}
        for split, annotated in annotations.items():
            of_split = stream.filter(partial(is_of, split), input_columns=[columns["id"]])
            rows |= self.join(split, of_split, annotated, columns)
        return rows

    def describe(self, annotations: dict[str, Dataset]) -> dict[str, Any]:
        """The manifest, the tree, and counts of the annotations."""
        manifest = read_manifest(self.run())
        criteria = Criteria.load(self.config.criteria)
        dimensions = {dimension: Counter() for dimension in criteria.dimensions}
        statuses, reasons, images = {}, {}, {}
        for split, annotated in annotations.items():
            statuses[split], reasons[split], images[split] = Counter(), Counter(), Counter()
            for rows in blocks(annotated):
                ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
                statuses[split].update(count_statuses(rows))
                reasons[split].update(count_reasons(rows))
                images[split].update(count_attributes(rows), images=len(ok))
                for row in ok:
                    for name in ATTRIBUTE_COLUMNS:
                        for index in row[name]:
                            dimensions[criteria.attributes[index].dimension][name] += 1
        return {
            "annotated": public(manifest["dataset"]["name"]),
            "annotated_revision": manifest["dataset"].get("revision"),
            "annotated_split": manifest["dataset"]["split"],
            "criteria": criteria,
            "criteria_file": Path(self.config.criteria).is_file(),
            "dimensions": dimensions,
            "role": describe_role(manifest["attribute_expert"]),
            "versions": join_versions([manifest]),
            "statuses": statuses,
            "reasons": reasons,
            "images": {split: counts for split, counts in images.items() if counts["images"]},
            "total": sum(images.values(), Counter()),
        }


def is_of(split: str, row_id: Any) -> bool:
    return split_of(str(row_id)) == split
