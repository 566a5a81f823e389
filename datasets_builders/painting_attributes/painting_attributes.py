# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images with attributes of a criteria tree, for CPO (arXiv 2601.04300)."""

import re
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Version

from datasets_builders.common import ANNOTATIONS, AnnotatedDatasetBuilder, SourceConfig, public_reasons
from datasets_builders.dataset_card import (
    PlannedVLM,
    blocks,
    count_failures,
    count_reasons,
    count_statuses,
    describe_role,
    example_row,
    is_shipped,
    join_versions,
    models_of,
    not_measured,
    public,
    spread,
    vlm_flags,
)
from datasets_builders.example_pictures import attribute_picture
from trl_diffusion import AttributeSFTTrainer, Criteria, attribute_features
from trl_diffusion.annotation.attribute_expert import AttributeExpert, describe_criteria
from trl_diffusion.annotation.attributes import count_attributes
from trl_diffusion.annotation.join import load_annotations, read_manifest
from trl_diffusion.annotation.records import IMAGE_ANNOTATION_FEATURES, STATUSES, image_columns
from trl_diffusion.annotation.run import Row
from trl_diffusion.criteria import FORMS
from trl_diffusion.data.formats import ATTRIBUTE_COLUMNS
from trl_diffusion.scripts.annotate_attributes import AnnotateAttributesArguments


IMAGES = "images"
SPLITS = {"train": 8, "validation": 1, "test": 1}  # in tenths

FAILED = re.compile(
    r"attribute expert, (\w+):"
)  # how the reason of a row begins for which the expert gave no valid answer

COLUMNS = {
    "id": ("", "", "id of the row in the source"),
    "prompt": ("", "", "prompt or description of the image"),
    "image": ("(H, W, 3)", "8 bits per channel", "the image, with the same bytes as in the source"),
    "status": ("", "", "`ok`; `rejected` by a rule; `error` if it could not be annotated"),
    "reason": ("", "", "why the status is not `ok`"),
    "image_uid": (
        "",
        "",
        "uid of the image from the source, or else the first 32 hexadecimal digits of the SHA-256 of its file",
    ),
    "positive_attributes": ("(N,)", "", "attributes of the image in positive form"),
    "negative_attributes": ("(N,)", "", "attributes of the image in negative form"),
    "answers": ("(N,)", "", "the expert's raw answers, one for each dimension"),
    "answers.dimension": ("", "", "id of the dimension"),
    "answers.answer": ("", "", "the raw answer"),
}


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
    COLUMNS = COLUMNS
    TAGS = ["cpo", "attributes"]
    HAS_BOXES = False
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

    def picture(self, row: Row, with_images: bool) -> PIL.Image.Image:
        return attribute_picture(row, Criteria.load(self.config.criteria).attributes)

    def interest(self, row: Row) -> int:
        """In how many forms it has attributes."""
        return sum(bool(row[name]) for name in ATTRIBUTE_COLUMNS)

    def describe(self, annotations: dict[str, Dataset]) -> dict[str, Any]:
        """The manifest, the tree, and counts of the annotations."""
        manifest = read_manifest(self.run())
        criteria = Criteria.load(self.config.criteria)
        dimensions = {dimension: Counter() for dimension in criteria.dimensions}
        attributes, numbers = {form: Counter() for form in FORMS}, {form: Counter() for form in FORMS}
        statuses, reasons, images, failed, example = {}, {}, {}, Counter(), None
        for split, annotated in annotations.items():
            statuses[split], reasons[split], images[split] = Counter(), Counter(), Counter()
            for rows in blocks(annotated):
                ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
                example = example or max(ok, key=self.interest, default=None)
                statuses[split].update(count_statuses(rows))
                reasons[split].update(count_reasons(rows))
                failed.update(found[1] for row in rows if (found := FAILED.match(row["reason"])))
                images[split].update(count_attributes(rows), images=len(ok))
                for form in FORMS:
                    attributes[form].update(index for row in ok for index in row[f"{form}_attributes"])
                    numbers[form].update(len(row[f"{form}_attributes"]) for row in ok)
        for form, found in attributes.items():
            for index, number in found.items():
                dimensions[criteria.attributes[index].dimension][f"{form}_attributes"] += number
        total = sum(images.values(), Counter())
        return self.recipe(manifest) | {
            "annotated_split": manifest["dataset"]["split"],
            "dimensions": dimensions,
            "attributes": attributes,
            "per_image": {form: spread(found) for form, found in numbers.items() if found},
            "versions": join_versions([manifest]),
            "statuses": statuses,
            "rows": sum(counts["rows"] for counts in statuses.values()),
            "reasons": reasons,
            "failures": count_failures(reasons, ["attribute expert"]),
            "failed_dimensions": failed,
            "images": {split: counts for split, counts in images.items() if counts["images"]},
            "total": total,
            "example": example and example_row(public_reasons(example), next(iter(annotations.values())).features),
        }

    def recipe(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """What a manifest says of the annotation, for the card."""
        roles = {"attribute_expert": describe_role(manifest["attribute_expert"])}
        criteria = Criteria.load(self.config.criteria)
        is_file = Path(self.config.criteria).is_file()
        return {
            "annotated": public(manifest["dataset"]["name"]),
            "annotated_revision": manifest["dataset"].get("revision"),
            "is_pick_a_pic": False,
            "is_english": is_shipped(roles["attribute_expert"], "attribute_expert"),
            "criteria": criteria,
            "criteria_file": is_file,
            "roles": roles,
            "models": models_of(roles),
            "flags": {
                "criteria": "criteria.yaml" if is_file else self.config.criteria,
                **vlm_flags(roles["attribute_expert"]["settings"]),
            },
        }

    def plan(self) -> dict[str, Any]:
        """The recipe with the command's defaults."""
        expert = AttributeExpert(PlannedVLM(AnnotateAttributesArguments()), Criteria.load(self.config.criteria))
        dataset = {"name": self.config.source, "revision": self.config.source_revision}
        manifest = {"dataset": dataset, "attribute_expert": expert.describe()}
        return self.recipe(manifest) | not_measured(list(SPLITS)) | {"annotated_split": "train"}


def is_of(split: str, row_id: Any) -> bool:
    return split_of(str(row_id)) == split
