# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Make the LoRAs that the Space shows out of the box: on the two small worlds of the quickstart, on a CPU.

    python examples/space/prepare.py --output_dir examples/space/embedded

Each is trained as anybody would, with samples and a history, which the Space shows too. It takes five minutes of CPU
time. The same seed gives the same weights on one machine.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig

from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.quickstart.cpo import CRITERIA, lora
from trl_diffusion.quickstart.experiment import FAST
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.sampling import SAMPLING, load_pipeline, shipped
from trl_diffusion.quickstart.world import preference_dataset
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer
from trl_diffusion.trainer.lora import LORA_WEIGHTS_NAME


RANK = 4
MODEL = MODELS["unet"]
SCENES = ["a red circle and a blue square", "a green triangle and a yellow circle", "a blue square and a red triangle"]
PAINTINGS = ["a red circle", "a blue square", "a green triangle"]
KEPT = (LORA_WEIGHTS_NAME, "trainer_state.json", "samples")


def pair_trainer(pipeline: DiffusionPipeline, pairs: Dataset, settings: dict[str, Any]) -> DiffusionTrainer:
    """IAPO or Diffusion-DPO on the scenes."""
    args = InstanceDPOConfig(beta=MODEL.pair_beta, learning_rate=1e-3, sample_prompts=SCENES, **settings)
    return InstanceDPOTrainer(pipeline, args=args, train_dataset=pairs, peft_config=small_lora(pipeline))


def sft_trainer(pipeline: DiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> DiffusionTrainer:
    """Fine-tuning on the paintings without negative attributes."""
    best = paintings.filter(lambda row: not row["negative_attributes"])
    args = AttributeSFTConfig(
        criteria=CRITERIA, attribute_dropout=1.0, learning_rate=3e-3, sample_prompts=PAINTINGS, **settings
    )
    return AttributeSFTTrainer(pipeline, args=args, train_dataset=best, peft_config=small_lora(pipeline))


def cpo_trainer(pipeline: DiffusionPipeline, paintings: Dataset, settings: dict[str, Any]) -> DiffusionTrainer:
    """CPO-S with paired targets."""
    args = ComplexPOConfig(
        criteria=CRITERIA,
        beta=MODEL.painting_beta,
        attribute_targets="paired",
        target_strength=2.0,
        learning_rate=3e-3,
        sample_prompts=PAINTINGS,
        **settings,
    )
    return ComplexPOTrainer(
        pipeline,
        expert=shipped(MODEL.expert),
        args=args,
        train_dataset=paintings,
        peft_config=small_lora(pipeline),
    )


# By the name of the folder: the base, what makes its trainer, and what only this training sets
TRAININGS = {
    "scenes-dpo": (MODEL.scenes, pair_trainer, {"w_neg": 1.0}),
    "scenes-iapo": (MODEL.scenes, pair_trainer, {"w_neg": 0.0, "mask_overlap": "covering"}),
    "scenes-reversed": (
        MODEL.scenes,
        pair_trainer,
        {"w_neg": 0.0, "mask_overlap": "covering", "reverse_preference": True},
    ),
    "paintings-sft": (MODEL.paintings, sft_trainer, {}),
    "paintings-cpo": (MODEL.paintings, cpo_trainer, {}),
    "paintings-reversed": (MODEL.paintings, cpo_trainer, {"reverse_preference": True}),
}


def small_lora(pipeline: DiffusionPipeline) -> LoraConfig:
    return lora(pipeline, rank=RANK)


def make(name: str, output_dir: Path, max_steps: int, num_rows: int, seed: int = 0) -> None:
    """
    Trains one of the LoRAs.

    Args:
        name (`str`):
            A key of `TRAININGS`.
        output_dir (`Path`):
            The LoRA, the history and the samples of its training go to the folder of this name in it.
        max_steps (`int`):
            Optimizer steps of 32 rows.
        num_rows (`int`):
            Pairs or paintings to train on.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the data and of the training.
    """
    base, make_trainer, own = TRAININGS[name]
    rows = (preference_dataset if base == MODEL.scenes else painting_dataset)(num_rows, seed=seed)
    with TemporaryDirectory() as folder:
        settings = FAST | {
            "output_dir": folder,
            "logging_steps": 2,
            "seed": seed,
            "max_steps": max_steps,
            "sample_steps": max(1, max_steps // 5),
            "num_inference_steps": SAMPLING["num_inference_steps"],
            "guidance_scale": SAMPLING["guidance_scale"],
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 5,
            "per_device_train_batch_size": 32,
        }
        trainer = make_trainer(load_pipeline(base), rows, settings | own)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        for kept in KEPT:
            source, target = Path(folder) / kept, output_dir / name / kept
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the LoRAs.")
    parser.add_argument("--names", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="Which to train.")
    parser.add_argument("--max_steps", type=int, default=110, help="Optimizer steps of each training.")
    parser.add_argument("--num_rows", type=int, default=2048, help="Pairs and paintings to train on.")
    args = parser.parse_args()

    torch.set_num_threads(1)
    for name in args.names:
        make(name, args.output_dir, args.max_steps, args.num_rows)
        print(f"Made {args.output_dir / name}.", flush=True)


if __name__ == "__main__":
    main()
