# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Image pairs with the instances that both images share, for IAPO (Sun et al., CVPR 2026)."""

from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, IterableDataset, Version

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
from trl_diffusion import InstanceDPOTrainer, instance_pair_features
from trl_diffusion.annotation.instances import count_instances
from trl_diffusion.annotation.join import differences, listed, load_annotations, read_manifest
from trl_diffusion.annotation.records import PAIR_ANNOTATION_FEATURES, STATUSES, pair_columns


PAIRS = "pairs"
ROLES = ("planner", "detector", "judge")


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
    TAGS = ["iapo"]
    TRAINER = InstanceDPOTrainer

    def _info(self) -> DatasetInfo:
        features = instance_pair_features() if self.config.name == PAIRS else PAIR_ANNOTATION_FEATURES
        return DatasetInfo(description=self.config.description, features=features)

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

    def describe(self, annotations: dict[str, Dataset]) -> dict[str, Any]:
        """The manifests, and counts of the annotations."""
        manifests = [read_manifest(run) for run in self.runs().values()]
        for manifest in manifests:
            del manifest["dataset"]["split"], manifest["rows_per_shard"]
        if differing := differences(manifests):
            raise ValueError(
                f"The splits were not annotated in the same way: they differ in {listed(differing)}. Annotate them again, or "
                "build a dataset from each, with the folder of its run as `--annotations_dir`."
            )
        statuses, reasons, pairs, dropped = {}, {}, {}, {}
        for split, annotated in annotations.items():
            statuses[split], reasons[split], dropped[split] = Counter(), Counter(), Counter()
            pairs[split], pairs[f"{split}_ties"] = Counter(), Counter()
            for rows in blocks(annotated):
                ok = [row for row in rows if STATUSES[row["status"]] == "ok"]
                statuses[split].update(count_statuses(rows))
                statuses[split].update(ties=sum(row["tie"] for row in rows))
                reasons[split].update(count_reasons(rows))
                dropped[split].update(found["reason"] for row in ok for found in row["dropped"])
                for name, ties in ((split, False), (f"{split}_ties", True)):
                    chosen = [row for row in ok if row["tie"] == ties]
                    pairs[name].update(count_instances(chosen), pairs=len(chosen))
        return {
            "annotated": public(manifests[0]["dataset"]["name"]),
            "annotated_revision": manifests[0]["dataset"].get("revision"),
            "is_pick_a_pic": "image_0" in manifests[0]["columns"],
            "tie_policy": manifests[0]["tie_policy"],
            "roles": {role: describe_role(manifests[0][role]) for role in ROLES},
            "versions": join_versions(manifests),
            "statuses": statuses,
            "reasons": reasons,
            "pairs": {name: counts for name, counts in pairs.items() if counts["pairs"]},
            "dropped": dropped,
            "total": sum((pairs[split] for split in annotations), Counter()),
        }
