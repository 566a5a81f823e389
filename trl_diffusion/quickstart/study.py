# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Every arm that the library offers, on the quickstart's two worlds, over several seeds: which methods do what they promise?

```bash
python -m trl_diffusion.quickstart.study --output_dir study
```

A run is one arm with one seed: the base is trained (or not), draws the same prompts from the same noise as every other arm
of that seed, and an oracle counts. Each run that is finished is kept, so the same command goes on after a stop. At the end
`study.json` holds all of them, `tables.md` and two pictures what they say together.
"""

import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from diffusers import StableDiffusionPipeline
from trl import TrlParser

from trl_diffusion.files import write_file
from trl_diffusion.quickstart import cpo, iapo
from trl_diffusion.quickstart.drawing import FAST, draw, load_pipeline
from trl_diffusion.quickstart.paintings import evaluation_prompts as painting_prompts
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.world import evaluation_prompts, preference_dataset
from trl_diffusion.sampling import negative_preference_guidance
from trl_diffusion.scripts.quickstart import PACKAGES
from trl_diffusion.trainer.attribute_sft_config import AttributeSFTConfig
from trl_diffusion.trainer.attribute_sft_trainer import AttributeSFTTrainer
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer


@dataclass
class StudyArguments:
    """
    Arguments of the study.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"study"`):
            Where the runs, the tables and the pictures go.
        seeds (`list[int]`, *optional*, defaults to `[11, 12, 13, 14, 15]`):
            Seeds; each gives its own data, training and samples.
        num_rows (`int`, *optional*, defaults to `2048`):
            Pairs, and paintings, to train on.
        max_steps (`int`, *optional*, defaults to `110`):
            Optimizer steps of each training.
        num_samples (`int`, *optional*, defaults to `512`):
            Images that each arm draws.
    """

    output_dir: str = field(default="study", metadata={"help": "Where the runs, the tables and the pictures go."})
    seeds: list[int] = field(default_factory=lambda: [11, 12, 13, 14, 15], metadata={"help": "Seeds."})
    num_rows: int = field(default=2048, metadata={"help": "Pairs, and paintings, to train on."})
    max_steps: int = field(default=110, metadata={"help": "Optimizer steps of each training."})
    num_samples: int = field(default=512, metadata={"help": "Images that each arm draws."})


@dataclass(frozen=True)
class Arm:
    """
    What is done to the base before it draws.

    Args:
        title (`str`):
            Its name in tables and pictures.
        settings (`dict`, *optional*):
            What the trainer's config is given; `None`: nothing is trained.
        kind (`str`, *optional*, defaults to `"preference"`):
            `"preference"`, or `"sft"` for fine-tuning on the better images.
        negative (`str`, *optional*):
            The arm whose adapter takes the unconditional branch of guidance, here that of arm `positive`.
        positive (`str`, *optional*):
            The arm whose adapter takes the conditional branch.
    """

    title: str
    settings: dict[str, Any] | None = None
    kind: str = "preference"
    negative: str | None = None
    positive: str | None = None


INVERSION = {"noise_source": "inversion"}
SCENES = {
    "base": Arm("base"),
    "sft": Arm("SFT on the chosen", {}, kind="sft"),
    "dpo": Arm("Diffusion-DPO", {"w_neg": 1.0}),
    **{
        f"{overlap}_{w_neg}": Arm(
            f"IAPO, {'covering, ' if overlap == 'covering' else ''}w_neg {w_neg}",
            {"w_neg": w_neg, "mask_overlap": overlap},
        )
        for overlap in ("mean", "covering")
        for w_neg in (0.5, 0.0, -0.5)
    },
    "dpo_inversion": Arm("Diffusion-DPO, inversion", {"w_neg": 1.0, **INVERSION}),
    "mean_0.0_inversion": Arm("IAPO, w_neg 0.0, inversion", {"w_neg": 0.0, **INVERSION}),
    "covering_0.0_inversion": Arm(
        "IAPO, covering, w_neg 0.0, inversion", {"w_neg": 0.0, "mask_overlap": "covering", **INVERSION}
    ),
}
PAINTINGS = {
    "base": Arm("base"),
    "sft": Arm("SFT on the best", {}, kind="sft"),
    "cpo": Arm("CPO", {"loss_type": "unstabilized"}),
    **{
        f"{targets}_{strength}": Arm(
            f"CPO-S, {'paired, ' if targets == 'paired' else ''}strength {strength}",
            {"attribute_targets": targets, "target_strength": strength},
        )
        for targets in ("present", "paired")
        for strength in (1.0, 2.0, 4.0)
    },
    "reversed": Arm(
        "CPO-S, paired, strength 2.0, reversed",
        {"attribute_targets": "paired", "target_strength": 2.0, "reverse_preference": True},
    ),
    "base_npo": Arm("base + NPO", negative="reversed"),
    "present_1.0_npo": Arm("CPO-S, strength 1.0 + NPO", positive="present_1.0", negative="reversed"),
    "paired_2.0_npo": Arm("CPO-S, paired, strength 2.0 + NPO", positive="paired_2.0", negative="reversed"),
}


def run_scene(name: str, seed: int, args: StudyArguments) -> dict[str, Any]:
    """Trains the base on pairs as an arm of `SCENES` does (or not), draws, and counts."""
    arm, pipeline = SCENES[name], load_pipeline(iapo.BASE)
    record = {}
    if arm.settings is not None:
        pairs = preference_dataset(args.num_rows, seed=seed)
        settings = shared_settings("scenes", name, seed, args) | arm.settings
        if arm.kind == "sft":
            record = outcome(fine_tune(pipeline, pairs, settings))
        else:
            # All of these arms ask the same reference the same questions
            record = outcome(iapo.train(pipeline, pairs, settings | {"precompute_ref_preds": True}))
    prompts = evaluation_prompts(args.num_samples, seed=seed)
    return iapo.score(draw(pipeline, prompts, seed), prompts) | record


def run_painting(name: str, seed: int, args: StudyArguments) -> dict[str, Any]:
    """Trains the base on paintings as an arm of `PAINTINGS` does (or not), draws, and counts."""
    arm, pipeline = PAINTINGS[name], load_pipeline(cpo.BASE)
    record = {}
    prompts = painting_prompts(args.num_samples, seed=seed)
    if arm.negative:
        for adapter in filter(None, (arm.positive, arm.negative)):
            pipeline.load_lora_weights(
                folder_of("paintings", adapter, seed, args), adapter_name=adapter.replace(".", "_")
            )
        positive = arm.positive.replace(".", "_") if arm.positive else None
        with negative_preference_guidance(pipeline, positive, arm.negative):
            images = draw(pipeline, prompts, seed)
    else:
        if arm.settings is not None:
            paintings = painting_dataset(args.num_rows, seed=seed)
            train = cpo.train_sft if arm.kind == "sft" else cpo.train_cpo
            trainer = train(pipeline, paintings, shared_settings("paintings", name, seed, args) | arm.settings)
            trainer.save_model()
            record = outcome(trainer)
        images = draw(pipeline, prompts, seed)
    return cpo.score(images, prompts) | record


def fine_tune(pipeline: StableDiffusionPipeline, pairs: Dataset, settings: dict[str, Any]) -> AttributeSFTTrainer:
    """Trains all weights of the denoiser on the chosen images of pairs, in place."""
    chosen = pairs.remove_columns(["rejected", "instances"]).rename_column("chosen", "image")
    nothing = [[]] * len(chosen)
    for column in ("positive_attributes", "negative_attributes"):
        chosen = chosen.add_column(column, nothing)
    training = {key: value for key, value in iapo.TRAINING.items() if key != "beta"}
    trainer = AttributeSFTTrainer(
        pipeline, args=AttributeSFTConfig(**FAST, **training, **settings), train_dataset=chosen, peft_config=None
    )
    trainer.train()
    return trainer


def folder_of(world: str, name: str, seed: int, args: StudyArguments) -> str:
    return str(Path(args.output_dir) / "runs" / world / f"{name}-{seed}")


def shared_settings(world: str, name: str, seed: int, args: StudyArguments) -> dict[str, Any]:
    return {
        "output_dir": folder_of(world, name, seed, args),
        "seed": seed,
        "max_steps": args.max_steps,
        "precompute": True,  # what the arms of a seed share is computed once
        "precompute_dir": str(Path(args.output_dir) / "precomputed"),
    }


def outcome(trainer: DiffusionTrainer) -> dict[str, float]:
    """What the training logged last of itself."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    return {name: last[name] for name in ("loss", "rewards/margins", "rewards/accuracies") if name in last}


WORLDS = {"scenes": (SCENES, run_scene), "paintings": (PAINTINGS, run_painting)}


def run_seed(world: str, seed: int, args: StudyArguments) -> None:
    """Runs the arms of a world with a seed, but for those that were run before."""
    torch.set_num_threads(1)
    arms, run = WORLDS[world]
    for name in arms:
        file = Path(folder_of(world, name, seed, args) + ".json")
        if file.exists():
            continue
        start = time.perf_counter()
        record = run(name, seed, args) | {"arm": name, "seed": seed}
        record["seconds"] = round(time.perf_counter() - start, 1)
        write_file(file, json.dumps(record).encode())
        print(f"{world}, {name}, seed {seed}: {record['seconds']:.0f} s", flush=True)


def collect(args: StudyArguments) -> dict[str, Any]:
    """All runs: what the tables and the pictures are made of."""
    runs = {
        world: [
            json.loads(Path(folder_of(world, name, seed, args) + ".json").read_text())
            for name in arms
            for seed in args.seeds
        ]
        for world, (arms, _) in WORLDS.items()
    }
    settings = {"seeds": args.seeds, **settings_of(args)}
    return {"settings": settings, "versions": {package: version(package) for package in PACKAGES}, "runs": runs}


# Of each world: the figures, their headings, and the arm that others are compared with
FIGURES = {
    "scenes": (
        {"clean_a": "A clean", "clean_b": "B clean", "match_a": "A matches", "match_b": "B matches"},
        "dpo",
        "clean_b",
    ),
    "paintings": ({"negatives": "negatives of 4", "match": "matches"}, "sft", "negatives"),
}


def values_of(study: dict[str, Any], world: str, name: str, figure: str) -> list[float]:
    """One value a seed."""
    return [run[figure] for run in study["runs"][world] if run["arm"] == name]


def table(study: dict[str, Any], world: str) -> str:
    """Markdown: mean and standard deviation over the seeds, and the mean paired difference with its standard error."""
    arms, (figures, reference, compared) = WORLDS[world][0], FIGURES[world]
    lines = [
        f"| arm | {' | '.join(figures.values())} | {figures[compared]}, minus {arms[reference].title} |",
        "|---" * (len(figures) + 2) + "|",
    ]
    for name, arm in arms.items():
        cells = []
        for figure in figures:
            values = values_of(study, world, name, figure)
            cells.append(f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}")
        differences = [
            own - other
            for own, other in zip(
                values_of(study, world, name, compared), values_of(study, world, reference, compared), strict=True
            )
        ]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        cells.append("" if name == reference else f"{statistics.fmean(differences):+.3f} ± {error:.3f}")
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(study: dict[str, Any], world: str):
    """A panel a figure: every seed as a point, their mean as a line."""
    from matplotlib.figure import Figure

    arms, (figures, reference, _) = WORLDS[world][0], FIGURES[world]
    shown = Figure(figsize=(2.2 + 2.4 * len(figures), 0.9 + 0.3 * len(arms)), layout="constrained")
    panels = shown.subplots(1, len(figures), sharey=True)
    for panel, (figure, heading) in zip(panels, figures.items(), strict=True):
        for row, name in enumerate(arms):
            values = values_of(study, world, name, figure)
            color = "#D55E00" if name in ("base", reference) else "#0072B2"
            panel.plot(values, [row] * len(values), "o", color=color, alpha=0.5, markersize=4, markeredgewidth=0)
            panel.plot([statistics.fmean(values)] * 2, [row - 0.35, row + 0.35], color=color, linewidth=2)
        if figure.startswith("match"):  # so that hardly anything looks like it
            panel.set_xlim(left=min(0.88, panel.get_xlim()[0]), right=1.01)
        panel.set_title(heading, fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(arms)), [arm.title for arm in arms.values()])
    panels[0].invert_yaxis()
    return shown


def settings_of(args: StudyArguments) -> dict[str, int]:
    """What every run of a folder has in common."""
    return {name: getattr(args, name) for name in ("num_rows", "max_steps", "num_samples")}


def check_settings(args: StudyArguments) -> None:
    """Runs of other settings are not mixed, and the pictures can be drawn: raises a `ValueError` otherwise."""
    if find_spec("matplotlib") is None:
        raise ValueError('The study draws with matplotlib: `pip install "trl-diffusion[evaluation]"`.')
    file = Path(args.output_dir) / "settings.json"
    if not file.exists():
        write_file(file, json.dumps(settings_of(args)).encode())
    elif (earlier := json.loads(file.read_text())) != settings_of(args):
        raise ValueError(
            f"{args.output_dir} holds runs with {earlier}, not {settings_of(args)}: choose another `--output_dir`."
        )


def main(args: StudyArguments) -> None:
    check_settings(args)
    # Two processes of one thread each: the tensors are small, and more threads would mostly wait for one another.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=disable_progress_bars) as pool:
        for run in [pool.submit(run_seed, world, seed, args) for seed in args.seeds for world in WORLDS]:
            run.result()
    study, folder = collect(args), Path(args.output_dir)
    (folder / "study.json").write_text(json.dumps(study, indent=1) + "\n")
    (folder / "tables.md").write_text("\n\n".join(table(study, world) for world in WORLDS) + "\n")
    for world in WORLDS:
        picture(study, world).savefig(folder / f"study_{world}.png", dpi=120)
    print(f"Done: look at {folder / 'tables.md'} and {', '.join(f'study_{world}.png' for world in WORLDS)}.")


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser((StudyArguments,), prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
