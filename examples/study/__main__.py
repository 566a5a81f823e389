# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Every method of the library, on the quickstart's two worlds, over several seeds: which of them do what they promise?

```bash
python -m examples.study --output_dir study
```

A run is one arm with one seed: the base is trained as the arm says, generates images from the same prompts and noise as every
other arm of that seed, and an oracle scores them. Every finished run is kept, so if the study is stopped, the same command
continues it. At the end `study.json` holds all runs, and `tables.md` and two pictures summarise them.

```bash
python -m examples.study --output_dir study --arms objectives
```

compares the objectives, each at the learning rate that was best on a seed of its own, on three worlds. It writes
`objectives.json`, `objectives.md` and three pictures.
"""

import json
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import disable_progress_bars
from trl import TrlParser

from . import tuning
from .arms import RUN, Sizes
from .objectives import WORLDS
from .runs import check_settings, collect, run_seed


@dataclass
class StudyArguments:
    """
    Arguments of the study.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"study"`):
            Where the runs, the tables and the pictures are written.
        arms (`str`, *optional*, defaults to `"methods"`):
            What is compared: `"methods"`, all at one learning rate, or `"objectives"`, each at the one that suits it.
        model (`str`, *optional*, defaults to `"unet"`):
            The kind of model: `"unet"`, or `"flow"` for the core of the methods on a Stable Diffusion 3 pipeline.
        seeds (`list[int]`, *optional*, defaults to `[11, 12, 13, 14, 15]`):
            Seeds. Each has its own data, training and samples.
        num_rows (`int`, *optional*, defaults to `2048`):
            Pairs, and paintings, to train on.
        max_steps (`int`, *optional*, defaults to `110`):
            Optimizer steps of each training.
        num_samples (`int`, *optional*, defaults to `512`):
            Images that each arm generates.
    """

    output_dir: str = field(
        default="study", metadata={"help": "Where the runs, the tables and the pictures are written."}
    )
    arms: str = field(default="methods", metadata={"help": "What is compared.", "choices": ["methods", "objectives"]})
    model: str = field(default="unet", metadata={"help": "The kind of model.", "choices": ["unet", "flow"]})
    seeds: list[int] = field(default_factory=lambda: [11, 12, 13, 14, 15], metadata={"help": "Seeds."})
    num_rows: int = field(default=2048, metadata={"help": "Pairs, and paintings, to train on."})
    max_steps: int = field(default=110, metadata={"help": "Optimizer steps of each training."})
    num_samples: int = field(default=512, metadata={"help": "Images that each arm generates."})


def main(args: StudyArguments) -> None:
    if find_spec("matplotlib") is None:
        raise ValueError('The study needs matplotlib for its pictures: `pip install "trl-diffusion[evaluation]"`.')
    is_tuned = args.arms == "objectives"
    if is_tuned and args.model != "unet":
        raise ValueError(f"`--arms objectives` are compared on the UNet only, not with `--model {args.model}`.")
    if is_tuned and tuning.TUNING_SEED in args.seeds:
        raise ValueError(f"Seed {tuning.TUNING_SEED} chooses the learning rates: leave it out of `--seeds`.")
    sizes = Sizes(args.output_dir, args.num_rows, args.max_steps, args.num_samples, args.model)
    check_settings(sizes)
    # Two processes of one thread each: the tensors are small, and more threads would mostly wait for one another.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=prepare_process) as pool:
        if is_tuned:
            wait([pool.submit(tuning.rate_of, *arm, sizes) for arm in tuning.tuned_arms()])
            wait([pool.submit(tuning.run_seed, world, seed, sizes) for seed in args.seeds for world in WORLDS])
        else:
            wait([pool.submit(run_seed, world, seed, sizes) for seed in args.seeds for world in RUN])
    summarise(args, sizes)


def prepare_process() -> None:
    """What each of the two processes does first."""
    disable_progress_bars()
    # The gradients of pairs that are learned are denormal numbers, which take a CPU twice as long
    torch.set_flush_denormal(True)


def wait(runs: list[Future]) -> None:
    for run in runs:
        run.result()


def summarise(args: StudyArguments, sizes: Sizes) -> None:
    """Writes all runs into one file, and the tables and pictures."""
    from .tables import picture, table, tuning_table

    folder, is_tuned = Path(args.output_dir), args.arms == "objectives"
    worlds, name, prefix = (WORLDS, "objectives", "study_objectives") if is_tuned else (RUN, "tables", "study")
    study = (tuning.collect if is_tuned else collect)(args.seeds, sizes)
    record = "objectives.json" if is_tuned else "study.json"
    (folder / record).write_text(json.dumps(study, indent=1) + "\n")
    tables = [table(study, world) for world in worlds]
    if is_tuned:
        tables += [tuning_table(study, world) for world in worlds]
    (folder / f"{name}.md").write_text("\n\n".join(tables) + "\n")
    for world in worlds:
        picture(study, world).savefig(folder / f"{prefix}_{world}.png", dpi=120)
    print(f"Done: look at {folder / f'{name}.md'} and {', '.join(f'{prefix}_{world}.png' for world in worlds)}.")


def make_parser() -> TrlParser:
    return TrlParser((StudyArguments,))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
