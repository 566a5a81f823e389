# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains with complex preference optimization (CPO): towards an expert's positive predictions, away from its negative ones.

```bash
trl-diffusion complex-po \
    --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --expert user/painting-expert \
    --dataset_name user/painting-attributes \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir sdxl-cpo
```

The adapter for `negative_preference_guidance` (NPO) is the same command with `--reverse_preference`.
"""

from dataclasses import dataclass, field

from trl import ScriptArguments, TrlParser


@dataclass
class ComplexPOScriptArguments(ScriptArguments):
    """
    Arguments of `trl-diffusion complex-po` besides those of the training and of the model.

    Parameters:
        expert (`str`, *optional*):
            Folder or Hub id of the expert, see `trl-diffusion attribute-sft`.
    """

    expert: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the expert that `attribute-sft` trained."}
    )


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import ComplexPOTrainer
    from trl_diffusion.scripts.utils import get_datasets, get_model, get_peft_config, run_training

    model = get_model(model_args, training_args)
    if not script_args.expert:
        raise ValueError("`--expert` is missing: name the folder or the Hub id of what `attribute-sft` trained.")
    train_dataset, eval_dataset = get_datasets(script_args, training_args)
    trainer = ComplexPOTrainer(
        model=model,
        expert=script_args.expert,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer, script_args.dataset_name)


def make_parser(prog: str | None = None) -> TrlParser:
    from trl_diffusion import ComplexPOConfig, ModelConfig

    parser = TrlParser((ComplexPOScriptArguments, ComplexPOConfig, ModelConfig), prog=prog)
    parser.set_defaults(use_peft=True)
    return parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
