# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Small sources with every kind of row, their annotations by the quickstart's oracle, and the built datasets."""

import json
import re
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict, Image, IterableDataset

from datasets_builders.common import main, make_parser
from datasets_builders.painting_attributes import PaintingAttributes
from datasets_builders.pickapic_instance import PickapicInstance
from trl_diffusion import Criteria
from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.attributes import attribute_task
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Plan, Planner
from trl_diffusion.annotation.records import image_columns, pair_columns, prepare_rows
from trl_diffusion.annotation.run import Run, run, run_locally
from trl_diffusion.annotation.vlm import Request
from trl_diffusion.quickstart.oracle import OracleDetector, OracleVLM
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset


CRITERIA = shipped("criteria.yaml")


class StumblingVLM(OracleVLM):
    """Gives no plan for prompts that begin with a circle, and plans a missing shape for those with a red square."""

    def answer(self, request: Request) -> dict:
        answer = super().answer(request)
        if request.schema is Plan and "a red square" in request.text:
            answer["instances"].append("left red circle")
        return answer

    def generate(self, requests: list[Request]) -> list[str]:
        return [
            "I see nothing" if is_plan_of_circle(request) else json.dumps(self.answer(request)) for request in requests
        ]


def is_plan_of_circle(request: Request) -> bool:
    return request.schema is Plan and any(
        f"a {color} circle and" in request.text for color in ("red", "green", "blue")
    )


def pairs(num_rows: int = 24, seed: int = 0) -> Dataset:
    """Pairs of the quickstart's world, without instances."""
    return preference_dataset(num_rows, seed).remove_columns("instances")


def pick_a_pic(num_rows: int = 24, with_uids: bool = True) -> Dataset:
    """Pairs in the columns of Pick-a-Pic v2. Depending on the row number modulo 3, the better image is the first, the
    second or neither; every sixth row has no label. An image of row 7 is broken."""
    rows = []
    for index, row in enumerate(undecoded(pairs(num_rows))):
        # Files with extra bytes, which encoding them again would remove
        images = [row[name]["bytes"] + b"what a decoder does not read" for name in ("chosen", "rejected")]
        label = [1.0, 0.0, 0.5][index % 3]
        if label == 0.0:
            images.reverse()
        rows.append(
            {
                "ranking_id": 1000 + index,
                "caption": row["prompt"],
                "jpg_0": b"no image" if index == 7 else images[0],
                "jpg_1": images[1],
                "label_0": label,
                "has_label": index % 6 != 5,
                "image_0_uid": f"uid-{index}-0",
                "image_1_uid": f"uid-{index}-1",
                "user_id": 7,
            }
        )
    dataset = Dataset.from_list(rows)
    return dataset if with_uids else dataset.remove_columns(["image_0_uid", "image_1_uid"])


def paintings(num_rows: int = 40, seed: int = 0) -> Dataset:
    """Paintings without attributes. The image of row 3 is broken."""
    rows = list(undecoded(painting_dataset(num_rows, seed).select_columns(["id", "prompt", "image"])))
    rows[3]["image"]["bytes"] = b"no image"
    dataset = Dataset.from_list(rows)
    return dataset.cast_column("image", Image())


def undecoded(dataset):
    """The same rows, with undecoded images."""
    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def annotate_pairs(
    dataset,
    folder: Path,
    split: str = "train",
    tie_policy: str = "drop",
    vlm=None,
    crop_size: int = 64,
    name="world",
    segmenter=None,
) -> Run:
    """Annotates pairs like the command."""
    rows, columns = prepare_rows(dataset, pair_columns)
    vlm = vlm or OracleVLM()
    task = instance_task(
        Planner(vlm),
        OracleDetector(),
        Judge(vlm, crop_size=crop_size),
        {"name": name, "split": split},
        columns,
        tie_policy=tie_policy,
        rows_per_shard=5,
        segmenter=segmenter,
    )
    return run(rows, task, folder, run_locally, max_error_rate=1.0)


def annotate_paintings(dataset, folder: Path, split: str = "train") -> Run:
    """Annotates paintings like the command."""
    rows, columns = prepare_rows(dataset, image_columns)
    expert = AttributeExpert(OracleVLM(), Criteria.load(CRITERIA))
    task = attribute_task(expert, {"name": "paintings", "split": split}, columns, rows_per_shard=7)
    return run(rows, task, folder, run_locally, max_error_rate=1.0)


# ----- building -----


def save(path: Path, **splits: Dataset) -> Path:
    """A folder from `save_to_disk`."""
    DatasetDict(splits).save_to_disk(path)
    return path


def build_pairs(source: Path, annotations: Path, out: Path, *flags: str) -> None:
    """`python -m datasets_builders.pickapic_instance` in this process."""
    parser = make_parser("pickapic_instance", "pairs")
    main(PickapicInstance, parser.parse_args(arguments(source, annotations, out, *flags)))


def build_paintings(source: Path, annotations: Path, out: Path, *flags: str, criteria: str = CRITERIA) -> None:
    """`python -m datasets_builders.painting_attributes` in this process."""
    parser = make_parser("painting_attributes", "images")
    main(PaintingAttributes, parser.parse_args(arguments(source, annotations, out, *flags)), criteria)


def arguments(source: Path, annotations: Path, out: Path, *flags: str) -> list[str]:
    named = {"--dataset_name": source, "--annotations_dir": annotations, "--output_dir": out}
    return [str(part) for pair in named.items() for part in pair] + list(flags)


def rows(dataset: Dataset | IterableDataset) -> list[dict]:
    """Rows with the bytes of the images."""
    return list(dataset.decode(False) if isinstance(dataset, IterableDataset) else undecoded(dataset))


def card_of(folder: Path) -> tuple[dict, str]:
    """The YAML metadata and the text of a card."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a text, without the header."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines()[2:]] for table in found]
