# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
How the objectives of `objectives.py` are run: each at the learning rate that was best on a seed of its own, then on all seeds.
A run is written when it is finished, and never repeated.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from trl_diffusion.files import write_file
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.sampling import generate, load_pipeline
from trl_diffusion.scripts.quickstart import PACKAGES

from .arms import Sizes, generate_guided, last_metrics
from .objectives import BREAKING, WORLDS, World
from .runs import settings_of


TUNING_SEED = 10
STEP = 3  # from one learning rate of the grid to the next
GRID = (-1, 0, 1)  # powers of `STEP`; more as long as the best is at an end
MAX_POWER = 4  # where the grid ends
TOLERANCE = 0.01  # by how much an arm may match less often than the base
BROKEN = 0.9  # below this share of matches, an arm is broken


def folder_of(world: str, name: str, seed: int, rate: float | None, sizes: Sizes) -> Path:
    """Where the run of an arm with a seed and a learning rate is kept: beside this folder is a file of the same name."""
    written = "" if rate is None else f"-{rate:.1e}"
    return Path(sizes.output_dir) / "objectives" / world / f"{name}-{seed}{written}"


def run(world: str, name: str, seed: int, rate: float | None, sizes: Sizes) -> dict[str, Any]:
    """The scores of an arm with a seed and a learning rate, `None` if it trains nothing; from its file if it was run before."""
    file = Path(f"{folder_of(world, name, seed, rate, sizes)}.json")
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    start, place = time.perf_counter(), WORLDS[world]
    objective, pipeline, record = place.arms[name], load_pipeline(place.pipeline), {}
    # Half as many images are enough to choose a learning rate
    prompts = place.prompts(sizes.num_samples // 2 if seed == TUNING_SEED else sizes.num_samples, seed)
    if objective.train is not None:
        settings = {
            "output_dir": str(folder_of(world, name, seed, rate, sizes)),
            "seed": seed,
            "max_steps": sizes.max_steps,
            "learning_rate": rate,
            "precompute": True,
            "precompute_dir": str(Path(sizes.output_dir) / "precomputed"),
        }
        trainer = objective.train(pipeline, rows_of(world, seed, sizes), settings | objective.settings)
        record = {"learning_rate": rate} | last_metrics(trainer)
        if place.rows is painting_dataset:  # a LoRA, which an arm of guidance may use
            trainer.save_model()
    if objective.negative:

        def folder(arm: str) -> str:
            return str(folder_of(world, arm, seed, rate_of(world, arm, sizes), sizes))

        images = generate_guided(pipeline, objective.positive, objective.negative, folder, prompts, seed)
    else:
        images = generate(pipeline, prompts, seed)
    record = {"arm": name, "seed": seed} | place.score(images, prompts) | record
    record["seconds"] = round(time.perf_counter() - start, 1)
    write_file(file, json.dumps(record).encode())
    written = "" if rate is None else f", learning rate {rate:.1e}"
    print(f"{world}, {name}, seed {seed}{written}: {record['seconds']:.0f} s", flush=True)
    return record


def rows_of(world: str, seed: int, sizes: Sizes) -> Dataset:
    """The data of a seed, made once."""
    folder = Path(sizes.output_dir) / "rows" / f"{world}-{seed}"
    if not folder.exists():
        made = folder.with_name(f"{folder.name}-{time.time_ns()}")
        WORLDS[world].rows(sizes.num_rows, seed).save_to_disk(str(made))
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            pass
    return load_from_disk(str(folder))


# ----- learning rates -----


def tune(world: str, name: str, sizes: Sizes) -> float:
    """
    Chooses the learning rate of an arm on the tuning seed: the best of three, a factor of three apart, and of further ones as long as
    the best is at an end.

    Args:
        world (`str`):
            Name of the world.
        name (`str`):
            Name of the arm.
        sizes ([`Sizes`]):
            How large the runs are, and where they are.

    Returns:
        `float`: the learning rate.
    """
    place, base = WORLDS[world], run(world, "base", TUNING_SEED, None, sizes)
    records = {power: run_power(world, name, power, sizes) for power in GRID}
    best = best_of(place, records, base)
    while best in (min(records), max(records)) and abs(best) < MAX_POWER:
        further = best - 1 if best == min(records) else best + 1
        records[further] = run_power(world, name, further, sizes)
        best = best_of(place, records, base)
    return rate_at(place, best)


def best_of(world: World, records: dict[int, dict[str, Any]], base: dict[str, Any]) -> int:
    """
    The power whose scores are the best among those that match the prompt about as often as the base. If none does, the one that
    matches most often.
    """
    sound = [power for power in records if world.match(records[power]) >= world.match(base) - TOLERANCE]
    if not sound:
        return max(records, key=lambda power: world.match(records[power]))
    return max(sound, key=lambda power: world.goodness(records[power]))


def breaking_rate(world: str, sizes: Sizes) -> float:
    """The smallest learning rate of the grid, continued upwards, at which the world's reference arm breaks; or the largest tried."""
    place = WORLDS[world]
    for power in range(max(GRID), MAX_POWER + 1):
        if place.match(run_power(world, place.reference, power, sizes)) < BROKEN:
            break
    return rate_at(place, power)


def rate_at(world: World, power: int) -> float:
    return world.learning_rate * float(STEP) ** power


def run_power(world: str, name: str, power: int, sizes: Sizes) -> dict[str, Any]:
    return run(world, name, TUNING_SEED, rate_at(WORLDS[world], power), sizes)


def rate_of(world: str, name: str, sizes: Sizes) -> float | None:
    """The learning rate of an arm on the seeds; `None` if it trains nothing."""
    objective = WORLDS[world].arms[name]
    if objective.rate_of == BREAKING:
        return breaking_rate(world, sizes)
    return None if objective.train is None else tune(world, objective.rate_of or name, sizes)


# ----- the study -----


def tuned_arms() -> list[tuple[str, str]]:
    """All worlds and arms whose learning rate is chosen, in an order in which the first of each world computes what others share."""
    return [(world, name) for world, place in WORLDS.items() for name, arm in place.arms.items() if arm.is_tuned]


def run_seed(world: str, seed: int, sizes: Sizes) -> None:
    """Runs all arms of a world with a seed."""
    for name in WORLDS[world].arms:
        run(world, name, seed, rate_of(world, name, sizes), sizes)


def collect(seeds: list[int], sizes: Sizes) -> dict[str, Any]:
    """All runs, those that chose the learning rates apart from the others, with settings and versions."""
    runs = {
        world: [run(world, name, seed, rate_of(world, name, sizes), sizes) for name in place.arms for seed in seeds]
        for world, place in WORLDS.items()
    }
    kept = {world: sorted((Path(sizes.output_dir) / "objectives" / world).glob("*.json")) for world in WORLDS}
    read = {world: [json.loads(file.read_text()) for file in files] for world, files in kept.items()}
    tuning = {
        world: [record for record in records if record["seed"] == TUNING_SEED] for world, records in read.items()
    }
    settings = {"seeds": seeds, "tuning_seed": TUNING_SEED, "arms": "objectives", **settings_of(sizes)}
    packages = {package: version(package) for package in PACKAGES}
    return {"settings": settings, "versions": packages, "tuning": tuning, "runs": runs}
