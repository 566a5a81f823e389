# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the expert of complex preference optimization (CPO): a LoRA that knows attributes by their words.

```bash
trl-diffusion attribute-sft \
    --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --dataset_name user/painting-attributes \
    --attribute_dropout 0.3 \
    --learning_rate 1e-4 \
    --num_train_epochs 10 \
    --output_dir painting-expert
```

`--use_peft false` trains all weights, which gives a fine-tuned model, but no expert for `complex-po`.
"""

from trl import TrlParser


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import AttributeSFTTrainer
    from trl_diffusion.scripts.utils import get_datasets, get_model, get_peft_config, run_training

    model = get_model(model_args, training_args)
    train_dataset, eval_dataset = get_datasets(script_args, training_args)
    trainer = AttributeSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer, script_args.dataset_name)


def make_parser(prog: str | None = None) -> TrlParser:
    from trl import ScriptArguments

    from trl_diffusion import AttributeSFTConfig, ModelConfig

    parser = TrlParser((ScriptArguments, AttributeSFTConfig, ModelConfig), prog=prog)
    parser.set_defaults(use_peft=True)
    return parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
