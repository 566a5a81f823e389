# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[quantization,trackio]",
#     "trl",
# ]
# ///

"""
Trains a LoRA on Stable Diffusion 1.5 with instance-aware preference optimization, and pushes it to the Hub.

```bash
python examples/scripts/instance_dpo.py \
    --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --dataset_name user/pickapic-instance \
    --output_dir sd15-iapo-lora \
    --use_peft --learning_rate 1e-4 --max_steps 200 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 32 \
    --sample_prompts "an eagle over a lake" "two cats on a sofa" \
    --push_to_hub
```

The command `trl-diffusion instance-dpo` does the same with these flags. Use this file if you want to change something.
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import ScriptArguments, TrlParser

from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, ModelConfig


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, InstanceDPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    evaluates = training_args.eval_strategy != "no"

    trainer = InstanceDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        peft_config=LoraConfig(r=model_args.lora_r, lora_alpha=model_args.lora_alpha) if model_args.use_peft else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
