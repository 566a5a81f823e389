# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What it costs that caches follow content: hashing image files and rows the first time and again, the weights of a model, and the
checksum of a row as a share of its look-up. In CPU seconds, so that what else the machine does counts less.

```bash
python -m tests.benchmark.contents --output contents.json
```
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value

from trl_diffusion.data import caching, content
from trl_diffusion.data.caching import TensorCache, precompute_dataset
from trl_diffusion.data.row_contents import RowContents
from trl_diffusion.trainer.fingerprints import module_fingerprint


def cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def image_files(folder: Path, number: int, size: int) -> dict[str, float]:
    """Rows of one image file each: the first start, and the next."""
    paths = []
    for row in range(number):
        paths.append(str(folder / f"{row}.png"))
        Path(paths[-1]).write_bytes(os.urandom(size))
        os.utime(paths[-1], (1e9, 1e9))
    made = Dataset.from_dict({"id": [str(row) for row in range(number)], "image": paths})
    first, again = (cpu_seconds(lambda: RowContents(made, ("image",)).of(np.arange(number))) for _ in range(2))
    return {
        "first, GB/s": number * size / first / 1e9,
        "first, us a row": 1e6 * first / number,
        "again, us a row": 1e6 * again / number,
    }


def rows_of_a_file(folder: Path, number: int, size: int) -> dict[str, float]:
    """The same of memory-mapped rows with the bytes of their images."""
    table = pa.table({"id": [str(row) for row in range(number)], "image": [os.urandom(size) for _ in range(number)]})
    path = folder / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    made = Dataset.from_file(str(path))
    first, again = (cpu_seconds(lambda: RowContents(made, ("image",)).of(np.arange(number))) for _ in range(2))
    return {
        "first, GB/s": number * size / first / 1e9,
        "first, us a row": 1e6 * first / number,
        "again, us a row": 1e6 * again / number,
    }


class Weights(torch.nn.Module):
    config = {}

    def __init__(self, number: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(number).bfloat16(), requires_grad=False)


def look_ups(folder: Path, size: int, rounds: int) -> dict[str, float]:
    """Batches of 8 rows with and without the checksum, in turns."""
    rows = Dataset.from_dict({"id": [str(row) for row in range(64)]})

    def encode(batch: list[dict]) -> list[dict]:
        return [row | {"latents": torch.randn(size // 4)} for row in batch]

    features, quiet = Features({"id": Value("string")}), {"say": lambda text: None}
    cache = TensorCache(precompute_dataset(rows, encode, features, f"rows {size}", "0", folder, 8, **quiet), "id")
    keys = [[str((place + row) % 64) for row in range(8)] for place in range(0, 64, 8)]

    def work() -> None:
        for some in keys:
            cache.look_up(some)

    seconds = {"with": [], "without": []}
    for _ in range(rounds):
        seconds["with"].append(cpu_seconds(work))
        with mock.patch.object(caching, "check_tensors", lambda row: None):
            seconds["without"].append(cpu_seconds(work))
    one, other = (statistics.median(values) / 64 for values in seconds.values())
    return {"us a row": 1e6 * one, "without, us a row": 1e6 * other, "share": 1 - other / one}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.contents")
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, mock.patch.object(content, "TICK_NS", 0):
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        found = {
            "image files of 200 kB": image_files(folder, args.number, 200_000),
            "rows of a file, images of 200 kB": rows_of_a_file(folder, args.number, 200_000),
        }
        weights = Weights(50_000_000)
        found["weights"] = {"GB/s": 0.1 / cpu_seconds(lambda: module_fingerprint(weights))}
        for size, what in ((65_536, "64 kB"), (262_144, "256 kB"), (1_048_576, "1 MB"), (4_194_304, "4 MB")):
            found[f"look-up of rows of {what}"] = look_ups(folder, size, args.rounds)
    for what, values in found.items():
        print(f"{what}: {', '.join(f'{key} {value:.3g}' for key, value in values.items())}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
