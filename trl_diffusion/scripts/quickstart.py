# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
#     "datasets",
#     "diffusers",
#     "pillow",
#     "torch",
#     "transformers",
# ]
# ///

"""
Trains on two small worlds that come with the package, and compares the images of the trained models.

```bash
trl-diffusion quickstart --output_dir quickstart
```

The first half is IAPO, on pairs of scenes with two shapes. Shape A decides which image of a pair is chosen. In 46 % of the
pairs shape B contradicts this label: it is better in the rejected image. Diffusion-DPO follows the label over the whole image;
IAPO takes the contradicting B out of the loss. The instances are found first, as `trl-diffusion annotate-instances` finds
them, with an oracle instead of its models.

The second half is CPO, on tiny paintings with four qualities, each of them positive or negative. An expert that knows words
for the qualities teaches a model that is prompted without these words. The qualities are found in the same way.

Every model then generates images, and the oracles of the worlds count how good they are and whether they show what the
prompt names. If it is stopped, the same command continues: the steps that are done are kept.
"""

import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.cli.quiet import hold_back
from trl_diffusion.cli.stopping import SIGNALS, blocked


if TYPE_CHECKING:
    from PIL.Image import Image

    from trl_diffusion.quickstart.experiment import Experiment


@dataclass
class QuickstartArguments:
    """
    Arguments of `trl-diffusion quickstart`.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"quickstart"`):
            Where `results.json`, `samples.png`, `paintings.png`, `report.md` and the annotations are written.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the data, of the training and of the samples.
        model (`str`, *optional*, defaults to `"unet"`):
            The kind of model: `"unet"`, a Stable Diffusion pipeline, or `"flow"`, a Stable Diffusion 3 pipeline.
        num_pairs (`int`, *optional*, defaults to `2048`):
            Preference pairs to train on, in the first half.
        num_paintings (`int`, *optional*, defaults to `2048`):
            Paintings to train on, in the second half.
        max_steps (`int`, *optional*, defaults to `110`):
            Optimizer steps of each training.
        num_samples (`int`, *optional*, defaults to `512`):
            Images that each model generates.
    """

    output_dir: str = field(
        default="quickstart",
        metadata={"help": "Where `results.json`, `samples.png`, `paintings.png` and `report.md` are written."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data, of the training and of the samples."})
    model: str = field(
        default="unet",
        metadata={
            "help": "The kind of model: a Stable Diffusion pipeline (`unet`), or a Stable Diffusion 3 pipeline (`flow`).",
            "choices": ["unet", "flow"],
        },
    )
    num_pairs: int = field(default=2048, metadata={"help": "Preference pairs to train on, in the first half."})
    num_paintings: int = field(default=2048, metadata={"help": "Paintings to train on, in the second half."})
    max_steps: int = field(default=110, metadata={"help": "Optimizer steps of each training."})
    num_samples: int = field(default=512, metadata={"help": "Images that each model generates."})


# Rough seconds on one core for a row of the data, an optimizer step and an image. For the UNet's defaults they give 258 s in all,
# where docs/source/log.md has runs of 259 and 272 s
SECONDS = {"unet": (0.01, 0.4, 0.03), "flow": (0.01, 0.8, 0.03)}
STARTING = 15  # seconds until both processes have imported everything
PACKAGES = ("trl-diffusion", "trl", "transformers", "diffusers", "peft", "torch")


def main(args: QuickstartArguments) -> None:
    from trl_diffusion.files import only_run

    with only_run(Path(args.output_dir), "writing"):
        run_quickstart(args)


def run_quickstart(args: QuickstartArguments) -> None:
    """All steps of both worlds, without those that an earlier run with the same settings has done, and the report."""
    from trl_diffusion.files import save_picture, write_file
    from trl_diffusion.quickstart import cpo, iapo
    from trl_diffusion.quickstart.experiment import annotate, run_arm
    from trl_diffusion.quickstart.steps import STEPS, keep_step, kept_step, step_file

    start = time.perf_counter()
    folder = Path(args.output_dir)
    for unfinished in [*folder.glob("*.tmp"), *folder.glob(f"{STEPS}/*.tmp")]:
        unfinished.unlink()
    for unfinished in folder.glob(f"{STEPS}/*/"):
        shutil.rmtree(unfinished)  # of a trainer
    versions = {package: version(package) for package in PACKAGES}
    experiments = {"scenes": iapo.EXPERIMENT, "paintings": cpo.EXPERIMENT}
    num_rows = {"scenes": args.num_pairs, "paintings": args.num_paintings}
    worlds = {world: ("base", *experiment.arms) for world, experiment in experiments.items()}
    progress = Progress(sum(1 + len(names) for names in worlds.values()), estimate(args, experiments))
    # Two processes of one thread each: the tensors are small, and more threads would mostly wait for one another.
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=prepare_worker)
    try:
        with blocked():  # the processes are started here; this one ends them
            annotating = {
                pool.submit(annotate, experiment, num_rows[world], args.seed, args.output_dir): world
                for world, experiment in experiments.items()
            }
        sizes = (args.max_steps, args.num_samples, args.seed, args.output_dir)
        annotations, runs, outcomes = {}, {}, {}

        def settings_of(world: str, name: str) -> dict[str, Any]:
            return step_settings(args, experiments[world], name, annotations[world][0], num_rows[world], versions)

        def submit(world: str, name: str) -> None:
            if kept := kept_step(step_file(folder, world, name), settings_of(world, name)):
                outcomes[world, name] = kept
                progress.done(title(experiments[world], name), kept.figures + " (of an earlier run)", kept.seconds)
                return
            rows = annotations[world][0], num_rows[world]
            runs[pool.submit(run_arm, experiments[world], args.model, name, *rows, *sizes)] = world, name

        for run in as_completed(annotating):
            world = annotating[run]
            annotations[world] = run.result()
            progress.done(f"annotate the {world}", f"{annotations[world][1]['ok']} rows")
            for name in experiments[world].arms:
                submit(world, name)
        for world in worlds:  # the shortest last, so that neither process waits long for the other
            submit(world, "base")
        for run in as_completed(runs):
            world, name = runs[run]
            outcomes[world, name] = outcome = run.result()
            keep_step(step_file(folder, world, name), settings_of(world, name), outcome)
            progress.done(title(experiments[world], name), outcome.figures, outcome.seconds)
    except BrokenProcessPool as error:
        raise ValueError(
            "A process of the quickstart ended before its step was done, such as because the memory is full. Finished steps are "
            "kept: repeat the same command to continue."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

    for world, file in (("scenes", "samples.png"), ("paintings", "paintings.png")):
        images = [outcomes[world, name].images for name in worlds[world]]
        save_picture(folder / file, comparison(experiments[world], images, args.num_samples, args.seed))
    scores = {world: {name: outcomes[world, name].scores for name in names} for world, names in worlds.items()}
    results = scores["scenes"] | {
        "cpo": scores["paintings"],
        "annotations": {world: counts for world, (_, counts) in annotations.items()},
        "model": args.model,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions,
    }
    write_file(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_file(folder / "report.md", report(results, args.max_steps).encode())
    print(
        f"Done in {results['seconds']:.0f} seconds: look at {folder / 'report.md'}, {folder / 'samples.png'} and "
        f"{folder / 'paintings.png'}."
    )


def step_settings(
    args: QuickstartArguments,
    experiment: "Experiment",
    name: str,
    annotations: str,
    num_rows: int,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Everything that the result of a step depends on: the flags, the annotations, the code and the models of this package."""
    import torch

    from trl_diffusion.revisions import digest_of_file, package_digest

    arm = experiment.arms.get(name)
    return {
        "model": args.model,
        "arm": name,
        "settings": arm.settings if arm else {},
        "annotations": [digest_of_file(shard) for shard in sorted(Path(annotations).glob("*.parquet"))],
        "num_rows": num_rows,
        "max_steps": args.max_steps,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "package": package_digest(),
        "versions": versions,
    }


class Progress:
    """
    Says which of the steps are done, and how long each took.

    Args:
        steps (`int`):
            Number of steps.
        seconds (`float`):
            Estimate of the time of all of them.
    """

    def __init__(self, steps: int, seconds: float):
        self.steps = steps
        self.number = 0
        self.start = time.perf_counter()
        print(f"{steps} steps, two at a time: about {duration(seconds)} on two CPU cores.", flush=True)

    def done(self, step: str, figures: str, seconds: float | None = None) -> None:
        """Says that a step is done: what it was, its own seconds if known, and what came out."""
        self.number += 1
        seconds = time.perf_counter() - self.start if seconds is None else seconds
        print(f"[{self.number}/{self.steps}] {step}: {duration(seconds)}; {figures}", flush=True)


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def estimate(args: QuickstartArguments, experiments: dict[str, "Experiment"]) -> float:
    """About how many seconds it takes on two cores, from what a row, an optimizer step and an image took on one core."""
    row, step, image = SECONDS[args.model]
    num_trainings = sum(len(experiment.arms) for experiment in experiments.values())
    num_models = num_trainings + len(experiments)
    rows = args.num_pairs + args.num_paintings
    return STARTING + (rows * row + num_trainings * args.max_steps * step + num_models * args.num_samples * image) / 2


def title(experiment: "Experiment", name: str) -> str:
    """What a step does with a model."""
    if name == "base":
        return f"sample the base of the {experiment.name}"
    return f"train {experiment.arms[name].title} and sample"


def prepare_worker() -> None:
    """In each process: its parent ends it, also by being killed, and it shows nothing of its own."""
    import os
    import signal
    from multiprocessing import parent_process
    from threading import Thread

    from datasets import disable_progress_bars
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    hold_back()
    disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def comparison(experiment: "Experiment", images: list[list["Image"]], num_samples: int, seed: int) -> "Image":
    """The first images of each model as one picture: a row for each prompt, a column for each model."""
    from trl_diffusion.quickstart.world import evaluation_prompts
    from trl_diffusion.visualization import image_grid

    prompts = evaluation_prompts(num_samples, seed, experiment.sample_scene)[: len(images[0])]
    columns = ["base", *(arm.title for arm in experiment.arms.values())]
    return image_grid([list(row) for row in zip(*images, strict=True)], columns, prompts, size=160)


def report(results: dict, max_steps: int) -> str:
    """A page of Markdown that says what was run and what came out."""
    from trl_diffusion.quickstart import cpo, iapo
    from trl_diffusion.quickstart.models import MODELS

    model = MODELS[results["model"]]
    return f"""# Quickstart

{iapo.report(model, results, results["annotations"]["scenes"], max_steps)}

{cpo.report(model, results["cpo"], results["annotations"]["paintings"], max_steps)}

Seed {results["seed"]}; {results["seconds"]:.0f} seconds in all.
{", ".join(f"{package} {number}" for package, number in results["versions"].items())}.
"""


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser((QuickstartArguments,), prog=prog)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("quickstart", lambda: sys.modules[__name__]))
