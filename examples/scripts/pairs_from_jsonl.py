# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
#     "datasets",
# ]
# ///

"""
Turns a folder of image pairs with a JSON lines file in your own format into a dataset with the columns of
`InstanceDPOTrainer`.

```bash
python examples/scripts/pairs_from_jsonl.py --input_dir real_pairs --output_dir real_pairs_dataset
trl-diffusion show-masks --dataset_name real_pairs_dataset --output_dir masks
trl-diffusion instance-dpo --dataset_name real_pairs_dataset --model_name_or_path ... --output_dir ...
```

It reads lines like this one (other keys are ignored), with paths relative to the file and boxes in pixels:

    {"id": "001", "prompt": "a cow", "chosen": "images/001_chosen.jpg", "rejected": "images/001_rejected.jpg",
     "instances": [{"label": "cow", "box_chosen": [15, 12, 512, 512], "box_rejected": [25, 57, 512, 512],
                    "better": "chosen"}]}

If your lines look different, change `to_row`. If you can choose their format, choose one that needs no script at all: see "A
folder of images" in docs/source/dataset_formats.md.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset

from trl_diffusion import instance_pair_features


def to_row(line: dict, folder: Path) -> dict:
    """From one line to one row with the columns `id`, `prompt`, `chosen`, `rejected`, `instances`."""
    return {
        "id": line["id"],
        "prompt": line["prompt"],
        # The bytes as they are, so that the dataset holds the unchanged images
        "chosen": {"bytes": (folder / line["chosen"]).read_bytes(), "path": None},
        "rejected": {"bytes": (folder / line["rejected"]).read_bytes(), "path": None},
        "instances": [
            {
                "label": instance["label"],
                "chosen_box": instance["box_chosen"],
                "rejected_box": instance["box_rejected"],
                "preference": instance["better"],
            }
            for instance in line["instances"]
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument(
        "--input_dir", type=Path, required=True, help="Folder with the images and the JSON lines file."
    )
    parser.add_argument("--file_name", default="pairs.jsonl", help="Name of the JSON lines file.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the dataset.")
    args = parser.parse_args()

    lines = [json.loads(line) for line in (args.input_dir / args.file_name).read_text().splitlines()]
    dataset = Dataset.from_list([to_row(line, args.input_dir) for line in lines], features=instance_pair_features())
    args.output_dir.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(args.output_dir / "train.parquet")
    num_instances = sum(len(instances) for instances in dataset["instances"])
    print(f"Wrote {len(dataset)} pairs with {num_instances} instances to {args.output_dir}.")
