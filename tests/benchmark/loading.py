# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Pairs that one core prepares in a second: JPEG files are decoded, resized, cropped and packed into a batch by the collator, and
by the way it was done before, which packed 32-bit numbers. Both take turns; times are CPU time of the one thread.

```bash
OMP_NUM_THREADS=1 python -m tests.benchmark.loading --output docs/source/benchmarks/loading_cpu.json
```
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

from tests.benchmark.check_dataset import photograph
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.images import open_image
from trl_diffusion.data.transforms import normalize_pixels


CASES = (
    (512, 512),
    (512, 640),
    (512, 4608),
    (1024, 1024),
    (1024, 1152),
    (1024, 8704),
)  # resolution, side of the files
BATCH_SIZE = 2


def float_pixels(image: PIL.Image.Image, resolution: int) -> torch.Tensor:
    """The pixels as they were prepared before: decoded in full, 32-bit numbers in [-1, 1], channels last in memory."""
    image = image.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)
    return VaeImageProcessor.normalize(VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))[0])


def float_batch(rows: list[dict[str, Any]], resolution: int) -> dict[str, torch.Tensor]:
    return {
        f"{column}_pixel_values": torch.stack([float_pixels(open_image(row[column]), resolution) for row in rows])
        for column in ("chosen", "rejected")
    }


def seconds(function: Callable[[], Any]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def measure(resolution: int, side: int, repeats: int) -> dict[str, float]:
    """Pairs a second before and after, and how far apart the pixels are, in steps of 1 / 255."""
    files = [photograph(seed, side) for seed in range(2 * BATCH_SIZE)]
    rows = [
        {"id": str(row), "prompt": "", "chosen": files[2 * row], "rejected": files[2 * row + 1]}
        for row in range(BATCH_SIZE)
    ]
    collate = InstancePairCollator(resolution)
    before, after = float_batch(rows, resolution), collate(rows)
    difference = (normalize_pixels(after["chosen_pixel_values"]) - before["chosen_pixel_values"]).abs() * 127.5
    times = [(seconds(lambda: float_batch(rows, resolution)), seconds(lambda: collate(rows))) for _ in range(repeats)]
    old, new = (statistics.median(values) for values in zip(*times, strict=True))
    return {
        "resolution": resolution,
        "side": side,
        "pairs_per_second_before": BATCH_SIZE / old,
        "pairs_per_second": BATCH_SIZE / new,
        "ratio": statistics.median(old / new for old, new in times),
        "mean_difference": difference.mean().item(),
        "max_difference": difference.max().item(),
        "megabytes_per_pair_before": 2 * before["chosen_pixel_values"][0].nbytes / 1e6,
        "megabytes_per_pair": 2 * after["chosen_pixel_values"][0].nbytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.loading")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print("resolution   side   pairs/s before   after   ratio   difference of 255: mean   max", flush=True)
    for resolution, side in CASES:
        results.append(result := measure(resolution, side, args.repeats))
        print(
            f"{resolution:10} {side:6} {result['pairs_per_second_before']:16.1f} {result['pairs_per_second']:7.1f} "
            f"{result['ratio']:7.2f} {result['mean_difference']:25.3f} {result['max_difference']:5.1f}",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps({"pillow": PIL.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
