# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[evaluation,quantization,trackio]",
#     "trl",
# ]
# ///

"""
Both stages of complex preference optimization on one dataset: trains an expert, then a model that learns from it, and pushes both
to the Hub.

```bash
python examples/scripts/complex_po.py \
    --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --dataset_name user/painting-attributes \
    --expert_dir painting-expert --expert_epochs 10 \
    --output_dir sdxl-cpo \
    --learning_rate 1e-5 --num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
    --sample_prompts "a harbor at dusk" "a portrait of a fisherman" \
    --push_to_hub
```

The expert is pushed to a repository of its own, `sdxl-cpo-expert` here: `--hub_model_id` names the model's, and with `-expert` at the
end the expert's. All flags hold for both trainings but those in `OWN`, which only the second has. With `--resume_from_checkpoint
true` the same command continues where it was stopped, in either training.

The commands `trl-diffusion attribute-sft` and `trl-diffusion complex-po` run one stage each. Use this file if you want to change
something.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from trl import TrlParser

from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, ComplexPOConfig, ComplexPOTrainer, ModelConfig
from trl_diffusion.scripts.dataset_arguments import DatasetArguments
from trl_diffusion.scripts.utils import get_datasets, get_model, get_peft_config


# Of the flags that both trainings have, those that are meant for the second one
OWN = {
    *("output_dir", "hub_model_id", "run_name", "resume_from_checkpoint", "initial_lora", "initial_lora_in_reference"),
    *("learning_rate", "num_train_epochs", "max_steps", "prompt_dropout", "precompute_ref_preds", "noise_source"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
}


@dataclass
class ExpertArguments(DatasetArguments):
    expert_dir: str = field(default="expert", metadata={"help": "Where the expert is saved."})
    expert_epochs: float = field(default=10.0, metadata={"help": "Epochs of its training."})
    expert_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of its training."})


def expert_config(script_args: ExpertArguments, training_args: ComplexPOConfig) -> AttributeSFTConfig:
    """The configuration of the first training. The expert must know the prompts that it gets in the second one."""
    shared = {field.name for field in fields(AttributeSFTConfig)} & {field.name for field in fields(training_args)}
    repository = training_args.hub_model_id or Path(training_args.output_dir).absolute().name
    return AttributeSFTConfig(
        output_dir=script_args.expert_dir,
        hub_model_id=f"{repository}-expert" if training_args.push_to_hub else None,
        num_train_epochs=script_args.expert_epochs,
        learning_rate=script_args.expert_learning_rate,
        attribute_dropout=0.3,
        prompt_dropout=0.1,
        resume_from_checkpoint=None if training_args.resume_from_checkpoint is None else True,
        **{name: getattr(training_args, name) for name in shared - OWN},
    )


if __name__ == "__main__":
    parser = TrlParser((ExpertArguments, ComplexPOConfig, ModelConfig))
    parser.set_defaults(use_peft=True)
    script_args, training_args, model_args = parser.parse_args_and_config()
    if Path(script_args.expert_dir).absolute() == Path(training_args.output_dir).absolute():
        raise ValueError(
            "`--expert_dir` is `--output_dir`: name another folder, or the model would replace its expert."
        )

    model = get_model(model_args, training_args)
    train_dataset, eval_dataset = get_datasets(script_args, evaluates=training_args.eval_strategy != "no")
    resume = training_args.resume_from_checkpoint

    finished = Path(script_args.expert_dir) / "trainer_state.json"  # written last
    if resume is None:
        finished.unlink(missing_ok=True)
    if not finished.exists():
        expert = AttributeSFTTrainer(
            model,
            args=expert_config(script_args, training_args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model_args),
        )
        expert.train(resume_from_checkpoint=expert.args.resume_from_checkpoint)
        expert.save_model()
        expert.create_model_card(dataset_name=script_args.dataset_name)
        if training_args.push_to_hub:
            expert.push_to_hub(dataset_name=script_args.dataset_name)
        expert.save_state()
        del expert  # and with it the first copy of the base

    trainer = ComplexPOTrainer(
        model,
        expert=Path(script_args.expert_dir),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args, training_args.initial_lora),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
