# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What annotation costs beside its models: `python -m tests.benchmark.annotation [--num_pairs N] [--output FILE.json]`.

The models answer at once. All else is the real thing: rows out of Parquet, decoding, prompts, crops, images encoded for a
server, answers validated, shards written. The floor is decoding alone. Each figure is the best of several rounds, and all
are taken in turns in one process.
"""

import argparse
import io
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from datasets import Dataset, load_dataset
from PIL import Image

from trl_diffusion.annotation.detector import Detection, Detector
from trl_diffusion.annotation.endpoint_vlm import EndpointVLM
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Plan, Planner
from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.annotation.run import run, run_locally
from trl_diffusion.annotation.vlm import VLM, Request
from trl_diffusion.batching import CORES
from trl_diffusion.data.formats import instance_pair_features


ROUNDS = 3
INSTANCES = 1_205_593 / 959_040  # a pair, in IAPO's annotation of Pick-a-Pic v2


def answer(text: str, is_plan: bool) -> str:
    """Names one thing in three pairs of four and two in the fourth, about as many as the paper finds."""
    if not is_plan:
        return '{"better": "A"}'
    two = sum(text.encode()) % 100 < 100 * (INSTANCES - 1)
    return json.dumps({"instances": ["eagle", "red car"][: 1 + two]})


class InstantVLM(VLM):
    """In this process: it is given images as they are."""

    def describe(self) -> dict:
        return {"model": "instant", "revision": "1"}

    def generate(self, requests: list[Request]) -> list[str]:
        return [answer(request.text, request.schema is Plan) for request in requests]


class InstantServer(EndpointVLM):
    """Behind a server that answers at once: images are encoded, requests made, answers parsed; nothing is sent."""

    def __init__(self):
        super().__init__("http://localhost/v1", "instant")

    @property
    def client(self):
        return SimpleNamespace(chat_completion=self.complete)

    def complete(self, messages, **kwargs):
        json.dumps(messages)
        content = answer(messages[0]["content"][-1]["text"], "instances" in str(kwargs["response_format"]))
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=content))])


class InstantDetector(Detector):
    """Finds everything, in boxes of many sizes."""

    def describe(self) -> dict:
        return {"model": "instant", "revision": "1"}

    def detect(self, queries):
        sizes = np.random.default_rng(0).uniform(0.2, 0.6, (len(queries), 2))
        return [Detection([0.2, 0.3, 0.2 + width, 0.3 + height], 0.9) for width, height in sizes.tolist()]


def photograph(seed: int, size: int) -> bytes:
    """A JPEG with about the detail of a generated image: noise of all frequencies, the low ones strongest."""
    rng = np.random.default_rng(seed)
    image = np.zeros((size, size, 3))
    for scale in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.uniform(-1, 1, (scale, scale, 3)).astype(np.float32)
        channels = [
            Image.fromarray(noise[..., channel]).resize((size, size), Image.Resampling.BICUBIC) for channel in range(3)
        ]
        image += np.stack([np.asarray(channel) for channel in channels], -1) * 160 / scale**0.6
    buffer = io.BytesIO()
    Image.fromarray((128 + image).clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def make_pairs(folder: Path, num_pairs: int, size: int) -> float:
    """Writes pairs as Parquet; 64 different images are enough, since nothing is cached by content. KB an image."""
    images = [photograph(seed, size) for seed in range(64)]
    features = instance_pair_features()
    del features["instances"]
    rows = [
        {
            "id": str(index),
            "prompt": f"photograph {index}",
            "chosen": {"bytes": images[index % 64], "path": None},
            "rejected": {"bytes": images[(index + 7) % 64], "path": None},
        }
        for index in range(num_pairs)
    ]
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return sum(map(len, images)) / len(images) / 1000


def measure(num_pairs: int, size: int) -> dict:
    """Pairs a second of the floor, and of the run with a model in this process and behind a server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kilobytes = make_pairs(folder, num_pairs, size)
        dataset = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train", cache_dir=name)
        rows, columns = prepare_rows(dataset, pair_columns)

        def task(vlm: VLM):
            source = {"name": "photographs", "split": "train"}
            return instance_task(Planner(vlm), InstantDetector(), Judge(vlm), source, columns)

        def decode():
            with ThreadPoolExecutor(CORES) as pool:
                for _ in pool.map(task(InstantVLM()).open, rows):
                    pass

        def annotate(vlm: VLM, output_dir: Path):
            counts = run(rows, task(vlm), output_dir, run_locally).counts
            assert counts["ok"] == num_pairs and counts["instances"] > num_pairs

        arms = {
            "decoding": lambda _: decode(),
            "model in this process": lambda output_dir: annotate(InstantVLM(), output_dir),
            "model behind a server": lambda output_dir: annotate(InstantServer(), output_dir),
        }
        seconds = {arm: [] for arm in arms}
        work = {arm: [] for arm in arms}
        for number in range(ROUNDS):
            for arm, go in arms.items():
                start, start_of_work = time.perf_counter(), time.process_time()
                go(folder / f"{number} {arm}")
                seconds[arm].append(time.perf_counter() - start)
                work[arm].append(time.process_time() - start_of_work)
    return {
        "num_pairs": num_pairs,
        "size": size,
        "kilobytes_an_image": round(kilobytes, 1),
        "cores": len(os.sched_getaffinity(0)),
        "pairs_per_second": {arm: round(num_pairs / min(rounds), 1) for arm, rounds in seconds.items()},
        "cpu_milliseconds_per_pair": {arm: round(1000 * min(rounds) / num_pairs, 2) for arm, rounds in work.items()},
        "rounds": {arm: [round(num_pairs / second, 1) for second in rounds] for arm, rounds in seconds.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_pairs", type=int, default=1024)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = measure(args.num_pairs, args.size)
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
