# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The quickstart's second half: does a model learn qualities from an expert that can tell them apart?"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from ..annotation.attribute_expert import AttributeExpert
from ..annotation.attributes import attribute_task
from ..annotation.join import join_annotations, load_annotations
from ..annotation.records import image_columns, prepare_rows
from ..annotation.run import run, run_locally
from ..criteria import Criteria
from ..data.formats import ATTRIBUTE_COLUMNS
from ..trainer.attribute_sft_config import AttributeSFTConfig
from ..trainer.attribute_sft_trainer import AttributeSFTTrainer
from ..trainer.complex_po_config import ComplexPOConfig
from ..trainer.complex_po_trainer import ComplexPOTrainer
from .drawing import FAST, draw, load_pipeline, shipped
from .oracle import OracleVLM
from .paintings import evaluation_prompts, inspect_painting, painting_dataset


if TYPE_CHECKING:
    from ..scripts.quickstart import QuickstartArguments

BASE = "painting_base"
EXPERT = "painting_expert"
CRITERIA = shipped("criteria.yaml")
# name: what the pictures call it, what ComplexPOConfig is given; `sft` is fine-tuned on the images without negatives
ARMS = {
    "sft": ("SFT on the best", {}),
    "cpo": ("CPO", {"loss_type": "unstabilized"}),
    "cpo_stabilised": ("CPO-S", {}),
    "cpo_paired": ("CPO-S, paired", {"attribute_targets": "paired", "target_strength": 2.0}),
}
TRAINING = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "per_device_train_batch_size": 32,
}
BETA = 100.0
# On a UNet this small, whose attention is at 4x4 only, the other layers have to learn too
TARGET_MODULES = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "time_emb_proj"),
]
LORA = LoraConfig(r=16, lora_alpha=16, target_modules=TARGET_MODULES)


def unlabelled_paintings(args: "QuickstartArguments") -> Dataset:
    """Paintings whose qualities are not known."""
    return painting_dataset(args.num_paintings, seed=args.seed).remove_columns(list(ATTRIBUTE_COLUMNS))


def annotate(args: "QuickstartArguments") -> tuple[str, dict[str, int]]:
    """Reads the qualities of the paintings: the run's folder and what it counted."""
    torch.set_num_threads(1)
    rows, columns = prepare_rows(unlabelled_paintings(args), image_columns)
    source = {"name": "paintings", "split": "paintings", "num_paintings": args.num_paintings, "seed": args.seed}
    task = attribute_task(AttributeExpert(OracleVLM(), Criteria.load(CRITERIA)), source, columns)
    finished = run(rows, task, Path(args.output_dir) / "annotations", run_locally, disable_tqdm=True)
    return str(finished.folder), dict(finished.counts)


def run_arm(name: str, args: "QuickstartArguments", annotations: str) -> tuple[dict[str, float], list[Image.Image]]:
    """Trains the base as an arm does (or not), draws, and counts: the scores and the first images."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    pipeline = load_pipeline(BASE)
    if name in ARMS:
        paintings = join_annotations(unlabelled_paintings(args), load_annotations(annotations))
        settings = {"output_dir": args.output_dir, "seed": args.seed, "max_steps": args.max_steps}
        if name == "sft":
            train_sft(pipeline, paintings, settings)
        else:
            train_cpo(pipeline, paintings, settings | ARMS[name][1])
    trained = time.perf_counter()
    prompts = evaluation_prompts(args.num_samples, seed=args.seed)
    images = draw(pipeline, prompts, args.seed)
    scores = score(images, prompts)
    print(
        f"{name}: trained in {trained - start:.0f} s, drawn in {time.perf_counter() - trained:.0f} s: "
        f"{scores['negatives']:.2f} negatives, match {scores['match']:.3f}",
        flush=True,
    )
    return scores, images[:8]


def train_sft(pipeline: StableDiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> AttributeSFTTrainer:
    """Trains a LoRA on the paintings without negatives."""
    trainer = AttributeSFTTrainer(
        pipeline,
        # Without attributes in the prompts: what is left is the choice of the images
        args=AttributeSFTConfig(criteria=CRITERIA, attribute_dropout=1.0, **FAST, **TRAINING, **settings),
        train_dataset=paintings.filter(lambda row: not row["negative_attributes"]),
        peft_config=LORA,
    )
    trainer.train()
    return trainer


def train_cpo(pipeline: StableDiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> ComplexPOTrainer:
    """Trains a LoRA on what the expert predicts."""
    trainer = ComplexPOTrainer(
        pipeline,
        expert=shipped(EXPERT),
        args=ComplexPOConfig(criteria=CRITERIA, beta=BETA, **FAST, **TRAINING, **settings),
        train_dataset=paintings,
        peft_config=LORA,
    )
    trainer.train()
    return trainer


def score(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Mean number of negative and of positive qualities that the oracle finds, and share of images that match."""
    findings = [inspect_painting(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {
        "negatives": sum(len(finding.negative_attributes) for finding in findings) / len(findings),
        "positives": sum(len(finding.positive_attributes) for finding in findings) / len(findings),
        "match": sum(finding.match for finding in findings) / len(findings),
        "n": len(findings),
    }


def report(results: dict, counts: dict[str, int], args: "QuickstartArguments") -> str:
    """Markdown on what was run and what came out."""
    rows = [
        f"| {title} | {r['negatives']:.2f} | {r['match']:.3f} |"
        for title, r in (("base", results["base"]), *((title, results[name]) for name, (title, _) in ARMS.items()))
    ]
    table = "\n".join(["| model | negatives | matches |", "|---|---|---|", *rows])
    strength = ARMS["cpo_paired"][1]["target_strength"]
    return f"""## CPO: does a model learn qualities from an expert that can tell them apart?

A tiny Stable Diffusion pipeline paints one shape on a ground. Its outline is whole or bitten, its colour vivid or pale, its
place the middle or aside, its ground bright or murky: each is negative half of the time, and one image in 16 has no
negative at all; prompts name none of them. `annotate-attributes`, with an oracle in the place of the model, read
{counts["positive_attributes"]} positive and {counts["negative_attributes"]} negative qualities in {counts["ok"]} paintings. The
expert, a LoRA that comes with the package, was trained with the qualities in its prompts, and paints them as they are named.

{table}

Mean number of negative qualities of {args.num_samples} images per model, of 4, all drawn from the same prompts and noise
(standard error about {1 / args.num_samples**0.5:.2f}); and the share of images that show the colour and kind that the
prompt names.

- **SFT on the best** is fine-tuned on the paintings without negatives, one in 16.
- **CPO** (`loss_type="unstabilized"`) goes towards the expert's positive prediction and away from its negative one, without
  bound.
- **CPO-S** (`loss_type="stabilized"`) goes towards the reflection of the negative one instead.
- **CPO-S, paired** (`attribute_targets="paired"`, `target_strength={strength}`, ours) asks the expert for all qualities in
  their positive and in their negative form, and puts its targets {strength:g} times as far apart.

![The same noise through every model](paintings.png)

{args.max_steps} optimizer steps of {TRAINING["per_device_train_batch_size"]} paintings, learning rate
{TRAINING["learning_rate"]}, beta {BETA:.0f}, a LoRA of rank 16."""
