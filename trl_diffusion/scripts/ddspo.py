# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation,quantization,trackio]",
# ]
# ///

"""
Trains with direct diffusion score preference optimization (DDSPO): on image pairs, with the model's own predictions for the prompt and
for a degraded prompt as targets.

```bash
trl-diffusion ddspo \
    --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --dataset_name user/pickapic-instance \
    --use_peft \
    --learning_rate 1e-6 \
    --max_steps 200 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 32 \
    --output_dir sd15-ddspo
```
"""

from trl_diffusion.cli.parser import CommandParser


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import DDSPOTrainer
    from trl_diffusion.scripts.utils import train

    train(DDSPOTrainer, script_args, training_args, model_args)


def make_parser(prog: str | None = None) -> CommandParser:
    from trl_diffusion import DDSPOConfig, ModelConfig
    from trl_diffusion.scripts.dataset_arguments import DatasetArguments

    return CommandParser((DatasetArguments, DDSPOConfig, ModelConfig), prog=prog, is_launched=True)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("ddspo", lambda: sys.modules[__name__]))
