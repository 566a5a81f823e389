# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Image pairs with the instances that both images share, for IAPO (Sun et al., CVPR 2026)."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Version

from datasets_builders.common import ANNOTATIONS, AnnotatedDatasetBuilder, SourceConfig, public_reasons
from datasets_builders.dataset_card import (
    UNRESOLVED,
    PlannedVLM,
    blocks,
    commit,
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
    public_reason,
    vlm_flags,
)
from datasets_builders.example_pictures import pair_picture
from trl_diffusion import InstanceDPOTrainer, instance_pair_features
from trl_diffusion.annotation.instances import count_instances
from trl_diffusion.annotation.join import differences, listed, load_annotations, read_manifest
from trl_diffusion.annotation.judge import Judge, Verdict
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import PAIR_ANNOTATION_FEATURES, STATUSES, pair_columns
from trl_diffusion.annotation.run import Row
from trl_diffusion.annotation.tables import PAIR_MASK_FEATURES
from trl_diffusion.annotation.vlm import compiled, validate
from trl_diffusion.data.formats import PREFERENCES
from trl_diffusion.scripts.annotate_instances import AnnotateInstancesArguments


PAIRS = "pairs"
ROLES = ("planner", "detector", "segmenter", "judge")  # the segmenter is not in every run
PICK_A_PIC = re.compile("pick-?a-?pic", re.IGNORECASE)
PLAIN_VERDICTS = {json.dumps({"better": letter}): letter for letter in "AB"}  # nearly all answers are one of these
PAPER_FIGURES = {
    "pairs": 959_040,
    "instances": 1_205_593,
    "conflicts": 558_352,
}  # IAPO's own annotations of Pick-a-Pic v2

BOX = ("(4,)", "pixels", "`[x_min, y_min, x_max, y_max]` of the object in the {} image")
MASK = ("(H, W)", "pixels of the file", "the pixels of the object in the {} image, null where it has a box alone")
RUN_LENGTHS = {
    "size": ("(2,)", "pixels", "height and width of the image"),
    "counts": ("", "", "COCO's run lengths of the mask"),
}
COLUMNS = {
    "id": ("", "", "id of the row in the source"),
    "prompt": ("", "", "prompt of both images"),
    "chosen": (
        "(H, W, 3)",
        "8 bits per channel",
        "the image that is better as a whole, with the same bytes as in the source",
    ),
    "rejected": ("(H, W, 3)", "8 bits per channel", "the other one"),
    "status": ("", "", "`ok`; `rejected` by a rule; `error` if it could not be annotated"),
    "reason": ("", "", "why the status is not `ok`"),
    "chosen_uid": (
        "",
        "",
        "uid of the chosen image from the source, or else the first 32 hexadecimal digits of the SHA-256 of its file",
    ),
    "rejected_uid": ("", "", "the same of the rejected image"),
    "tie": ("", "", "whether neither image is better according to the source"),
    "planner_answer": ("", "", "the planner's raw answer"),
    "instances": ("(N,)", "", "the objects that both images show"),
    "instances.label": ("", "", "name of the object, from the planner"),
    "instances.chosen_box": tuple(part.format("chosen") for part in BOX),
    "instances.rejected_box": tuple(part.format("rejected") for part in BOX),
    "instances.chosen_score": ("", "0 to 1", "the detector's confidence in the chosen image"),
    "instances.rejected_score": ("", "0 to 1", "the same in the rejected image"),
    "instances.chosen_mask": tuple(part.format("chosen") for part in MASK),
    "instances.rejected_mask": tuple(part.format("rejected") for part in MASK),
    **{f"instances.{side}_mask.{name}": what for side in ("chosen", "rejected") for name, what in RUN_LENGTHS.items()},
    "instances.preference": ("", "", "the image that shows the object better"),
    "instances.answer": ("", "", "the judge's raw answer with the chosen image first"),
    "instances.swapped_answer": ("", "", "the same with the rejected image first"),
    "dropped": ("(N,)", "", "objects that the planner named and that were dropped"),
    "dropped.label": ("", "", "name of the object"),
    "dropped.reason": ("", "", "why it was dropped"),
    "without_mask": ("(N,)", "", "objects that have a box alone in an image"),
    "without_mask.label": ("", "", "name of the object"),
    "without_mask.image": ("", "", "the image: `chosen` or `rejected`"),
    "without_mask.reason": ("", "", "why it has no mask"),
}


class PickapicInstance(AnnotatedDatasetBuilder):
    """
    The splits are those of the source. Annotated ties are in a separate split.
    """

    VERSION = Version("1.0.0")
    BUILDER_CONFIGS = [
        SourceConfig(
            name=PAIRS, version=VERSION, description="Pairs with their images, the columns of InstanceDPOTrainer."
        ),
        SourceConfig(name=ANNOTATIONS, version=VERSION, description="All annotations, without images."),
    ]
    DEFAULT_CONFIG_NAME = PAIRS

    TASK = "instances"
    TEMPLATE = Path(__file__).parent / "card.md"
    COLUMNS = COLUMNS
    TAGS = ["iapo", "diffusion-dpo", "bounding-boxes"]
    HAS_BOXES = True
    TRAINER = InstanceDPOTrainer

    def _info(self) -> DatasetInfo:
        features = instance_pair_features(self.has_masks) if self.config.name == PAIRS else self.annotation_features
        return DatasetInfo(description=self.config.description, features=features)

    @property
    def has_masks(self) -> bool:
        """Whether a segmenter was part of the runs."""
        return bool(self.config.annotations_dir) and any(
            "segmenter" in read_manifest(run) for run in self.runs().values()
        )

    @property
    def annotation_features(self) -> Features:
        return PAIR_MASK_FEATURES if self.has_masks else PAIR_ANNOTATION_FEATURES

    def annotations(self) -> dict[str, Dataset]:
        """The annotations of the run of each split."""
        return {split: load_annotations(run) for split, run in self.runs().items()}

    def joined(self, annotations: dict[str, Dataset]) -> dict[str, IterableDataset]:
        """The pairs of each split, and its annotated ties."""
        rows = {}
        for split, annotated in annotations.items():
            stream, columns = self.config.load_stream(split, pair_columns)
            rows |= self.join(split, stream, annotated, columns)
            rows |= self.join(f"{split}_ties", stream, annotated, columns, ties=True)
        return rows

    def picture(self, row: Row, with_images: bool) -> PIL.Image.Image:
        return pair_picture(row, with_images)

    def interest(self, row: Row) -> int:
        """The number of different preferences of its instances."""
        return len({instance["preference"] for instance in row["instances"]})

    def describe(self, annotations: dict[str, Dataset]) -> dict[str, Any]:
        """The manifests, and counts of the annotations."""
        manifests = [read_manifest(run) for run in self.runs().values()]
        first_split = manifests[0]["dataset"]["split"]
        for manifest in manifests:
            del manifest["dataset"]["split"], manifest["rows_per_shard"]
        if differing := differences(manifests):
            raise ValueError(
                f"The splits were not annotated in the same way: they differ in {listed(differing)}. Annotate them again, or "
                "build a dataset from each, with the folder of its run as `--annotations_dir`."
            )
        statuses, reasons, pairs, dropped, orders = {}, {}, {}, {}, {}
        labels, preferences, per_pair, unplanned = Counter(), Counter(), Counter(), 0
        prompt = describe_role(manifests[0]["judge"])["prompt"] or ""
        example = None
        for split, annotated in annotations.items():
            statuses[split], reasons[split], dropped[split] = Counter(), Counter(), Counter()
            pairs[split], pairs[f"{split}_ties"], orders[split] = Counter(), Counter(), Counter()
            for rows in blocks(annotated):
                ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
                example = example or max(ok, key=self.interest, default=None)
                statuses[split].update(count_statuses(rows))
                statuses[split].update(ties=sum(row["tie"] for row in rows))
                reasons[split].update(count_reasons(rows))
                dropped[split].update(public_reason(found["reason"]) for row in ok for found in row["dropped"])
                for name, ties in ((split, False), (f"{split}_ties", True)):
                    chosen = [row for row in ok if row["tie"] == ties]
                    pairs[name].update(count_instances(chosen), pairs=len(chosen))
                instances = [instance for row in ok for instance in row["instances"]]
                orders[split].update(count_orders(instances, prompt))
                labels.update(instance["label"] for instance in instances)
                preferences.update((found["label"], PREFERENCES[found["preference"]]) for found in instances)
                per_pair.update(len(row["instances"]) for row in ok)
                unplanned += sum(not row["instances"] and not row["dropped"] for row in ok)
        return self.recipe(manifests[0]) | {
            "annotated_split": first_split,
            "versions": join_versions(manifests),
            "statuses": statuses,
            "rows": sum(counts["rows"] for counts in statuses.values()),
            "reasons": reasons,
            "failures": count_failures(reasons, [role for role in ROLES if role in manifests[0]]),
            "unplanned": unplanned,
            "pairs": {name: counts for name, counts in pairs.items() if counts["pairs"]},
            "per_pair": per_pair,
            "labels": labels,
            "preferences": preferences,
            "orders": orders,
            "unread": sum(counts["unread"] for counts in orders.values()),
            "dropped": dropped,
            "total": sum((pairs[split] for split in annotations), Counter()),
            "example": example and example_row(public_reasons(example), self.annotation_features),
        }

    def recipe(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """What a manifest says of the annotation, for the card."""
        roles = {role: describe_role(manifest[role]) for role in ROLES if role in manifest}
        judge, detector = roles["judge"]["settings"], roles["detector"]["settings"]
        segmenter = roles["segmenter"]["settings"] if "segmenter" in roles else {}
        return {
            "annotated": public(manifest["dataset"]["name"]),
            "annotated_revision": manifest["dataset"].get("revision"),
            "is_pick_a_pic": manifest["columns"].get("image_0", "").startswith("jpg_0"),
            "is_english": all(is_shipped(roles[role], role) for role in ("planner", "judge")),
            "tie_policy": manifest["tie_policy"],
            "roles": roles,
            "models": models_of(roles),
            "paper_figures": PAPER_FIGURES,
            "flags": {
                "tie_policy": manifest["tie_policy"],
                **vlm_flags(judge),
                "detector": detector["model"],
                "detector_revision": commit(detector.get("revision")),
                "detector_threshold": detector.get("threshold"),
                "segmenter": segmenter.get("model"),
                "segmenter_revision": commit(segmenter.get("revision")),
                "max_instances": roles["planner"]["settings"].get("max_instances"),
                "crop_size": judge.get("crop_size"),
            },
        }

    def plan(self) -> dict[str, Any]:
        """The recipe with the command's defaults."""
        args = AnnotateInstancesArguments()
        vlm = PlannedVLM(args)
        detector = {"model": args.detector, "revision": UNRESOLVED, "threshold": args.detector_threshold}
        manifest = {
            "dataset": {"name": self.config.source, "revision": self.config.source_revision},
            "columns": {"image_0": "jpg_0"} if PICK_A_PIC.search(self.config.source) else {},
            "tie_policy": args.tie_policy,
            "planner": Planner(vlm, max_instances=args.max_instances).describe(),
            "detector": detector | {"dtype": args.detector_dtype},
            "judge": Judge(vlm, crop_size=args.crop_size).describe(),
        }
        return self.recipe(manifest) | not_measured(["train"])


def count_orders(instances: list[Row], prompt: str) -> Counter:
    """
    Counts how the judge's verdicts agree in both orders, from its raw answers.

    Args:
        instances (`list[dict]`):
            Annotated instances.
        prompt (`str`):
            Template of the judge's prompt, which tells an answer from a quote of the question.

    Returns:
        `Counter`: instances with two answers that can be `read`, and among them those that `agree` on an image, and those where the
        `first` or the `second` image won both times; and those that are `unread`.
    """
    counts = Counter(read=0, agree=0, first=0, second=0, unread=0)
    for instance in instances:
        verdicts = [read_verdict(instance[name], prompt, instance["label"]) for name in ("answer", "swapped_answer")]
        if None in verdicts:
            counts["unread"] += 1
        else:
            counts["read"] += 1
            counts["agree" if len(set(verdicts)) == 2 else {"A": "first", "B": "second"}[verdicts[0]]] += 1
    return counts


def read_verdict(answer: str, prompt: str, label: str) -> str | None:
    """The letter of the better image in a raw answer of the judge, as the run has read it."""
    if answer in PLAIN_VERDICTS:
        return PLAIN_VERDICTS[answer]
    found = validate(answer, Verdict, compiled(prompt).render(label=label).strip()).value
    return found and found.better
