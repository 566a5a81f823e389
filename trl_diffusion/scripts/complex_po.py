# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation,quantization,trackio]",
# ]
# ///

"""
Trains with complex preference optimization (CPO): towards the positive predictions of an expert, and away from its negative
predictions.

```bash
trl-diffusion complex-po \
    --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --expert user/painting-expert \
    --dataset_name user/painting-attributes \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir sdxl-cpo
```

The same command with `--reverse_preference` trains the adapter for `negative_preference_guidance` (NPO).

Without an expert, `--target_prompts` says what the model itself is asked for the two predictions. For `degraded`, the dataset needs
no attributes:

```bash
trl-diffusion complex-po \
    --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --target_prompts degraded \
    --dataset_name user/paintings \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir sdxl-cpo-degraded
```
"""

from dataclasses import dataclass, field
from functools import partial

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.scripts.dataset_arguments import DatasetArguments


@dataclass
class ComplexPOScriptArguments(DatasetArguments):
    """
    Arguments of `trl-diffusion complex-po`, besides those of the training and of the model.

    Parameters:
        expert (`str`, *optional*):
            Folder or Hub id of the expert that `trl-diffusion attribute-sft` trained. If left out, `--target_prompts` must be given.
    """

    expert: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the expert that `attribute-sft` trained. Without one, give `--target_prompts`."
        },
    )


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import ComplexPOTrainer
    from trl_diffusion.scripts.utils import train

    if not script_args.expert and training_args.target_prompts is None:
        raise ValueError(
            "`--expert` is missing: give the folder or the Hub id of an expert that `attribute-sft` trained. To train without one, say "
            "by `--target_prompts` what the model is asked in its place: `attributes` or `degraded`."
        )
    train(partial(ComplexPOTrainer, expert=script_args.expert or None), script_args, training_args, model_args)


def make_parser(prog: str | None = None) -> CommandParser:
    from trl_diffusion import ComplexPOConfig, ModelConfig

    parser = CommandParser((ComplexPOScriptArguments, ComplexPOConfig, ModelConfig), prog=prog, is_launched=True)
    parser.set_defaults(use_peft=True)
    return parser


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("complex-po", lambda: sys.modules[__name__]))
