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
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from datasets import disable_progress_bars
from trl import TrlParser

from .arms import RUN, Sizes
from .runs import check_settings, collect, run_seed


@dataclass
class StudyArguments:
    """
    Arguments of the study.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"study"`):
            Where the runs, the tables and the pictures are written.
        model (`str`, *optional*, defaults to `"unet"`):
            The kind of model: `"unet"`, or `"flow"` for the core of the arms on a Stable Diffusion 3 pipeline.
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
    model: str = field(default="unet", metadata={"help": "The kind of model.", "choices": ["unet", "flow"]})
    seeds: list[int] = field(default_factory=lambda: [11, 12, 13, 14, 15], metadata={"help": "Seeds."})
    num_rows: int = field(default=2048, metadata={"help": "Pairs, and paintings, to train on."})
    max_steps: int = field(default=110, metadata={"help": "Optimizer steps of each training."})
    num_samples: int = field(default=512, metadata={"help": "Images that each arm generates."})


def main(args: StudyArguments) -> None:
    if find_spec("matplotlib") is None:
        raise ValueError('The study needs matplotlib for its pictures: `pip install "trl-diffusion[evaluation]"`.')
    from .tables import picture, table

    sizes = Sizes(args.output_dir, args.num_rows, args.max_steps, args.num_samples, args.model)
    check_settings(sizes)
    # Two processes of one thread each: the tensors are small, and more threads would mostly wait for one another.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=disable_progress_bars) as pool:
        for run in [pool.submit(run_seed, world, seed, sizes) for seed in args.seeds for world in RUN]:
            run.result()
    study, folder = collect(args.seeds, sizes), Path(args.output_dir)
    (folder / "study.json").write_text(json.dumps(study, indent=1) + "\n")
    (folder / "tables.md").write_text("\n\n".join(table(study, world) for world in RUN) + "\n")
    for world in RUN:
        picture(study, world).savefig(folder / f"study_{world}.png", dpi=120)
    print(f"Done: look at {folder / 'tables.md'} and {', '.join(f'study_{world}.png' for world in RUN)}.")


def make_parser() -> TrlParser:
    return TrlParser((StudyArguments,))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
