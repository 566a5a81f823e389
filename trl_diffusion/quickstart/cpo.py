# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The quickstart's second half: can a model learn qualities from an expert that can tell them apart?"""

from typing import Any

from datasets import Dataset
from diffusers import StableDiffusionPipeline
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
from .experiment import FAST, Arm, Experiment, results_table
from .oracle import OracleVLM
from .paintings import inspect_painting, painting_dataset, sample_painting
from .sampling import shipped


EXPERT = shipped("painting_expert")
CRITERIA = shipped("criteria.yaml")
TRAINING = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "per_device_train_batch_size": 32,
}
BETA = 100.0
# A UNet this small has attention at 4x4 only, so the other layers have to learn too
TARGET_MODULES = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "time_emb_proj"),
]
LORA = LoraConfig(r=16, lora_alpha=16, target_modules=TARGET_MODULES)


def unlabelled_paintings(num_paintings: int, seed: int) -> Dataset:
    """Paintings without their attributes."""
    return painting_dataset(num_paintings, seed=seed).remove_columns(list(ATTRIBUTE_COLUMNS))


def annotation_task(source: dict[str, Any], columns: dict[str, str]) -> Task:
    """Finds the attributes of the paintings, with the oracle instead of a model."""
    return attribute_task(AttributeExpert(OracleVLM(), Criteria.load(CRITERIA)), source, columns)


def train_sft(pipeline: StableDiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> AttributeSFTTrainer:
    """Trains a LoRA on the paintings without negative attributes."""
    trainer = AttributeSFTTrainer(
        pipeline,
        # No attributes in the prompts: this arm learns only from the choice of the images
        args=AttributeSFTConfig(criteria=CRITERIA, attribute_dropout=1.0, **FAST, **TRAINING, **settings),
        train_dataset=paintings.filter(lambda row: not row["negative_attributes"]),
        peft_config=LORA,
    )
    trainer.train()
    return trainer


def train_cpo(pipeline: StableDiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> ComplexPOTrainer:
    """Trains a LoRA on the predictions of the expert."""
    trainer = ComplexPOTrainer(
        pipeline,
        expert=EXPERT,
        args=ComplexPOConfig(criteria=CRITERIA, beta=BETA, **FAST, **TRAINING, **settings),
        train_dataset=paintings,
        peft_config=LORA,
    )
    trainer.train()
    return trainer


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
    base="painting_base",
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


def report(results: dict[str, dict[str, float]], counts: dict[str, int], max_steps: int) -> str:
    """Markdown that says what was run and what came out."""
    num_samples = results["base"]["n"]
    strength = EXPERIMENT.arms["cpo_paired"].settings["target_strength"]
    return f"""## CPO: can a model learn qualities from an expert that can tell them apart?

A tiny Stable Diffusion pipeline generates paintings of one shape on a ground. The outline is whole or bitten, the colour vivid or
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

{max_steps} optimizer steps of {TRAINING["per_device_train_batch_size"]} paintings, learning rate
{TRAINING["learning_rate"]}, beta {BETA:.0f}, a LoRA of rank 16."""
