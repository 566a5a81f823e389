# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation,quantization,trackio]",
# ]
# ///

"""
Trains with Diffusion-KTO, on single images that are labelled as desirable or not.

LoRA:

```bash
trl-diffusion diffusion-kto \
    --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --dataset_name user/liked-images \
    --use_peft \
    --learning_rate 1e-4 \
    --max_steps 200 \
    --per_device_train_batch_size 32 \
    --output_dir sd15-kto-lora
```

All weights, from a recipe:

```bash
trl-diffusion diffusion-kto --config examples/configs/kto_sd15.yaml --dataset_name user/liked-images
```
"""

from trl_diffusion.cli.parser import CommandParser


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import DiffusionKTOTrainer
    from trl_diffusion.scripts.utils import train

    train(DiffusionKTOTrainer, script_args, training_args, model_args)


def make_parser(prog: str | None = None) -> CommandParser:
    from trl_diffusion import DiffusionKTOConfig, ModelConfig
    from trl_diffusion.scripts.dataset_arguments import DatasetArguments

    return CommandParser((DatasetArguments, DiffusionKTOConfig, ModelConfig), prog=prog, is_launched=True)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("diffusion-kto", lambda: sys.modules[__name__]))
