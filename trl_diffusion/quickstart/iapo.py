# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The quickstart's first half: does it help to know which object contradicts the label of a pair?"""

from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image

from ..annotation.instances import instance_task
from ..annotation.judge import Judge
from ..annotation.planner import Planner
from ..annotation.records import pair_columns
from ..annotation.run import Task
from ..trainer.instance_dpo_config import InstanceDPOConfig
from ..trainer.instance_dpo_trainer import InstanceDPOTrainer
from .experiment import FAST, Arm, Experiment, results_table, train_quietly
from .models import TinyModel, model_of
from .oracle import OracleDetector, OracleVLM
from .world import inspect_image, preference_dataset, sample_scene


def unlabelled_pairs(num_pairs: int, seed: int) -> Dataset:
    """Pairs without the labels of their instances: only the label of the whole image is known."""
    return preference_dataset(num_pairs, seed=seed).remove_columns("instances")


def annotation_task(source: dict[str, Any], columns: dict[str, str]) -> Task:
    """Finds the instances of the pairs and judges them, with the oracle instead of models."""
    vlm = OracleVLM()
    return instance_task(Planner(vlm), OracleDetector(), Judge(vlm, crop_size=64), source, columns)


def train(pipeline: DiffusionPipeline, pairs: Dataset, settings: dict[str, Any]) -> InstanceDPOTrainer:
    """Trains all weights of the pipeline's denoiser, in place."""
    model = model_of(pipeline)
    settings = FAST | model.conditions | model.pair_training | {"beta": model.pair_beta} | settings
    trainer = InstanceDPOTrainer(pipeline, args=InstanceDPOConfig(**settings), train_dataset=pairs)
    return train_quietly(trainer)


def score(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Shares of the images in which A, and B, is clean, and matches the prompt."""
    findings = [inspect_image(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    shares = {}
    for what in ("clean", "match"):
        for index, shape in enumerate("ab"):
            shares[f"{what}_{shape}"] = sum(getattr(found[index], what) for found in findings) / len(findings)
    return shares | {"n": len(findings)}


EXPERIMENT = Experiment(
    name="scenes",
    arms={
        "dpo": Arm("Diffusion-DPO", train, {"w_neg": 1.0}),
        "iapo": Arm("IAPO", train, {"w_neg": 0.0}),
        "iapo_covering": Arm("IAPO, covering", train, {"w_neg": 0.0, "mask_overlap": "covering"}),
    },
    figures={
        "clean_a": ("A clean", ".3f"),
        "clean_b": ("B clean", ".3f"),
        "match_a": ("A matches", ".3f"),
        "match_b": ("B matches", ".3f"),
    },
    unlabelled_rows=unlabelled_pairs,
    find_columns=pair_columns,
    annotation_task=annotation_task,
    sample_scene=sample_scene,
    score=score,
)


def report(model: TinyModel, results: dict[str, dict[str, float]], counts: dict[str, int], max_steps: int) -> str:
    """Markdown that says what was run and what came out."""
    num_samples, training = results["base"]["n"], model.pair_training
    return f"""## IAPO: does it help to know which object contradicts the label?

A tiny {model.title} pipeline generates scenes of two shapes, A (large, left) and B (smaller, right). About half of the time
a shape has a bite out of its outline. {counts["rows"]} pairs of scenes say which of two images is better. Shape A decides: it is
whole in the chosen image and bitten in the rejected one. In 46 % of the pairs shape B is whole in the *rejected* image, so the
label is wrong about B. The training data do not say this: `annotate-instances` finds the instances, with an oracle instead of
models. It found {counts["instances"]} instances in {counts["ok"]} pairs, and {counts["conflicts"]} of them
({counts["conflicts"] / counts["instances"]:.1%}) are better in the rejected image.

{results_table(EXPERIMENT, results)}

Each number is a share of {num_samples} images per model. All models start from the same prompts and noise (standard error at
most {0.5 / num_samples**0.5:.3f}). *Clean*: the shape has no bite. *Matches*: its colour and kind are those of the prompt. A
method that breaks images has fewer matches.

- **Diffusion-DPO** (`w_neg=1`) follows the label everywhere, so what the label says about B nearly cancels out.
- **IAPO** (`w_neg=0`) lowers the weight of a B that contradicts the label. With two instances per image, the paper's mean over
  instances leaves it a weight of one half.
- **IAPO, covering** (`mask_overlap="covering"`, ours) takes the mean over the instances that cover a position only, so a B that
  contradicts the label has no weight at all.

![Images of every model from the same noise](samples.png)

{max_steps} optimizer steps of {training["per_device_train_batch_size"]} pairs, learning rate
{training["learning_rate"]}, beta {model.pair_beta:.0f}, all weights of the {model.denoiser}."""
