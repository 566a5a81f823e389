# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Time of the checks that a trainer makes of a dataset in memory, and of reading rows with paths of images from a file.

```bash
python -m tests.benchmark.million_rows --rows 1000000
```
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from PIL import Image

from trl_diffusion import Criteria, attribute_features, instance_pair_features
from trl_diffusion.data.formats import check_attribute_columns, prepare_dataset
from trl_diffusion.data.sources import load_source


PAIR, PAINTING = ("prompt", "chosen", "rejected"), ("prompt", "image", "positive_attributes", "negative_attributes")


def lists(values: pa.Array, each: int) -> pa.ListArray:
    """Lists of one length."""
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, each), pa.int32()), values)


def pairs(rows: int) -> Dataset:
    """Pairs with two instances each, and without images."""
    boxes = lists(pa.array(np.tile(np.float32([2, 4, 400, 500]), 2 * rows)), 4)
    preferences = pa.array(np.arange(2 * rows) % 3, pa.int64())
    labels = pa.array(["cat", "dog"] * rows)
    instances = pa.StructArray.from_arrays(
        [labels, boxes, boxes, preferences], ["label", "chosen_box", "rejected_box", "preference"]
    )
    names, image = pa.array([str(row) for row in range(rows)]), {"bytes": b"no image", "path": None}
    table = {"id": names, "prompt": names, "chosen": pa.array([image] * rows), "rejected": pa.array([image] * rows)}
    return Dataset(pa.table(table | {"instances": lists(instances, 2)})).cast(instance_pair_features())


def paintings(rows: int, criteria: Criteria) -> Dataset:
    """Paintings with six attributes each, and without images."""
    ids = [attribute.id for attribute in criteria.attributes]
    codes = np.arange(6 * rows).reshape(rows, 6) % len(ids)
    taken = [pa.array(ids).take(pa.array(half.ravel())) for half in (codes[:, :3], codes[:, 3:])]
    halves = [lists(values, 3) for values in taken]
    names, image = pa.array([str(row) for row in range(rows)]), {"bytes": b"no image", "path": None}
    table = {"id": names, "prompt": names, "image": pa.array([image] * rows)}
    table |= dict(zip(PAINTING[2:], halves, strict=True))
    return Dataset(pa.table(table)).cast(attribute_features())


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.million_rows")
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    dataset, criteria = pairs(rows), Criteria.load("painting")
    shuffled = dataset.shuffle(seed=0)
    print(f"{rows:,} rows")
    print(f"pairs, all checks: {seconds(lambda: prepare_dataset(dataset, 'train_dataset', PAIR, PAIR[1:])):.1f} s")
    print(f"... shuffled: {seconds(lambda: prepare_dataset(shuffled, 'train_dataset', PAIR, PAIR[1:])):.1f} s")
    dataset = paintings(rows, criteria)
    print(f"paintings: {seconds(lambda: prepare_dataset(dataset, 'train_dataset', PAINTING, PAINTING[1:2])):.1f} s")
    print(f"... their attributes: {seconds(lambda: check_attribute_columns(dataset, 'd', criteria, False)):.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1000):
            Image.new("RGB", (8, 8)).save(Path(folder) / f"{number}.png")
        with (Path(folder) / "pairs.jsonl").open("w") as file:
            for row in range(rows):
                images = {name: f"{(row + place) % 1000}.png" for place, name in enumerate(PAIR[1:])}
                file.write(json.dumps({"id": str(row), "prompt": f"a cat {row}", **images}) + "\n")
        for turn in ("first", "second"):
            time_of_turn = seconds(lambda: load_source(str(Path(folder) / "pairs.jsonl")))
            print(f"pairs.jsonl with paths of images, {turn} time: {time_of_turn:.1f} s")


if __name__ == "__main__":
    main()
