# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Time of `check-dataset`: makes pairs of JPEG files, each with other bytes, and reads them all.

```bash
python -m tests.benchmark.check_dataset --rows 10000
```
"""

import argparse
import io
import tempfile
import time

import numpy as np
from datasets import Dataset
from PIL import Image

from trl_diffusion import instance_pair_features
from trl_diffusion.data.check import as_text, check_dataset


FILES = 200  # photographs that are drawn; what follows the end of a JPEG makes the bytes of each row its own


def photograph(seed: int, side: int) -> bytes:
    """Smooth shades with some noise, about as large as a photograph of this size."""
    rng = np.random.default_rng(seed)
    shades = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)).resize((side, side))
    pixels = np.asarray(shades).astype(int) + rng.integers(-12, 13, (side, side, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.check_dataset")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=512)
    args = parser.parse_args()
    files = [photograph(seed, args.side) for seed in range(FILES)]
    box = [2, 4, args.side - 8, args.side - 2]

    def rows():
        for row in range(args.rows):
            images = [files[(row + place) % FILES] + str(row).encode() for place in (0, 7)]
            instance = {"label": "cat", "chosen_box": box, "rejected_box": box, "preference": row % 3}
            yield {
                **{"id": str(row), "prompt": f"a cat {row}", "instances": [instance] * (row % 3)},
                **{name: {"bytes": data, "path": None} for name, data in zip(("chosen", "rejected"), images)},
            }

    with tempfile.TemporaryDirectory() as cache:
        dataset = Dataset.from_generator(rows, features=instance_pair_features(), cache_dir=cache)
        start, used = time.perf_counter(), time.process_time()
        report = check_dataset(dataset, ("prompt", "chosen", "rejected"), ("chosen", "rejected"), args.side)
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
    print("\n".join(as_text(report)))
    print(f"{args.rows} pairs of {args.side} x {args.side} pixels: {seconds:.1f} s, {cpu:.1f} s of CPU time")


if __name__ == "__main__":
    main()
