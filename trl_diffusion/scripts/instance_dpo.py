# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation,quantization,trackio]",
# ]
# ///

"""
Trains with instance-aware preference optimization (IAPO), or with plain Diffusion-DPO.

LoRA:

```bash
trl-diffusion instance-dpo \
    --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --dataset_name user/pickapic-instance \
    --use_peft \
    --learning_rate 1e-4 \
    --max_steps 200 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 32 \
    --output_dir sd15-iapo-lora
```

All weights, from a recipe:

```bash
trl-diffusion instance-dpo --config examples/configs/iapo_sd15.yaml --dataset_name user/pickapic-instance
```
"""

from trl_diffusion.cli.parser import CommandParser


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import InstanceDPOTrainer
    from trl_diffusion.scripts.utils import train

    train(InstanceDPOTrainer, script_args, training_args, model_args)


def make_parser(prog: str | None = None) -> CommandParser:
    from trl_diffusion import InstanceDPOConfig, ModelConfig
    from trl_diffusion.scripts.dataset_arguments import DatasetArguments

    return CommandParser((DatasetArguments, InstanceDPOConfig, ModelConfig), prog=prog, is_launched=True)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("instance-dpo", lambda: sys.modules[__name__]))
