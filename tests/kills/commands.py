# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Small runs as code for `python -c`, which are killed and repeated. Each writes a line to a log for a piece of work that it does."""

from pathlib import Path

import numpy as np
from PIL import Image

from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.annotation.run import run, run_locally
from trl_diffusion.evaluation import generate
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import load_protocol
from trl_diffusion.evaluation.run import evaluate_models
from trl_diffusion.metrics.scorer import Scorer
from trl_diffusion.quickstart.oracle import OracleVLM
from trl_diffusion.quickstart.world import preference_dataset


def code(function: str, *args) -> list:
    """The arguments of Python that run a function of this module."""
    return ["-c", f"import sys; from tests.kills import commands; commands.{function}(*sys.argv[1:])", *map(str, args)]


def note(log: str, line: str) -> None:
    with open(log, "a") as file:
        file.write(f"{line}\n")


def evaluate(folder: str, output_dir: str, log: str) -> None:
    """An evaluation of the models of a folder, with the mean of the pixels as its only score."""

    class Brightness(Scorer):
        """Mean value of the pixels of an image."""

        name = "brightness"

        def prepare(self, image: Image.Image) -> float:
            return float(np.asarray(image, dtype=np.float64).mean())

        def score_batch(self, prepared, prompts):
            note(log, "\n".join(["score"] * len(prepared)))
            return prepared

    sample_images = generate.sample_images

    def sampling(*args, **settings):
        note(log, "\n".join(f"sample {key}" for key in settings["keys"]))
        return sample_images(*args, **settings)

    generate.sample_images = sampling
    names = [path.name for path in sorted(Path(folder).iterdir()) if path.is_dir()]
    specs = [resolve_model(name, str(Path(folder, name))) for name in names]
    protocol = load_protocol(None, num_inference_steps=1, guidance_scale=1.0, height=32, width=32)
    prompts = load_prompts(Path(folder, "prompts.txt"))
    evaluate_models(specs, prompts, protocol, {"brightness": Brightness}, output_dir, batch_size=1, use_cpu=True)


class NotingVLM(OracleVLM):
    """Writes the number of requests to a log."""

    def __init__(self, log: str):
        self.log = log

    def describe(self) -> dict:
        return OracleVLM().describe()

    def generate(self, requests):
        note(self.log, f"ask {len(requests)}")
        return super().generate(requests)


def annotate(output_dir: str, log: str, num_rows: str, streaming: str) -> None:
    """Annotates pairs of the quickstart, 4 rows a shard."""
    from tests.annotation.test_run import make_task

    dataset = preference_dataset(int(num_rows), 0).remove_columns("instances")
    dataset = dataset.to_iterable_dataset(num_shards=2) if streaming == "stream" else dataset
    rows, columns = prepare_rows(dataset, pair_columns)
    run(rows, make_task(columns, NotingVLM(log)), output_dir, run_locally, disable_tqdm=True)


def build(source: str, annotations: str, output_dir: str) -> None:
    """Builds a dataset from annotated pairs, as `python -m datasets_builders.pickapic_instance`."""
    from tests.datasets_builders import sources

    sources.build_pairs(Path(source), Path(annotations), Path(output_dir))
