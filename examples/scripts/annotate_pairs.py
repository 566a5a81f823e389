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
Annotates pairs of images with instances, joins both into one dataset, and pushes the dataset that `InstanceDPOTrainer` trains on.

```bash
python examples/scripts/annotate_pairs.py --dataset_name my_pairs --output_dir annotations --push_to_hub user/my-pairs
```

`my_pairs` has the columns `prompt`, `chosen` and `rejected`, see docs/source/dataset_formats.md. If it is stopped,
the same command continues. The dataset is also written to `annotations/dataset`. `--vlm oracle --detector oracle`
annotates the scenes of the quickstart without any model.

For more than a few thousand pairs use the command `trl-diffusion annotate-instances` with a server. For a dataset with a card use
`python -m datasets_builders.pickapic_instance`.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from trl_diffusion import join_annotations, load_annotations
from trl_diffusion.annotation.detector import TransformersDetector
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.annotation.run import run, run_locally
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.hub import pushing
from trl_diffusion.quickstart.oracle import OracleDetector, OracleVLM


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder of the pairs.")
    parser.add_argument("--split", default="train", help="The split to annotate.")
    parser.add_argument("--vlm", default="Qwen/Qwen2.5-VL-7B-Instruct", help="Planner and judge.")
    parser.add_argument("--detector", default="IDEA-Research/grounding-dino-base", help="Zero-shot detector.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the annotations.")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="Repository for the dataset.")
    args = parser.parse_args()

    pairs = load_dataset(args.dataset_name, split=args.split)
    vlm = OracleVLM() if args.vlm == "oracle" else TransformersVLM(args.vlm)
    detector = OracleDetector() if args.detector == "oracle" else TransformersDetector(args.detector)

    rows, columns = prepare_rows(pairs, pair_columns)
    source = {"name": args.dataset_name, "split": args.split}
    task = instance_task(Planner(vlm), detector, Judge(vlm), source, columns)
    finished = run(rows, task, args.output_dir, run_locally)
    print(f"{finished.counts['conflicts']} of {finished.counts['instances']} instances contradict their pair's label.")

    dataset = join_annotations(pairs, load_annotations(finished.folder))
    dataset.save_to_disk(args.output_dir / "dataset")
    if args.push_to_hub:
        with pushing(f"The dataset is saved in {args.output_dir / 'dataset'}."):
            dataset.push_to_hub(args.push_to_hub, split=args.split)
