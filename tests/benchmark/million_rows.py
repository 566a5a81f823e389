# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Time and memory of what depends on the number of rows: the start of each trainer, live and precomputed, joining annotations, reading
files of rows. No model of weight, and no images where none is decoded.

```bash
python -m tests.benchmark.million_rows --rows 10000 100000 1000000 --output rows.json
```

Memory is the largest that a process holds beside what it maps from files, above what it held before. `--arms` chooses arms.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from PIL import Image

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    Criteria,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    attribute_features,
    instance_pair_features,
    join_annotations,
)
from trl_diffusion.annotation.records import PAIR_ANNOTATION_FEATURES
from trl_diffusion.data.buckets import TRAINING_SIZE, BucketSampler, training_sizes
from trl_diffusion.data.caching import TENSORS, Encoding, precompute_dataset, write_example
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.content import SealedFile
from trl_diffusion.data.encoded_files import CONTENT, EncodedFiles
from trl_diffusion.data.formats import check_attribute_columns, prepare_dataset
from trl_diffusion.data.sources import load_source
from trl_diffusion.trainer import precompute as precomputation
from trl_diffusion.trainer.precompute import Precomputation
from trl_diffusion.trainer.run_record import dataset_fingerprint


PAIR, PAINTING = ("prompt", "chosen", "rejected"), ("prompt", "image", "positive_attributes", "negative_attributes")
ROWS_OF_A_PROMPT = 15  # as in 851,293 pairs for 58,960 prompts
SETTINGS = {"max_steps": 1, "report_to": "none", "use_cpu": True, "resolution": 32, "save_strategy": "no"}
Arm = Callable[[int, Path], Callable[[], object]]  # from a number of rows and a folder to what is measured


# ----- rows -----


def lists(values: pa.Array, each: int) -> pa.ListArray:
    """Lists of one length."""
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, each), pa.int32()), values)


def instances(rows: int) -> pa.ListArray:
    """Two instances for each row."""
    boxes = lists(pa.array(np.tile(np.float32([2, 4, 400, 500]), 2 * rows)), 4)
    preferences = pa.array(np.arange(2 * rows) % 3, pa.int64())
    labels = pa.array(["cat", "dog"] * rows)
    return lists(
        pa.StructArray.from_arrays(
            [labels, boxes, boxes, preferences], ["label", "chosen_box", "rejected_box", "preference"]
        ),
        2,
    )


def images(rows: int, name: str) -> pa.StructArray:
    content = pa.array([f"{name} {row}".encode() for row in range(rows)])
    return pa.StructArray.from_arrays([content, pa.nulls(rows, pa.string())], ["bytes", "path"])


def pair_table(rows: int) -> Dataset:
    """Pairs with two instances each, and without images."""
    prompts = pa.array([f"a cat {row // ROWS_OF_A_PROMPT}" for row in range(rows)])
    table = {"id": pa.array([str(row) for row in range(rows)]), "prompt": prompts}
    table |= {name: images(rows, name) for name in PAIR[1:]} | {"instances": instances(rows)}
    return Dataset(pa.table(table)).cast(instance_pair_features())


def painting_table(rows: int) -> Dataset:
    """Paintings with six attributes each, and without images."""
    ids = [attribute.id for attribute in Criteria.load("painting").attributes]
    codes = np.arange(6 * rows).reshape(rows, 6) % len(ids)
    taken = [pa.array(ids).take(pa.array(half.ravel())) for half in (codes[:, :3], codes[:, 3:])]
    names = pa.array([str(row) for row in range(rows)])
    table = {"id": names, "prompt": names, "image": images(rows, "image")}
    table |= dict(zip(PAINTING[2:], (lists(values, 3) for values in taken), strict=True))
    return Dataset(pa.table(table)).cast(attribute_features())


def annotation_table(rows: int) -> Dataset:
    """Annotations of [`pair_table`], in another order, without uids."""
    names = pa.array([str(row) for row in reversed(range(rows))])
    table = {"id": names, "status": pa.array(np.zeros(rows, int)), "instances": instances(rows)}
    features = Features({name: PAIR_ANNOTATION_FEATURES[name] for name in table if name != "instances"})
    return Dataset(pa.table(table)).cast(Features({**features, "instances": instance_pair_features()["instances"]}))


def on_disk(folder: Path, rows: int, make: Callable[[int], Dataset]) -> Dataset:
    """Rows that are memory-mapped, in chunks of 1000."""
    path = folder.parent / f"{make.__name__}-{rows}.arrow"
    if not path.exists():
        write_arrow(path, make(rows))
    return Dataset.from_file(str(path))


def write_arrow(path: Path, dataset: Dataset) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, dataset.features.arrow_schema) as writer:
        writer.write_table(dataset.data.table.cast(dataset.features.arrow_schema), max_chunksize=1000)


# ----- arms: checks -----


def pair_checks(rows: int, folder: Path):
    dataset = on_disk(folder, rows, pair_table)
    return lambda: prepare_dataset(dataset, "train_dataset", PAIR, PAIR[1:])


def shuffled_pair_checks(rows: int, folder: Path):
    dataset = on_disk(folder, rows, pair_table).shuffle(seed=0)
    return lambda: prepare_dataset(dataset, "train_dataset", PAIR, PAIR[1:])


def no_ids(rows: int, folder: Path):
    dataset = on_disk(folder, rows, pair_table).remove_columns("id")
    return lambda: prepare_dataset(dataset, "train_dataset", PAIR, PAIR[1:])


def shuffled_no_ids(rows: int, folder: Path):
    dataset = on_disk(folder, rows, pair_table).remove_columns("id").shuffle(seed=0)
    return lambda: prepare_dataset(dataset, "train_dataset", PAIR, PAIR[1:])


def painting_checks(rows: int, folder: Path):
    dataset = on_disk(folder, rows, painting_table)
    return lambda: prepare_dataset(dataset, "train_dataset", PAINTING, PAINTING[1:2])


def attribute_checks(rows: int, folder: Path):
    dataset, criteria = on_disk(folder, rows, painting_table), Criteria.load("painting")
    return lambda: check_attribute_columns(dataset, "train_dataset", criteria, False)


def run_record(rows: int, folder: Path):
    dataset = on_disk(folder, rows, pair_table)
    return lambda: dataset_fingerprint(dataset, (*PAIR, "id", "instances"))


# ----- arms: starts -----


def start(trainer: Callable, config: Callable, dataset: Dataset, folder: Path, **given) -> None:
    """Everything up to the first row of the first batch, and the record that the first checkpoint holds."""
    settings = {name: given.pop(name) for name in list(given) if name in config.__dataclass_fields__}
    args = config(str(folder / "output"), precompute_dir=str(folder / "precomputed"), **SETTINGS | settings)
    made = trainer(tiny.sd_pipeline(), args=args, train_dataset=dataset, peft_config=tiny.lora(), **given)
    next(iter(made.get_train_dataloader().batch_sampler))
    assert made.run_record["num_rows"] == len(dataset)


def iapo_start(rows: int, folder: Path):
    dataset = on_disk(folder, rows, pair_table)
    return lambda: start(InstanceDPOTrainer, InstanceDPOConfig, dataset, folder)


def sft_start(rows: int, folder: Path):
    dataset = on_disk(folder, rows, painting_table)
    return lambda: start(AttributeSFTTrainer, AttributeSFTConfig, dataset, folder)


def cpo_start(rows: int, folder: Path, **settings):
    dataset = on_disk(folder, rows, painting_table)
    config = AttributeSFTConfig(str(folder / "expert"), **SETTINGS)
    expert = AttributeSFTTrainer(tiny.sd_pipeline(), args=config, peft_config=tiny.lora())
    return lambda: start(ComplexPOTrainer, ComplexPOConfig, dataset, folder, expert=expert, **settings)


def precomputed(begin: Callable[[], None]) -> Callable[[], None]:
    """The same start, where everything is precomputed already."""
    with mock.patch.object(precomputation, "Encoding", Filled):
        begin()
    return begin


class Filled(Encoding):
    """Writes what would be encoded, with the same few numbers in each row."""

    def _expected_size(self, missing: np.ndarray, keys: pa.LargeStringArray) -> int:
        return 0

    def run(self) -> Dataset:
        tensors, schema = write_example({"latents": torch.zeros(4)})[TENSORS], self.features.arrow_schema
        known = self.dataset.select_columns([name for name in self.features if name in self.dataset.column_names])
        contents = dict(zip(self.needed.tolist(), self.found.to_pylist(), strict=True))
        for path, numbers in self.parts.items():
            columns = dict(known.with_format("arrow")[numbers].to_pydict())
            columns.setdefault(TRAINING_SIZE, [[32, 32]] * len(numbers))
            columns[TENSORS] = [tensors] * len(numbers)
            columns[CONTENT] = [contents[number] for number in numbers]
            table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
            file = SealedFile(path, self.files.prefix)
            with pa.ipc.new_stream(file, schema) as writer:
                writer.write_table(table, max_chunksize=100)
            file.finish()
        self.parts = {}
        self.files = EncodedFiles(self.folder, self.files.prefix, self.features)
        return super().run()


def precomputed_iapo_start(rows: int, folder: Path, **settings):
    settings = {"precompute": True, "prompt_dropout": 0.1, "precompute_ref_preds": True, "max_steps": -1} | settings
    settings = {"num_train_epochs": 1} | settings
    dataset = on_disk(folder, rows, pair_table)
    return precomputed(lambda: start(InstanceDPOTrainer, InstanceDPOConfig, dataset, folder, **settings))


def some_precomputed_iapo_start(rows: int, folder: Path):
    """1024 steps of 8 rows."""
    return precomputed_iapo_start(rows, folder, max_steps=1024)


def precomputed_cpo_start(rows: int, folder: Path):
    return precomputed(cpo_start(rows, folder, precompute=True, max_steps=-1, num_train_epochs=1))


# ----- arms: buckets, join, files -----


def bucket_sizes_of_rows(rows: int, folder: Path):
    """Sizes of pairs of true images: of a JPEG of 8 pixels, the same in each row."""
    path = folder / "image.jpg"
    Image.new("RGB", (8, 8)).save(path)
    stored = pa.array([{"bytes": path.read_bytes(), "path": None}]).take(pa.array(np.zeros(rows, int)))
    table = pa.table({"id": [str(row) for row in range(rows)], "chosen": stored, "rejected": stored})
    features = {name: feature for name, feature in instance_pair_features().items() if name in table.column_names}
    write_arrow(folder / "sized.arrow", Dataset(table).cast(Features(features)))
    dataset = Dataset.from_file(str(folder / "sized.arrow"))
    for name in PAIR[1:]:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    collator = InstancePairCollator(32, buckets=[(32, 32), (24, 40)])
    return lambda: training_sizes(dataset, collator.size, "sizes")


def bucket_sampler(rows: int, folder: Path):
    sizes = lists(pa.array(np.tile([32, 32, 24, 40], rows // 2), pa.int32()), 2)
    dataset = Dataset(pa.table({TRAINING_SIZE: sizes}))

    def measured() -> None:
        next(iter(BucketSampler(training_sizes(dataset, None, ""), 4, 0, lambda: 0)))

    return measured


def join(rows: int, folder: Path):
    source, annotations = on_disk(folder, rows, pair_table), on_disk(folder, rows, annotation_table)
    return lambda: join_annotations(source, annotations)


def files_of_rows(rows: int, folder: Path):
    """Reads a new file of rows with paths of images."""
    for number in range(1000):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    with (folder / f"pairs{rows}.jsonl").open("w") as file:
        for row in range(rows):
            names = {name: f"{(row + place) % 1000}.png" for place, name in enumerate(PAIR[1:])}
            file.write(json.dumps({"id": str(row), "prompt": f"a cat {row}", **names}) + "\n")
    return lambda: load_source(str(folder / f"pairs{rows}.jsonl"))


def files_of_rows_again(rows: int, folder: Path):
    read = files_of_rows(rows, folder)
    read()
    return read


def precompute_nothing(rows: int, folder: Path):
    """Rows with four small tensors, which nothing is computed for."""
    dataset = on_disk(folder, rows, pair_table).select_columns(["id", "prompt"])
    features = Features({"id": Value("string"), "prompt": Value("string")})
    tensors = {name: torch.zeros(4) for name in "abcd"}

    def encode(batch: list[dict]) -> list[dict]:
        return [row | tensors for row in batch]

    return lambda: precompute_dataset(dataset, encode, features, "nothing", "0", folder / "nothing", 16)


ARMS: dict[str, Arm] = {
    "checks of pairs": pair_checks,
    "checks of pairs, shuffled": shuffled_pair_checks,
    "checks of pairs without ids": no_ids,
    "checks of pairs without ids, shuffled": shuffled_no_ids,
    "checks of paintings": painting_checks,
    "checks of attributes": attribute_checks,
    "hash of all rows for the run record": run_record,
    "start of IAPO": iapo_start,
    "start of the expert": sft_start,
    "start of CPO": cpo_start,
    "start of IAPO, all precomputed": precomputed_iapo_start,
    "start of IAPO, 8192 rows precomputed": some_precomputed_iapo_start,
    "start of CPO, all precomputed": precomputed_cpo_start,
    "precomputing nothing": precompute_nothing,
    "sizes for buckets": bucket_sizes_of_rows,
    "sampler of buckets": bucket_sampler,
    "join without images": join,
    "file of rows, first time": files_of_rows,
    "file of rows, second time": files_of_rows_again,
}


# ----- reading, encoding and writing at once -----


class SlowCollator(InstancePairCollator):
    """Takes as long as it is told for a row, without work."""

    seconds = 0.0

    def prepare(self, row: dict) -> dict:
        time.sleep(self.seconds)
        pixels = {f"{name}_pixel_values": torch.zeros(3, 8, 8) for name in self.image_columns}
        return {"id": row["id"], "prompt": row["prompt"], **pixels}


def overlap(reading: float, encoding: float, rows: int = 400, batch_size: int = 8) -> float:
    """
    Seconds of a precomputation, as a multiple of what its slower part takes alone.

    Args:
        reading (`float`), encoding (`float`):
            Seconds that a row takes to be read, on as many threads as there are cores, and to be encoded.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare_dataset(pair_table(rows), "train_dataset", PAIR, PAIR[1:])
        collator = SlowCollator(8)
        SlowCollator.seconds = reading

        def encode_images(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            time.sleep(encoding * len(pixels) / 2)
            return torch.zeros(len(pixels), 4, 64, 64), torch.zeros(len(pixels), 4, 64, 64)

        encoder = SimpleNamespace(
            device=torch.device("cpu"), half_dtype=None, encode_images=encode_images, fingerprint=lambda name: name
        )
        start = time.perf_counter()
        Precomputation(encoder, collator, batch_size, folder).images(dataset, "train_dataset").run()
        taken = time.perf_counter() - start
    return taken / (rows * max(reading / os.cpu_count(), encoding))


# ----- measuring -----


def work(arm: str, rows: int, folder: Path, pipe: Connection) -> None:
    """Runs an arm in a process of its own, and says when what is measured begins and how long it took."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    measured = ARMS[arm](rows, folder)
    pipe.send(None)
    pipe.recv()
    begin, worked = time.perf_counter(), time.process_time()
    measured()
    pipe.send((time.perf_counter() - begin, time.process_time() - worked))
    pipe.recv()


def own_memory(pid: int) -> int:
    """Bytes of a process that are mapped from no file."""
    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def measure(arm: str, rows: int, folder: Path) -> dict[str, float]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmark.million_rows"])
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(arm, rows, folder, theirs))
    process.start()
    theirs.close()
    pipe.recv()
    before = peak = own_memory(process.pid)
    pipe.send(None)
    while not pipe.poll(0.02):
        peak = max(peak, own_memory(process.pid))
    seconds, cpu = pipe.recv()
    pipe.send(None)
    process.join()
    mib = round((peak - before) / 2**20, 1)
    return {"arm": arm, "rows": rows, "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "mib": mib}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.million_rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help="names of arms, or parts of names")
    parser.add_argument("--overlap", type=int, default=5, help="how often the overlap is measured")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = {"rows": [], "overlap": {}}
    arms = [arm for arm in ARMS if any(part in arm for part in args.arms)]
    print(f"| arm | {' | '.join(f'{rows:,} rows' for rows in args.rows)} |\n|---|{'---|' * len(args.rows)}")
    root = Path(tempfile.mkdtemp())  # with tables of rows that arms share
    for arm in arms:
        cells = []
        for rows in args.rows:
            folder = root / "arm"
            folder.mkdir()
            results["rows"].append(measure(arm, rows, folder))
            shutil.rmtree(folder)
            cells.append("{seconds:.2f} s ({cpu_seconds:.2f} s of CPU), {mib:.0f} MiB".format(**results["rows"][-1]))
            if args.output:
                args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"| {arm} | {' | '.join(cells)} |", flush=True)
    shutil.rmtree(root)
    for name, reading, encoding in (("reading", 20e-3, 5e-3), ("encoding", 5e-3, 10e-3), ("both", 20e-3, 10e-3)):
        if args.overlap:
            found = [overlap(reading, encoding) for _ in range(args.overlap)]
            results["overlap"][name] = found
            print(f"overlap, {name} slowest: {statistics.median(found):.2f} times as long as that alone", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
