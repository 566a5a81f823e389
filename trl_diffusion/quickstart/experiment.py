# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What both experiments of the quickstart do: annotate a world's data, train the base in several ways, compare the results."""

import io
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from PIL import Image
from transformers import PrinterCallback

from ..annotation.join import join_annotations, load_annotations
from ..annotation.records import prepare_rows
from ..annotation.run import Task, run, run_locally
from ..trainer.diffusion_trainer import DiffusionTrainer
from .models import MODELS
from .sampling import generate, load_pipeline
from .steps import Outcome, step_file
from .world import evaluation_prompts


# Settings for trainings of half a minute: no checkpoints, no trackers, and nothing that helps large models only
FAST = {
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 20,
    "activation_checkpointing": False,
    "bf16": False,
    "dataloader_pin_memory": False,
}
TRAINING = "training"  # folder with the labelled rows and what is precomputed of them


def train_quietly(trainer: DiffusionTrainer) -> DiffusionTrainer:
    """Trains without printing the logs."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


@dataclass(frozen=True)
class Arm:
    """
    One way to train the base model.

    Args:
        title (`str`):
            Its name in tables and pictures.
        train (`Callable`):
            Takes a pipeline, a labelled dataset and settings, and trains the pipeline in place.
        settings (`dict[str, Any]`):
            What the trainer's config gets besides the settings that all arms share.
    """

    title: str
    train: Callable
    settings: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """
    One half of the quickstart: a world, and the ways to train on it that are compared.

    Args:
        name (`str`):
            Name of the world, `"scenes"` or `"paintings"`.
        arms (`dict[str, Arm]`):
            The ways to train it, by their names in `results.json`.
        figures (`dict[str, tuple[str, str]]`):
            Which scores the report shows: the heading and the format of each.
        unlabelled_rows (`Callable`):
            Makes the training data without its labels, from the number of rows and a seed.
        find_columns (`Callable`):
            Tells which columns hold what, such as [`annotation.records.pair_columns`].
        annotation_task (`Callable`):
            Makes the task that finds the labels, from the source that the manifest names and the columns.
        sample_scene (`Callable`):
            Samples what an image shows from a `np.random.Generator`; the result has a `prompt`.
        score (`Callable`):
            Scores images, given their prompts.
    """

    name: str
    arms: dict[str, Arm]
    figures: dict[str, tuple[str, str]]
    unlabelled_rows: Callable[[int, int], Dataset]
    find_columns: Callable[[list[str], dict[str, str] | None], dict[str, str]]
    annotation_task: Callable[[dict[str, Any], dict[str, str]], Task]
    sample_scene: Callable
    score: Callable[[list[Image.Image], list[str]], dict[str, float]]


def annotate(experiment: Experiment, num_rows: int, seed: int, output_dir: str) -> tuple[str, dict[str, int]]:
    """
    Finds the labels of an experiment's data, in one thread.

    Args:
        experiment ([`Experiment`]):
            The experiment.
        num_rows (`int`):
            Number of rows.
        seed (`int`):
            Seed of the data.
        output_dir (`str`):
            The annotations are written to its folder `annotations`, with the labelled rows, which all arms share.

    Returns:
        `tuple`: the folder of these annotations, and the counts of the run.
    """
    torch.set_num_threads(1)
    unlabelled = experiment.unlabelled_rows(num_rows, seed)
    rows, columns = prepare_rows(unlabelled, experiment.find_columns)
    source = {"name": experiment.name, "split": experiment.name, "num_rows": num_rows, "seed": seed}
    task = experiment.annotation_task(source, columns)
    finished = run(rows, task, Path(output_dir) / "annotations", run_locally, disable_tqdm=True)
    labelled = join_annotations(unlabelled, load_annotations(finished.folder))
    labelled.save_to_disk(Path(finished.folder) / TRAINING)
    return str(finished.folder), dict(finished.counts)


def run_arm(
    experiment: Experiment,
    model: str,
    name: str,
    annotations: str,
    num_rows: int,
    max_steps: int,
    num_samples: int,
    seed: int,
    output_dir: str,
) -> Outcome:
    """
    Trains the base as an arm says, generates images with it, and scores them, in one thread.

    Args:
        experiment ([`Experiment`]):
            The experiment.
        model (`str`):
            The kind of model, a key of [`quickstart.models.MODELS`].
        name (`str`):
            The arm, or `"base"` to train nothing.
        annotations (`str`):
            Folder of the annotations, see [`annotate`].
        num_rows (`int`):
            Number of rows to train on, the first of those that were annotated.
        max_steps (`int`):
            Optimizer steps.
        num_samples (`int`):
            Number of images.
        seed (`int`):
            Seed of the data, of the training and of the images.
        output_dir (`str`):
            Folder of the quickstart.

    Returns:
        [`quickstart.steps.Outcome`]: with the first eight images.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    pipeline = load_pipeline(getattr(MODELS[model], experiment.name))
    if name in experiment.arms:
        arm = experiment.arms[name]
        folder = str(Path(annotations) / TRAINING)
        trainer_dir = step_file(output_dir, experiment.name, name).with_suffix("")  # one for each trainer that runs
        settings = {"output_dir": str(trainer_dir), "seed": seed, "max_steps": max_steps}
        settings |= {"precompute": True, "precompute_dir": folder}  # once for all arms
        rows = load_from_disk(folder).select(range(num_rows))
        with redirect_stdout(io.StringIO()):  # what is precomputed is said by every arm
            arm.train(pipeline, rows, settings | arm.settings)
        shutil.rmtree(trainer_dir, ignore_errors=True)  # nothing is saved
    prompts = evaluation_prompts(num_samples, seed, experiment.sample_scene)
    images = generate(pipeline, prompts, seed)
    scores = experiment.score(images, prompts)
    figures = ", ".join(f"{heading} {scores[key]:{form}}" for key, (heading, form) in experiment.figures.items())
    return Outcome(scores, images[:8], time.perf_counter() - start, figures)


def results_table(experiment: Experiment, results: dict[str, dict[str, float]]) -> str:
    """The scores as a table in Markdown: a row for the base and for each arm, a column for each figure."""
    headings = [heading for heading, _ in experiment.figures.values()]
    lines = [f"| model | {' | '.join(headings)} |", "|---" * (1 + len(headings)) + "|"]
    titles = {"base": "base"} | {name: arm.title for name, arm in experiment.arms.items()}
    for name, title in titles.items():
        cells = [f"{results[name][key]:{form}}" for key, (_, form) in experiment.figures.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
