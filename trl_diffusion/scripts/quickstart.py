# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains on two embedded worlds with what this library adds to Diffusion-DPO, and compares what the models draw.

```bash
trl-diffusion quickstart --output_dir quickstart
```

Its first half is IAPO, on pairs of scenes with two shapes: the label of a pair is decided by its shape A, and in 46 % of the
pairs shape B, drawn better in the rejected image, contradicts it. Diffusion-DPO follows the label over the whole image; IAPO
takes the contradicting B out of the loss.

The instances are found first, as `trl-diffusion annotate-instances` finds them, with an oracle in the place of its models.

Its second half is CPO, on tiny paintings with four qualities, each of which is there or not: an expert that knows the
qualities by their words teaches a model that draws them without words. They are annotated in the same way.

What each model then draws, and whether it is what the prompt names, is counted by the worlds' oracles.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from trl import TrlParser


@dataclass
class QuickstartArguments:
    """
    Arguments of `trl-diffusion quickstart`.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"quickstart"`):
            Where `results.json`, `samples.png`, `paintings.png`, `report.md` and the annotations go.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the data, of the training and of the samples.
        num_pairs (`int`, *optional*, defaults to `2048`):
            Preference pairs to train on, in the first half.
        num_paintings (`int`, *optional*, defaults to `2048`):
            Paintings to train on, in the second half.
        max_steps (`int`, *optional*, defaults to `110`):
            Optimizer steps of each training.
        num_samples (`int`, *optional*, defaults to `1024`):
            Images that each model draws.
    """

    output_dir: str = field(
        default="quickstart",
        metadata={"help": "Where `results.json`, `samples.png`, `paintings.png` and `report.md` go."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data, of the training and of the samples."})
    num_pairs: int = field(default=2048, metadata={"help": "Preference pairs to train on, in the first half."})
    num_paintings: int = field(default=2048, metadata={"help": "Paintings to train on, in the second half."})
    max_steps: int = field(default=110, metadata={"help": "Optimizer steps of each training."})
    num_samples: int = field(default=1024, metadata={"help": "Images that each model draws."})


PACKAGES = ("trl-diffusion", "trl", "transformers", "diffusers", "peft", "torch")


def main(args: QuickstartArguments) -> None:
    from datasets import disable_progress_bars

    from trl_diffusion.quickstart import cpo, iapo

    start = time.perf_counter()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"Annotating {args.num_pairs} pairs and {args.num_paintings} paintings, then drawing {args.num_samples} images with "
        f"each of two bases, and with {len(iapo.ARMS) + len(cpo.ARMS)} models that are trained first.",
        flush=True,
    )
    # Two processes of one thread each: the tensors are small, and more threads would mostly wait for one another.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=disable_progress_bars) as pool:
        annotating = {half: pool.submit(half.annotate, args) for half in (iapo, cpo)}
        annotations = {half: run.result() for half, run in annotating.items()}
        runs = {
            half: {name: pool.submit(half.run_arm, name, args, run_folder) for name in ("base", *half.ARMS)}
            for half, (run_folder, _) in annotations.items()
        }
        outcomes = {half: {name: run.result() for name, run in arms.items()} for half, arms in runs.items()}

    for half, file in ((iapo, "samples.png"), (cpo, "paintings.png")):
        draw_grid(half, outcomes[half], args).save(folder / file)
    scores = {half: {name: scores for name, (scores, _) in arms.items()} for half, arms in outcomes.items()}
    results = scores[iapo] | {
        "cpo": scores[cpo],
        "annotations": {"scenes": annotations[iapo][1], "paintings": annotations[cpo][1]},
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {package: version(package) for package in PACKAGES},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "report.md").write_text(report(results, args))
    print(
        f"Done in {results['seconds']:.0f} seconds: look at {folder / 'report.md'}, {folder / 'samples.png'} and "
        f"{folder / 'paintings.png'}."
    )


def draw_grid(half, outcomes: dict, args: QuickstartArguments):
    """The first images, a column a model."""
    from trl_diffusion.visualization import image_grid

    pictures = [images for _, images in outcomes.values()]
    prompts = half.evaluation_prompts(args.num_samples, seed=args.seed)[: len(pictures[0])]
    columns = ["base", *(title for title, _ in half.ARMS.values())]
    return image_grid([list(row) for row in zip(*pictures, strict=True)], columns, prompts, size=160)


def report(results: dict, args: QuickstartArguments) -> str:
    """A page of Markdown on what was run and what came out."""
    from trl_diffusion.quickstart import cpo, iapo

    return f"""# Quickstart

{iapo.report(results, results["annotations"]["scenes"], args)}

{cpo.report(results["cpo"], results["annotations"]["paintings"], args)}

Seed {results["seed"]}; {results["seconds"]:.0f} seconds in all.
{", ".join(f"{package} {number}" for package, number in results["versions"].items())}.
"""


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser((QuickstartArguments,), prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
