# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The runs of a study: each is one arm with one seed, is written when it is finished, and is never repeated."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trl_diffusion.files import write_file
from trl_diffusion.scripts.quickstart import PACKAGES

from .arms import ARMS, RUN, Sizes, folder_of


def run_seed(world: str, seed: int, sizes: Sizes) -> None:
    """Runs the arms of a world with a seed, except those that were run before."""
    torch.set_num_threads(1)
    for name in ARMS[sizes.model][world]:
        file = Path(folder_of(world, name, seed, sizes.output_dir) + ".json")
        if file.exists():
            continue
        start = time.perf_counter()
        record = RUN[world](name, seed, sizes) | {"arm": name, "seed": seed}
        record["seconds"] = round(time.perf_counter() - start, 1)
        write_file(file, json.dumps(record).encode())
        print(f"{world}, {name}, seed {seed}: {record['seconds']:.0f} s", flush=True)


def collect(seeds: list[int], sizes: Sizes) -> dict[str, Any]:
    """All runs, their settings, and the versions of the packages: what the tables and the pictures are made from."""
    runs = {
        world: [
            json.loads(Path(folder_of(world, name, seed, sizes.output_dir) + ".json").read_text())
            for name in arms
            for seed in seeds
        ]
        for world, arms in ARMS[sizes.model].items()
    }
    settings = {"seeds": seeds, **settings_of(sizes)}
    return {"settings": settings, "versions": {package: version(package) for package in PACKAGES}, "runs": runs}


def settings_of(sizes: Sizes) -> dict[str, Any]:
    """The settings that all runs of a folder share."""
    return {name: getattr(sizes, name) for name in ("model", "num_rows", "max_steps", "num_samples")}


def check_settings(sizes: Sizes) -> None:
    """Raises a `ValueError` if the folder holds runs with other settings."""
    file = Path(sizes.output_dir) / "settings.json"
    if not file.exists():
        write_file(file, json.dumps(settings_of(sizes)).encode())
    elif (earlier := json.loads(file.read_text())) != settings_of(sizes):
        raise ValueError(
            f"{sizes.output_dir} holds runs with {earlier}, not {settings_of(sizes)}: choose another `--output_dir`."
        )
