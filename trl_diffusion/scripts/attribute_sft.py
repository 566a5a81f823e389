# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation,quantization,trackio]",
# ]
# ///

"""
Trains the expert of complex preference optimization (CPO): a LoRA that knows the words for attributes.

```bash
trl-diffusion attribute-sft \
    --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --dataset_name user/painting-attributes \
    --attribute_dropout 0.3 \
    --learning_rate 1e-4 \
    --num_train_epochs 10 \
    --output_dir painting-expert
```

`--use_peft false` trains all weights. The result is a fine-tuned model, which `complex-po` does not take as an expert.
"""

from trl_diffusion.cli.parser import CommandParser


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import AttributeSFTTrainer
    from trl_diffusion.scripts.utils import train

    train(AttributeSFTTrainer, script_args, training_args, model_args)


def make_parser(prog: str | None = None) -> CommandParser:
    from trl_diffusion import AttributeSFTConfig, ModelConfig
    from trl_diffusion.scripts.dataset_arguments import DatasetArguments

    parser = CommandParser((DatasetArguments, AttributeSFTConfig, ModelConfig), prog=prog, is_launched=True)
    parser.set_defaults(use_peft=True)
    return parser


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("attribute-sft", lambda: sys.modules[__name__]))
