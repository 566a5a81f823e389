# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The quickstart's tiny models, trained, saved and evaluated as anybody would: their cards have figures, pictures and curves."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import load_from_disk

from trl_diffusion.cards.facts import EVALUATION_NAME, write_facts
from trl_diffusion.evaluation.card import evaluation_facts
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import Protocol
from trl_diffusion.evaluation.run import evaluate_models
from trl_diffusion.quickstart import cpo, iapo
from trl_diffusion.quickstart.experiment import TRAINING, annotate
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.sampling import SAMPLING, load_pipeline, shipped
from trl_diffusion.quickstart.world import evaluation_prompts

from .oracles import scorers_of


MODEL, SEED = "unet", 4
EXPERIMENTS = {"scenes": iapo.EXPERIMENT, "paintings": cpo.EXPERIMENT}
# The arms of the quickstart by the names of their cards
CARDS = {
    "scenes": {
        "quickstart-diffusion-dpo": "dpo",
        "quickstart-iapo": "iapo",
        "quickstart-iapo-covering": "iapo_covering",
    },
    "paintings": {
        "quickstart-sft": "sft",
        "quickstart-cpo-unstabilized": "cpo",
        "quickstart-cpo": "cpo_stabilised",
        "quickstart-cpo-paired": "cpo_paired",
    },
}
STEPS, GUIDANCE = SAMPLING["num_inference_steps"], SAMPLING["guidance_scale"]


def make(folder: Path, num_rows: int = 2048, max_steps: int = 110, num_prompts: int = 1024) -> None:
    """
    Trains every arm of the quickstart on both worlds, and puts their evaluations beside them. What is there is not made again.

    Args:
        folder (`Path`):
            Where the models go, each in `models/<name>`, the annotations, and the evaluations.
        num_rows (`int`, *optional*, defaults to `2048`), max_steps (`int`, *optional*, defaults to `110`):
            Rows and optimizer steps of each training.
        num_prompts (`int`, *optional*, defaults to `1024`):
            Images of each model that are scored.
    """
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        annotations = {
            world: pool.submit(annotate, experiment, num_rows, SEED, str(folder / world))
            for world, experiment in EXPERIMENTS.items()
        }
        trainings = [
            pool.submit(train, world, name, annotations[world].result()[0], folder, max_steps)
            for world, names in CARDS.items()
            for name in names
            if not (folder / "models" / name / "README.md").exists()
        ]
        for training in trainings:
            print(f"Trained {training.result()}.", flush=True)
    for world, names in CARDS.items():
        summary = evaluate(world, folder, num_prompts)
        for name in names:
            write_facts(evaluation_facts(summary, name), folder / "models" / name / EVALUATION_NAME)


def train(world: str, name: str, annotations: str, folder: Path, max_steps: int) -> str:
    """Trains an arm of the quickstart, in one thread, and saves the model with its card."""
    torch.set_num_threads(1)
    arm = EXPERIMENTS[world].arms[CARDS[world][name]]
    rows = load_from_disk(Path(annotations) / TRAINING)
    settings = {
        "output_dir": str(folder / "models" / name),
        "seed": SEED,
        "max_steps": max_steps,
        "logging_steps": 5,
        "sample_prompts": prompts_of(world, 4),
        "sample_steps": max_steps,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        **({"mask_examples": 2} if world == "scenes" else {}),
    }
    trainer = arm.train(load_pipeline(getattr(MODELS[MODEL], world)), rows, settings | arm.settings)
    trainer.save_model()
    trainer.create_model_card()
    return name


def prompts_of(world: str, number: int) -> list[str]:
    """Different prompts of a world."""
    prompts = evaluation_prompts(50 * number, SEED, EXPERIMENTS[world].sample_scene)
    return list(dict.fromkeys(prompts))[:number]


def evaluate(world: str, folder: Path, num_prompts: int) -> dict:
    """Compares the models of a world with their base, by the oracle."""
    prompts = evaluation_prompts(num_prompts, SEED, EXPERIMENTS[world].sample_scene)
    file = folder / world / f"{world}.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    base = shipped(getattr(MODELS[MODEL], world))
    is_lora = world == "paintings"
    specs = [resolve_model("base", base)]
    specs += [resolve_model(name, str(folder / "models" / name), base if is_lora else None) for name in CARDS[world]]
    protocol = Protocol(num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=SEED)
    output_dir = folder / world / "evaluation"
    return evaluate_models(
        specs, load_prompts(str(file)), protocol, scorers_of(world), output_dir, batch_size=128, use_cpu=True
    )
