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
annotates the scenes of the quickstart without any model. `--segmenter facebook/sam2.1-hiera-large` gives instances masks besides boxes.

What is pushed, with its images and a card, is what `python -m datasets_builders.pickapic_instance` builds, so it needs a clone of the
repository. For more than a few thousand pairs use the command `trl-diffusion annotate-instances` with a server, and that builder.
"""

import argparse
import shutil
import sys
from pathlib import Path

from datasets import load_dataset

from trl_diffusion import join_annotations, load_annotations
from trl_diffusion.annotation.detector import TransformersDetector
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.annotation.run import run, run_locally
from trl_diffusion.annotation.segmenter import TransformersSegmenter
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.hub import check_repository_name
from trl_diffusion.quickstart.oracle import OracleDetector, OracleSegmenter, OracleVLM


def check_push(repository: str) -> None:
    """Ends the script, before anything is annotated, if the dataset could not be built and pushed afterwards."""
    check_repository_name(repository, "`--push_to_hub`")
    sys.path.append(str(Path(__file__).parents[2]))
    try:
        import datasets_builders  # noqa: F401
    except ImportError:
        sys.exit(
            "`--push_to_hub` needs the builders of datasets, which are in the repository and not in the package: run this file in "
            "a clone, or leave the flag out."
        )


def push(args: argparse.Namespace, annotations: Path) -> None:
    """Builds the dataset with its card in `OUTPUT_DIR/published`, and pushes it."""
    from datasets_builders.common import main, make_parser
    from datasets_builders.pickapic_instance import PickapicInstance

    folder = args.output_dir / "published"
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--dataset_name", args.dataset_name, "--annotations_dir", str(annotations), "--output_dir", str(folder)]
    flags += ["--push_to_hub", args.push_to_hub, "--push_images", *(["--private"] if args.private else [])]
    flags += ["--hub_revision", args.hub_revision] if args.hub_revision else []
    flags += ["--hub_token", args.hub_token] if args.hub_token else []
    main(PickapicInstance, make_parser("pickapic_instance", PickapicInstance.DEFAULT_CONFIG_NAME).parse_args(flags))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder of the pairs.")
    parser.add_argument("--split", default="train", help="The split to annotate.")
    parser.add_argument("--vlm", default="Qwen/Qwen2.5-VL-7B-Instruct", help="Planner and judge.")
    parser.add_argument("--detector", default="IDEA-Research/grounding-dino-base", help="Zero-shot detector.")
    parser.add_argument("--segmenter", help="Model that gives instances masks besides boxes.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the annotations.")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="Repository for the dataset, with its images.")
    parser.add_argument("--private", action="store_true", help="Make the repository private if it is new.")
    parser.add_argument("--hub_revision", help="Branch to push to.")
    parser.add_argument("--hub_token", help="Token for the push. Defaults to that of `hf auth login` or HF_TOKEN.")
    args = parser.parse_args()
    if args.push_to_hub:
        check_push(args.push_to_hub)

    pairs = load_dataset(args.dataset_name, split=args.split)
    vlm = OracleVLM() if args.vlm == "oracle" else TransformersVLM(args.vlm)
    detector = OracleDetector() if args.detector == "oracle" else TransformersDetector(args.detector)
    segmenter = None
    if args.segmenter:
        segmenter = OracleSegmenter() if args.segmenter == "oracle" else TransformersSegmenter(args.segmenter)

    rows, columns = prepare_rows(pairs, pair_columns)
    source = {"name": args.dataset_name, "split": args.split}
    task = instance_task(Planner(vlm), detector, Judge(vlm), source, columns, segmenter=segmenter)
    finished = run(rows, task, args.output_dir, run_locally)
    print(f"{finished.counts['conflicts']} of {finished.counts['instances']} instances contradict their pair's label.")

    dataset = join_annotations(pairs, load_annotations(finished.folder))
    dataset.save_to_disk(args.output_dir / "dataset")
    if args.push_to_hub:
        push(args, finished.folder)
