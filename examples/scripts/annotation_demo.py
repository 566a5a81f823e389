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
Shows the pages that `--preview` of both annotation commands writes, without a GPU, a model or a download.

```bash
python examples/scripts/annotation_demo.py --output_dir demo
```

It draws pairs and paintings of the quickstart's worlds into `demo/my_pairs` and `demo/my_paintings`, in the folder layouts that
every command reads, and previews six of each. The oracle, a program that knows these worlds, answers in place of the
vision-language model and the detector. The chosen image of the sixth pair is cut off, so that you see an error as well.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset, Image

from trl_diffusion.cli.main import main
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset


NUM_SHOWN = 6


def write_pairs(pairs: Dataset, folder: Path) -> None:
    """Writes `chosen/001.png`, its prompt in `chosen/001.txt`, and `rejected/001.png` for each pair. One chosen image is cut off."""
    for name in ("chosen", "rejected"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pairs = pairs.cast_column(name, Image(decode=False))
    for number, row in enumerate(pairs, start=1):
        for name in ("chosen", "rejected"):
            (folder / name / f"{number:03}.png").write_bytes(row[name]["bytes"])
        (folder / "chosen" / f"{number:03}.txt").write_text(row["prompt"], encoding="utf-8")
    broken = folder / "chosen" / f"{NUM_SHOWN:03}.png"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])


def write_paintings(paintings: Dataset, folder: Path) -> None:
    """Writes `001.png` and its prompt in `001.txt` for each painting."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(paintings.cast_column("image", Image(decode=False)), start=1):
        (folder / f"{number:03}.png").write_bytes(row["image"]["bytes"])
        (folder / f"{number:03}.txt").write_text(row["prompt"], encoding="utf-8")


def preview(command: str, data: Path, output_dir: Path, *flags: str) -> None:
    """Prints a command with `--preview`, and runs it."""
    words = [command, "--dataset_name", str(data), "--vlm", "oracle", *flags]
    words += ["--preview", str(NUM_SHOWN), "--output_dir", str(output_dir)]
    print("trl-diffusion", *words)
    if status := main(words):
        sys.exit(status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="Folder for the data and the pages.")
    parser.add_argument("--num_rows", type=int, default=NUM_SHOWN, help="Number of pairs, and of paintings.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the data.")
    args = parser.parse_args()
    if args.num_rows < NUM_SHOWN:
        parser.error(f"--num_rows must be at least {NUM_SHOWN}, the number of rows that the pages show.")

    pairs, paintings = args.output_dir / "my_pairs", args.output_dir / "my_paintings"
    write_pairs(preference_dataset(args.num_rows, args.seed), pairs)
    write_paintings(painting_dataset(args.num_rows, args.seed), paintings)
    preview("annotate-instances", pairs, args.output_dir / "instances", "--detector", "oracle")
    criteria = shipped("criteria.yaml")
    preview("annotate-attributes", paintings, args.output_dir / "attributes", "--criteria", criteria)
