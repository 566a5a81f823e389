# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The quickstart's first half: does it help to know which object contradicts the label?"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from PIL import Image

from ..annotation.instances import instance_task
from ..annotation.join import join_annotations, load_annotations
from ..annotation.judge import Judge
from ..annotation.planner import Planner
from ..annotation.records import pair_columns, prepare_rows
from ..annotation.run import run, run_locally
from ..trainer.instance_dpo_config import InstanceDPOConfig
from ..trainer.instance_dpo_trainer import InstanceDPOTrainer
from .drawing import FAST, draw, load_pipeline
from .oracle import OracleDetector, OracleVLM
from .world import evaluation_prompts, inspect_image, preference_dataset


if TYPE_CHECKING:
    from ..scripts.quickstart import QuickstartArguments

BASE = "base_pipeline"
# name: what the pictures call it, what InstanceDPOConfig is given
ARMS = {
    "dpo": ("Diffusion-DPO", {"w_neg": 1.0}),
    "iapo": ("IAPO", {"w_neg": 0.0}),
    "iapo_covering": ("IAPO, covering", {"w_neg": 0.0, "mask_overlap": "covering"}),
}
TRAINING = {
    "beta": 2000.0,
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "per_device_train_batch_size": 32,
}


def unlabelled_pairs(args: "QuickstartArguments") -> Dataset:
    """Pairs of which only the image-level label is known."""
    return preference_dataset(args.num_pairs, seed=args.seed).remove_columns("instances")


def annotate(args: "QuickstartArguments") -> tuple[str, dict[str, int]]:
    """Finds the instances of the pairs, and judges them: the run's folder and what it counted."""
    torch.set_num_threads(1)
    rows, columns = prepare_rows(unlabelled_pairs(args), pair_columns)
    vlm = OracleVLM()
    source = {"name": "scenes", "split": "scenes", "num_pairs": args.num_pairs, "seed": args.seed}
    task = instance_task(Planner(vlm), OracleDetector(), Judge(vlm, crop_size=64), source, columns)
    finished = run(rows, task, Path(args.output_dir) / "annotations", run_locally, disable_tqdm=True)
    return str(finished.folder), dict(finished.counts)


def run_arm(name: str, args: "QuickstartArguments", annotations: str) -> tuple[dict[str, float], list[Image.Image]]:
    """Trains the base as an arm does (or not), draws, and counts: the scores and the first images."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    pipeline = load_pipeline(BASE)
    if name in ARMS:
        pairs = join_annotations(unlabelled_pairs(args), load_annotations(annotations))
        settings = {"output_dir": args.output_dir, "seed": args.seed, "max_steps": args.max_steps}
        train(pipeline, pairs, settings | ARMS[name][1])
    trained = time.perf_counter()
    prompts = evaluation_prompts(args.num_samples, seed=args.seed)
    images = draw(pipeline, prompts, args.seed)
    scores = score(images, prompts)
    shares = ", ".join(f"{key} {value:.3f}" for key, value in scores.items() if key != "n")
    print(
        f"{name}: trained in {trained - start:.0f} s, drawn in {time.perf_counter() - trained:.0f} s: {shares}",
        flush=True,
    )
    return scores, images[:8]


def train(pipeline: StableDiffusionPipeline, pairs: Dataset, settings: dict[str, Any]) -> InstanceDPOTrainer:
    """Trains all weights of the pipeline's denoiser, in place."""
    trainer = InstanceDPOTrainer(pipeline, args=InstanceDPOConfig(**FAST, **TRAINING, **settings), train_dataset=pairs)
    trainer.train()
    return trainer


def score(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Shares of the images in which the oracle finds A and B clean, and as the prompt names them."""
    findings = [inspect_image(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    shares = {}
    for what in ("clean", "match"):
        for index, shape in enumerate("ab"):
            shares[f"{what}_{shape}"] = sum(getattr(found[index], what) for found in findings) / len(findings)
    return shares | {"n": len(findings)}


def report(results: dict, counts: dict[str, int], args: "QuickstartArguments") -> str:
    """Markdown on what was run and what came out."""
    rows = [
        f"| {title} | {r['clean_a']:.3f} | {r['clean_b']:.3f} | {r['match_a']:.3f} | {r['match_b']:.3f} |"
        for title, r in (("base", results["base"]), *((title, results[name]) for name, (title, _) in ARMS.items()))
    ]
    error = 0.5 / args.num_samples**0.5
    table = "\n".join(["| model | A clean | B clean | A matches | B matches |", "|---|---|---|---|---|", *rows])
    return f"""## IAPO: does it help to know which object contradicts the label?

A tiny Stable Diffusion pipeline draws two shapes, A (large, left) and B (smaller, right), each with a bite out of its
outline about half of the time. {args.num_pairs} pairs of scenes say which of two images is better. Shape A decides: it is
whole in the chosen image and bitten in the rejected one. In 46 % of the pairs shape B is whole in the *rejected* image, and
the label is wrong about it. Nobody says so: the instances are found by `annotate-instances`, with an oracle in the place of the
models. It saw {counts["instances"]} instances in {counts["ok"]} pairs, {counts["conflicts"]} of them
({counts["conflicts"] / counts["instances"]:.1%}) drawn better in the rejected image.

{table}

Shares of {args.num_samples} images per model, all drawn from the same prompts and noise (standard error at most {error:.3f}).
*Clean*: drawn without a bite. *Matches*: colour and kind are those that the prompt names; a method that breaks images
shows here.

- **Diffusion-DPO** (`w_neg=1`) follows the label everywhere, so what it says about B nearly cancels out.
- **IAPO** (`w_neg=0`) lowers the weight of the contradicting B. With two instances an image, the paper's mean over
  instances leaves it one half.
- **IAPO, covering** (`mask_overlap="covering"`, ours) averages over the instances that cover a position, which takes the
  contradicting B out altogether.

![The same noise through every model](samples.png)

{args.max_steps} optimizer steps of {TRAINING["per_device_train_batch_size"]} pairs, learning rate
{TRAINING["learning_rate"]}, beta {TRAINING["beta"]:.0f}, all weights of the UNet."""
