# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

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
prompt names.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from trl_diffusion.cli.parser import CommandParser


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
        num_samples (`int`, *optional*, defaults to `1024`):
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
    num_samples: int = field(default=1024, metadata={"help": "Images that each model generates."})


PACKAGES = ("trl-diffusion", "trl", "transformers", "diffusers", "peft", "torch")


def main(args: QuickstartArguments) -> None:
    from datasets import disable_progress_bars

    from trl_diffusion.quickstart import cpo, iapo
    from trl_diffusion.quickstart.experiment import annotate, run_arm

    start = time.perf_counter()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    experiments = {"scenes": iapo.EXPERIMENT, "paintings": cpo.EXPERIMENT}
    num_rows = {"scenes": args.num_pairs, "paintings": args.num_paintings}
    num_arms = sum(len(experiment.arms) for experiment in experiments.values())
    print(
        f"Annotating {args.num_pairs} pairs and {args.num_paintings} paintings, then training {num_arms} models and generating "
        f"{args.num_samples} images with each of them and with the two bases.",
        flush=True,
    )
    # Two processes of one thread each: the tensors are small, and more threads would mostly wait for one another.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=disable_progress_bars) as pool:
        annotating = {
            world: pool.submit(annotate, experiment, num_rows[world], args.seed, args.output_dir)
            for world, experiment in experiments.items()
        }
        annotations = {world: run.result() for world, run in annotating.items()}
        sizes = (args.max_steps, args.num_samples, args.seed, args.output_dir)
        runs = {
            world: {
                name: pool.submit(
                    run_arm, experiment, args.model, name, annotations[world][0], num_rows[world], *sizes
                )
                for name in ("base", *experiment.arms)
            }
            for world, experiment in experiments.items()
        }
        outcomes = {world: {name: run.result() for name, run in arms.items()} for world, arms in runs.items()}

    for world, file in (("scenes", "samples.png"), ("paintings", "paintings.png")):
        images = [first_images for _, first_images in outcomes[world].values()]
        comparison(experiments[world], images, args.num_samples, args.seed).save(folder / file)
    scores = {world: {name: scores for name, (scores, _) in arms.items()} for world, arms in outcomes.items()}
    results = scores["scenes"] | {
        "cpo": scores["paintings"],
        "annotations": {world: counts for world, (_, counts) in annotations.items()},
        "model": args.model,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {package: version(package) for package in PACKAGES},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "report.md").write_text(report(results, args.max_steps))
    print(
        f"Done in {results['seconds']:.0f} seconds: look at {folder / 'report.md'}, {folder / 'samples.png'} and "
        f"{folder / 'paintings.png'}."
    )


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
