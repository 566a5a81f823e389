# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
#     "torch",
# ]
# ///

"""Make the quickstart's expert: a LoRA on the base of the tiny paintings that generates the qualities that a prompt names.

    python examples/tiny_pipelines/make_painting_expert.py --output_dir painting_expert
    python examples/tiny_pipelines/make_painting_expert.py --model flow --output_dir flow_painting_expert

It is trained like any expert, by `AttributeSFTTrainer`, on paintings with their attributes, in less than ten minutes
on one core of a CPU. The same seed gives the same weights on one machine.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, Criteria
from trl_diffusion.criteria import render_prompt
from trl_diffusion.quickstart.cpo import CRITERIA, lora, score
from trl_diffusion.quickstart.experiment import FAST
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.paintings import painting_dataset, sample_painting
from trl_diffusion.quickstart.sampling import generate, load_pipeline
from trl_diffusion.quickstart.world import evaluation_prompts
from trl_diffusion.trainer.attributes import EXPERT_FILE_NAME
from trl_diffusion.trainer.lora import LORA_WEIGHTS_NAME


LEARNING_RATES = {"unet": 4e-3, "flow": 1e-3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the expert.")
    parser.add_argument("--model", choices=MODELS, default="unet", help="The kind of model.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the paintings and of the training.")
    parser.add_argument("--num_paintings", type=int, default=12_000, help="Training images, rendered once.")
    parser.add_argument("--max_steps", type=int, default=900, help="Optimizer steps of 64 images.")
    parser.add_argument("--learning_rate", type=float, help="Largest learning rate; by default the model's.")
    parser.add_argument("--num_samples", type=int, default=512, help="Images to score at the end; 0 for none.")
    args = parser.parse_args()

    torch.set_num_threads(1)
    model = MODELS[args.model]
    learning_rate = args.learning_rate or LEARNING_RATES[args.model]
    pipeline = load_pipeline(model.paintings)
    with TemporaryDirectory() as folder:
        trainer = AttributeSFTTrainer(
            pipeline,
            args=AttributeSFTConfig(
                folder,
                criteria=CRITERIA,
                attribute_dropout=0.2,
                prompt_dropout=0.1,
                timestep_range=[250, 1000],  # at smaller timesteps the qualities are already decided
                seed=args.seed,
                max_steps=args.max_steps,
                per_device_train_batch_size=64,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=20,
                **FAST,
                **model.conditions,
            ),
            train_dataset=painting_dataset(args.num_paintings, seed=1_000_000 + args.seed),
            peft_config=lora(pipeline, rank=32),
        )
        trainer.train()
        trainer.save_model()
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name in (LORA_WEIGHTS_NAME, EXPERT_FILE_NAME):
            shutil.copy(Path(folder) / name, args.output_dir / name)

    if args.num_samples:
        pipeline = load_pipeline(model.paintings)  # measured as others will load it
        pipeline.load_lora_weights(str(args.output_dir))
        for form in ("positive", "negative"):
            print(form, measure(pipeline, form, args.num_samples, args.seed))


def measure(pipeline, form: str, num_samples: int, seed: int) -> dict[str, float]:
    """Scores images whose prompts name all attributes in one form."""
    attributes = [(attribute, form) for attribute in Criteria.load(CRITERIA).attributes]
    prompts = evaluation_prompts(num_samples, seed, sample_painting)
    full_prompts = [render_prompt(prompt, attributes)[0] for prompt in prompts]
    return score(generate(pipeline, full_prompts, seed), prompts)


if __name__ == "__main__":
    main()
