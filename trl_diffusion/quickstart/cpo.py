# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The quickstart's second half: can a model learn qualities from an expert that can tell them apart?"""

from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image

from ..annotation.attribute_expert import AttributeExpert
from ..annotation.attributes import attribute_task
from ..annotation.records import image_columns
from ..annotation.run import Task
from ..criteria import Criteria
from ..data.formats import ATTRIBUTE_COLUMNS
from ..trainer.attribute_sft_config import AttributeSFTConfig
from ..trainer.attribute_sft_trainer import AttributeSFTTrainer
from ..trainer.complex_po_config import ComplexPOConfig
from ..trainer.complex_po_trainer import ComplexPOTrainer
from .experiment import FAST, Arm, Experiment, results_table, train_quietly
from .models import TinyModel, model_of
from .oracle import OracleVLM
from .paintings import inspect_painting, painting_dataset, sample_painting
from .sampling import shipped


CRITERIA = shipped("criteria.yaml")


def unlabelled_paintings(num_paintings: int, seed: int) -> Dataset:
    """Paintings without their attributes."""
    return painting_dataset(num_paintings, seed=seed).remove_columns(list(ATTRIBUTE_COLUMNS))


def annotation_task(source: dict[str, Any], columns: dict[str, str]) -> Task:
    """Finds the attributes of the paintings, with the oracle instead of a model."""
    return attribute_task(AttributeExpert(OracleVLM(), Criteria.load(CRITERIA)), source, columns)


def training_settings(pipeline: DiffusionPipeline, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training on paintings; those that are given stand above the model's."""
    model = model_of(pipeline)
    return FAST | model.conditions | model.painting_training | settings


def lora(pipeline: DiffusionPipeline, rank: int = 16) -> LoraConfig:
    """The LoRA of a training on paintings."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=model_of(pipeline).target_modules)


def train_sft(pipeline: DiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> AttributeSFTTrainer:
    """Trains a LoRA on the paintings without negative attributes."""
    # No attributes in the prompts: this arm learns only from the choice of the images
    args = AttributeSFTConfig(criteria=CRITERIA, attribute_dropout=1.0, **training_settings(pipeline, settings))
    trainer = AttributeSFTTrainer(
        pipeline,
        args=args,
        train_dataset=paintings.filter(lambda row: not row["negative_attributes"]),
        peft_config=lora(pipeline),
    )
    return train_quietly(trainer)


def train_cpo(pipeline: DiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> ComplexPOTrainer:
    """Trains a LoRA on the predictions of the expert."""
    model = model_of(pipeline)
    trainer = ComplexPOTrainer(
        pipeline,
        expert=shipped(model.expert),
        args=ComplexPOConfig(
            criteria=CRITERIA, **training_settings(pipeline, {"beta": model.painting_beta} | settings)
        ),
        train_dataset=paintings,
        peft_config=lora(pipeline),
    )
    return train_quietly(trainer)


def score(images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Mean numbers of negative and of positive attributes per image, and the share of images that match their prompt."""
    findings = [inspect_painting(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {
        "negatives": sum(len(finding.negative_attributes) for finding in findings) / len(findings),
        "positives": sum(len(finding.positive_attributes) for finding in findings) / len(findings),
        "match": sum(finding.match for finding in findings) / len(findings),
        "n": len(findings),
    }


EXPERIMENT = Experiment(
    name="paintings",
    arms={
        "sft": Arm("SFT on the best", train_sft, {}),
        "cpo": Arm("CPO", train_cpo, {"loss_type": "unstabilized"}),
        "cpo_stabilised": Arm("CPO-S", train_cpo, {}),
        "cpo_paired": Arm("CPO-S, paired", train_cpo, {"attribute_targets": "paired", "target_strength": 2.0}),
    },
    figures={"negatives": ("negatives", ".2f"), "match": ("matches", ".3f")},
    unlabelled_rows=unlabelled_paintings,
    find_columns=image_columns,
    annotation_task=annotation_task,
    sample_scene=sample_painting,
    score=score,
)


def report(model: TinyModel, results: dict[str, dict[str, float]], counts: dict[str, int], max_steps: int) -> str:
    """Markdown that says what was run and what came out."""
    num_samples, training = results["base"]["n"], model.painting_training
    strength = EXPERIMENT.arms["cpo_paired"].settings["target_strength"]
    return f"""## CPO: can a model learn qualities from an expert that can tell them apart?

A tiny {model.title} pipeline generates paintings of one shape on a ground. The outline is whole or bitten, the colour vivid or
pale, the place in the middle or aside, the ground bright or murky. Each quality is negative half of the time, and one painting in
16 has no negative quality at all. Prompts name none of them. `annotate-attributes`, with an oracle instead of a model, found
{counts["positive_attributes"]} positive and {counts["negative_attributes"]} negative qualities in {counts["ok"]} paintings. The
expert, a LoRA that comes with the package, was trained with the qualities in its prompts and generates those that a prompt names.

{results_table(EXPERIMENT, results)}

The table shows the mean number of negative qualities, out of 4, in {num_samples} images per model, all from the same prompts and
noise (standard error about {1 / num_samples**0.5:.2f}), and the share of images that show the colour and kind that the prompt
names.

- **SFT on the best** is fine-tuned on the paintings without negative qualities, one in 16.
- **CPO** (`loss_type="unstabilized"`) moves towards the expert's positive prediction and away from its negative one, without
  a bound.
- **CPO-S** (`loss_type="stabilized"`) moves towards the reflection of the negative prediction instead.
- **CPO-S, paired** (`attribute_targets="paired"`, `target_strength={strength}`, ours) asks the expert for all qualities in
  their positive and in their negative form, and puts its targets {strength:g} times as far apart.

![Images of every model from the same noise](paintings.png)

{max_steps} optimizer steps of {training["per_device_train_batch_size"]} paintings, learning rate
{training["learning_rate"]}, beta {model.painting_beta:.0f}, a LoRA of rank 16."""
