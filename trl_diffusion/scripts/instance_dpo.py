# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

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

from trl import TrlParser


def main(script_args, training_args, model_args) -> None:
    from trl_diffusion import InstanceDPOTrainer
    from trl_diffusion.scripts.utils import get_peft_config, get_split, load_splits

    if not model_args.model_name_or_path:
        raise ValueError("`--model_name_or_path` is missing: name a diffusers pipeline of the Hub, or its folder.")
    model_init_kwargs = {"revision": model_args.model_revision, "variant": model_args.variant}
    training_args.model_init_kwargs = {
        **{name: value for name, value in model_init_kwargs.items() if value is not None},
        **(training_args.model_init_kwargs or {}),
    }
    splits = load_splits(script_args)
    evaluates = training_args.eval_strategy != "no"

    trainer = InstanceDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=get_split(splits, script_args.dataset_train_split, "--dataset_train_split"),
        eval_dataset=get_split(splits, script_args.dataset_test_split, "--dataset_test_split") if evaluates else None,
        peft_config=get_peft_config(model_args),
    )
    resume = training_args.resume_from_checkpoint  # a folder, or "true" for the last checkpoint of `output_dir`
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.accelerator.print("Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def make_parser(prog: str | None = None) -> TrlParser:
    from trl import ScriptArguments

    from trl_diffusion import InstanceDPOConfig, ModelConfig

    return TrlParser((ScriptArguments, InstanceDPOConfig, ModelConfig), prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
