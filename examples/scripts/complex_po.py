# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[quantization,trackio]",
#     "transformers",
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

The commands `trl-diffusion attribute-sft` and `trl-diffusion complex-po` run one stage each. Use this file if you want to change
something.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import ScriptArguments, TrlParser

from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, ComplexPOConfig, ComplexPOTrainer, ModelConfig


@dataclass
class ExpertArguments(ScriptArguments):
    expert_dir: str = field(default="expert", metadata={"help": "Where the expert is saved."})
    expert_epochs: float = field(default=10.0, metadata={"help": "Epochs of its training."})
    expert_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of its training."})


if __name__ == "__main__":
    parser = TrlParser((ExpertArguments, ComplexPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    model = model_args.model_name_or_path
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train_dataset = dataset[script_args.dataset_train_split]
    peft_config = LoraConfig(r=model_args.lora_r, lora_alpha=model_args.lora_alpha)

    # The expert must know the prompts that it gets in the second stage, so both stages share the settings for prompts
    expert = AttributeSFTTrainer(
        model,
        args=AttributeSFTConfig(
            output_dir=script_args.expert_dir,
            criteria=training_args.criteria,
            attribute_order=training_args.attribute_order,
            attribute_separator=training_args.attribute_separator,
            attribute_dropout=0.3,
            prompt_dropout=0.1,
            num_train_epochs=script_args.expert_epochs,
            learning_rate=script_args.expert_learning_rate,
            per_device_train_batch_size=training_args.per_device_train_batch_size,
            gradient_accumulation_steps=training_args.gradient_accumulation_steps,
            resolution=training_args.resolution,
            bf16=training_args.bf16,
            use_cpu=training_args.use_cpu,
            report_to=training_args.report_to,
            push_to_hub=training_args.push_to_hub,
        ),
        train_dataset=train_dataset,
        peft_config=peft_config,
    )
    expert.train()
    expert.save_model()
    if training_args.push_to_hub:
        expert.push_to_hub(dataset_name=script_args.dataset_name)
    del expert  # and with it the first copy of the base

    trainer = ComplexPOTrainer(
        model,
        expert=Path(script_args.expert_dir),
        args=training_args,
        train_dataset=train_dataset,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
