# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Trainings that go wrong on purpose, and a grid of settings: each run is written when it is finished, and never repeated."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import TrainerCallback

from trl_diffusion import ComplexPOConfig, ComplexPOTrainer, InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.files import write_file
from trl_diffusion.quickstart import cpo, iapo
from trl_diffusion.quickstart.experiment import FAST, train_quietly
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.paintings import painting_dataset, sample_painting
from trl_diffusion.quickstart.sampling import generate, load_pipeline, shipped
from trl_diffusion.quickstart.world import evaluation_prompts, preference_dataset, sample_scene
from trl_diffusion.scripts.quickstart import PACKAGES
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer


SEED = 31
SHOWN = 3  # images of each step that are kept
METRICS = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "drift"),
    *("errors/chosen", "errors/rejected", "errors/ref_chosen", "errors/ref_rejected"),
)
MODEL = MODELS["unet"]


@dataclass(frozen=True)
class Run:
    """
    One training of a tiny base.

    Args:
        title (`str`):
            Its name in pictures.
        settings (`dict[str, Any]`, *optional*):
            What the trainer's config gets in place of the quickstart's.
        world (`str`, *optional*, defaults to `"scenes"`):
            `"scenes"` for Diffusion-DPO of all weights, `"paintings"` for CPO of a LoRA.
        swapped (`bool`, *optional*, defaults to `False`):
            Whether the columns `chosen` and `rejected` of all pairs are exchanged, held-out ones too.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    world: str = "scenes"
    swapped: bool = False


@dataclass(frozen=True)
class Sizes:
    """
    How large the runs are.

    Args:
        output_dir (`str`):
            Folder of the runs.
        num_rows (`int`, *optional*, defaults to `1024`):
            Rows to train on.
        num_held_out (`int`, *optional*, defaults to `16`):
            Other rows, to evaluate on.
        num_samples (`int`, *optional*, defaults to `64`):
            Images that are drawn and scored at a step.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows of an optimizer step.
        max_steps (`int`, *optional*, defaults to `96`):
            Optimizer steps.
        eval_steps (`int`, *optional*, defaults to `32`):
            Optimizer steps between two evaluations, each with images.
    """

    output_dir: str
    num_rows: int = 1024
    num_held_out: int = 16
    num_samples: int = 64
    batch_size: int = 16
    max_steps: int = 96
    eval_steps: int = 32


# Of the runs that do not say otherwise. On paintings, those of the quickstart, with paired targets
DEFAULTS = {
    "scenes": {**MODEL.pair_training, "beta": MODEL.pair_beta, "learning_rate": 2e-5},
    "paintings": {**MODEL.painting_training, "beta": MODEL.painting_beta, "attribute_targets": "paired"},
}
RUNS = {
    "healthy": Run("healthy"),
    "stabilized": Run("CPO-S", world="paintings"),
    "swapped": Run("labels swapped", swapped=True),
    "unstabilized": Run("CPO, not stabilised", {"loss_type": "unstabilized"}, world="paintings"),
    "too_slow": Run("learning rate 1e-7", {"learning_rate": 1e-7}),
    "fast": Run("learning rate 8e-5", {"learning_rate": 8e-5}),
    "too_fast": Run("learning rate 3e-4", {"learning_rate": 3e-4}),
    "too_long": Run("learning rate 8e-5, beta 20", {"learning_rate": 8e-5, "beta": 20.0}),
}
# The cells of a grid after this many steps: runs of above, and shorter ones for the others
LEARNING_RATES, BETAS, GRID_STEPS = (2e-5, 8e-5, 3e-4), (20.0, 2000.0, 200000.0), 64


def cell(learning_rate: float, beta: float) -> str:
    """Name of the run on scenes with these settings."""
    for name, run in RUNS.items():
        known = DEFAULTS["scenes"] | run.settings
        if (
            run.world == "scenes"
            and not run.swapped
            and (known["learning_rate"], known["beta"]) == (learning_rate, beta)
        ):
            return name
    return f"grid-{learning_rate:g}-{beta:g}"


GRID = {
    name: Run(
        f"learning rate {learning_rate:g}, beta {beta:g}",
        {"learning_rate": learning_rate, "beta": beta, "max_steps": GRID_STEPS},
    )
    for learning_rate in LEARNING_RATES
    for beta in BETAS
    if (name := cell(learning_rate, beta)) not in RUNS
}


class ScoreCallback(TrainerCallback):
    """
    Draws images before training and with every evaluation, scores them, and keeps the first ones as a strip.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, which is trained in place.
        name (`str`):
            Name of the run.
        world (`str`):
            `"scenes"` or `"paintings"`.
        sizes ([`Sizes`]):
            How many images are drawn, and the folder of the strips.
    """

    def __init__(self, pipeline: DiffusionPipeline, name: str, world: str, sizes: Sizes):
        self.pipeline, self.name, self.world, self.output_dir = pipeline, name, world, sizes.output_dir
        self.prompts = evaluation_prompts(sizes.num_samples, SEED, WORLDS[world].sample)
        self.scores: list[dict[str, float]] = []

    def on_evaluate(self, args, state, control, **kwargs):
        images = generate(self.pipeline, self.prompts, SEED)
        self.scores.append({"step": state.global_step, **WORLDS[self.world].score(images, self.prompts)})
        strip = Image.new("RGB", (SHOWN * images[0].width, images[0].height))
        for place, image in enumerate(images[:SHOWN]):
            strip.paste(image, (place * image.width, 0))
        file = strip_file(self.output_dir, self.name, state.global_step)
        file.parent.mkdir(parents=True, exist_ok=True)
        strip.save(file)


def make_pairs(num_rows: int, seed: int, run: Run) -> Dataset:
    """Pairs whose labels are right about both shapes, or wrong about both."""
    pairs = preference_dataset(num_rows, seed, conflict_rate=0.0).remove_columns("instances")
    return pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"}) if run.swapped else pairs


def make_paintings(num_rows: int, seed: int, run: Run) -> Dataset:
    """Paintings with their attributes."""
    return painting_dataset(num_rows, seed)


def pair_trainer(
    pipeline: DiffusionPipeline, rows: Dataset, held_out: Dataset, settings: dict[str, Any], callback: TrainerCallback
) -> InstanceDPOTrainer:
    """Diffusion-DPO of all weights."""
    args = InstanceDPOConfig(**settings)
    return InstanceDPOTrainer(pipeline, args=args, train_dataset=rows, eval_dataset=held_out, callbacks=[callback])


def painting_trainer(
    pipeline: DiffusionPipeline, rows: Dataset, held_out: Dataset, settings: dict[str, Any], callback: TrainerCallback
) -> ComplexPOTrainer:
    """CPO of a LoRA."""
    return ComplexPOTrainer(
        pipeline,
        expert=shipped(MODEL.expert),
        args=ComplexPOConfig(criteria=cpo.CRITERIA, **settings),
        train_dataset=rows,
        eval_dataset=held_out,
        peft_config=cpo.lora(pipeline),
        callbacks=[callback],
    )


def score_scenes(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Shares of the shapes that are clean, and that match the prompt."""
    shares = iapo.score(images, prompts)
    return {what: (shares[f"{what}_a"] + shares[f"{what}_b"]) / 2 for what in ("clean", "match")}


def score_paintings(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Share of the qualities that are positive, and of the images that match the prompt."""
    found = cpo.score(images, prompts)
    return {"clean": found["positives"] / (found["positives"] + found["negatives"]), "match": found["match"]}


@dataclass(frozen=True)
class World:
    """What the two worlds differ in: the base, its rows, its trainer, and how its images are sampled and scored."""

    base: str
    make_rows: Callable[[int, int, Run], Dataset]
    make_trainer: Callable[..., DiffusionTrainer]
    sample: Callable
    score: Callable[[list[Image.Image], list[str]], dict[str, float]]


WORLDS = {
    "scenes": World(MODEL.scenes, make_pairs, pair_trainer, sample_scene, score_scenes),
    "paintings": World(MODEL.paintings, make_paintings, painting_trainer, sample_painting, score_paintings),
}


def record_file(output_dir: str, name: str) -> Path:
    return Path(output_dir) / "runs" / f"{name}.json"


def strip_file(output_dir: str, name: str, step: int) -> Path:
    """Where the first images of a step are, side by side."""
    return Path(output_dir) / "runs" / name / f"step-{step:06d}.png"


def train(name: str, run: Run, sizes: Sizes) -> dict[str, Any]:
    """
    Trains a base as a run says.

    Args:
        name (`str`):
            Name of the run's files.
        run ([`Run`]):
            The run.
        sizes ([`Sizes`]):
            How large it is.

    Returns:
        `dict[str, Any]`: what was logged in `"train"` and `"eval"`, by the trainer's names, and the scores of the images in `"scores"`,
        each a list with an entry for each step.
    """
    world = WORLDS[run.world]
    pipeline = load_pipeline(world.base)
    callback = ScoreCallback(pipeline, name, run.world, sizes)
    settings = {
        **FAST,
        **DEFAULTS[run.world],
        "output_dir": str(Path(sizes.output_dir) / "trainers" / name),
        "seed": SEED,
        "max_steps": sizes.max_steps,
        "per_device_train_batch_size": sizes.batch_size,
        "per_device_eval_batch_size": sizes.batch_size,
        "logging_steps": 4,
        "logging_first_step": True,
        "eval_strategy": "steps",
        "eval_steps": sizes.eval_steps,
        "eval_on_start": True,
        "precompute": True,  # what the runs share is computed once
        "precompute_ref_preds": True,
        "precompute_dir": str(Path(sizes.output_dir) / "precomputed"),
        **run.settings,
    }
    rows = world.make_rows(sizes.num_rows, SEED, run)
    held_out = world.make_rows(sizes.num_held_out, SEED + 1, run)
    trainer = train_quietly(world.make_trainer(pipeline, rows, held_out, settings, callback))
    logs = trainer.state.log_history
    return {
        "train": [metrics_of(entry, "") for entry in logs if "loss" in entry],
        "eval": [metrics_of(entry, "eval_") for entry in logs if "eval_loss" in entry],
        "scores": callback.scores,
    }


def metrics_of(entry: dict[str, float], prefix: str) -> dict[str, float]:
    """The metrics of a log that the pages speak of, without their prefix."""
    names = [name for name in METRICS if prefix + name in entry]
    return {"step": entry["step"]} | {name: entry[prefix + name] for name in names}


def rounded(value: Any) -> Any:
    """A record with its numbers rounded to six digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run_once(name: str, sizes: Sizes) -> None:
    """Does a run of `RUNS` or `GRID`, unless it was done before with the same settings."""
    file, run = record_file(sizes.output_dir, name), (RUNS | GRID)[name]
    settings = settings_of(run, sizes)
    if file.exists() and json.loads(file.read_text())["settings"] == settings:
        return
    torch.set_num_threads(1)
    start = time.perf_counter()
    record = {"settings": settings, **rounded(train(name, run, sizes))}
    record["seconds"] = round(time.perf_counter() - start)
    write_file(file, json.dumps(record).encode())
    print(f"{name}: {record['seconds']} s", flush=True)


def settings_of(run: Run, sizes: Sizes) -> dict[str, Any]:
    """What the results of a run depend on."""
    known = asdict(sizes) | DEFAULTS[run.world] | run.settings
    known |= {"per_device_train_batch_size": known.pop("batch_size"), "swapped": run.swapped}
    return {name: value for name, value in known.items() if name != "output_dir"}


def collect(sizes: Sizes) -> dict[str, Any]:
    """All runs, and the versions of the packages: what the tables and the pictures are made from."""
    runs = {name: json.loads(record_file(sizes.output_dir, name).read_text()) for name in RUNS | GRID}
    return {"versions": {package: version(package) for package in PACKAGES}, "runs": runs}
