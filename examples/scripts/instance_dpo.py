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
`--resume_from_checkpoint true` continues a run that was stopped.
"""

from trl import TrlParser

from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, ModelConfig
from trl_diffusion.scripts.dataset_arguments import DatasetArguments
from trl_diffusion.scripts.utils import get_datasets, get_model, get_peft_config


if __name__ == "__main__":
    parser = TrlParser((DatasetArguments, InstanceDPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    model = get_model(model_args, training_args)
    train_dataset, eval_dataset = get_datasets(script_args, evaluates=training_args.eval_strategy != "no")
    trainer = InstanceDPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args, training_args.initial_lora),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
