# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 of CPO (arXiv 2601.04300): the expert, a LoRA that knows attributes by their words."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from ..criteria import Criteria, render_prompt
from ..data.collators import AttributeCollator
from ..data.formats import check_attribute_columns
from ..noising import add_noise, keyed_generator, per_sample_errors, training_target
from .attribute_sft_config import AttributeSFTConfig
from .attributes import DEFAULT_PEFT_CONFIG, EXPERT_FILE_NAME, AttributePrompts, describe_expert
from .diffusion_trainer import DiffusionTrainer


class AttributeSFTTrainer(DiffusionTrainer):
    """
    Trainer for supervised fine-tuning on images with attributes: stage 1 of complex preference optimisation (CPO).

    The model learns to draw an image from its prompt joined with the positive and the negative attributes that it has. The
    LoRA it saves is the expert that [`ComplexPOTrainer`] asks.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            What to train, of a family that is supported (Stable Diffusion 1.x and 2.x, SDXL):

            - a Hub id or a folder of a pipeline, loaded with `args.model_init_kwargs`, or
            - a loaded pipeline. Its denoiser is trained in place.
        args ([`AttributeSFTConfig`], *optional*):
            Configuration of the training. If left out, a default one whose output directory is named after the model.
        data_collator (`Callable`, *optional*):
            From rows to a batch. Defaults to [`data.collators.AttributeCollator`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Images with attributes, with the columns of [`attribute_features`]. `id` may be missing; further columns are
            ignored.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Images to evaluate on, or several such datasets by name.
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `LoraConfig(r=64, lora_alpha=64)`):
            The LoRA to train; `target_modules` defaults to the attention projections. `None` trains all weights, which
            gives a fine-tuned model, but no expert.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler to use instead of those that `args` names.

    Raises:
        `ValueError`: If the pipeline's family is not supported, a dataset lacks columns, or a row has attributes that the
            criteria do not know or that contradict one another.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer

    expert = AttributeSFTTrainer(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        args=AttributeSFTConfig(output_dir="painting-expert", attribute_dropout=0.3),
        train_dataset=load_dataset("user/painting-attributes", split="train"),
    )
    expert.train()
    expert.save_model()
    ```
    """

    _tag_names = ["trl-diffusion", "text-to-image", "attribute-sft"]
    _name = "attribute SFT, stage 1 of CPO"
    _unit = "images"
    _paper = {
        "title": "Beyond Binary Preference: Aligning Diffusion Models to Fine-grained Criteria by Decoupling Attributes",
        "id": "2601.04300",
        "citation": """\
@article{meng2026beyond,
    title  = {{Beyond Binary Preference: Aligning Diffusion Models to Fine-grained Criteria by Decoupling Attributes}},
    author = {Meng, Chenye and Li, Zejian and Liu, Zhongni and Li, Yize and Xie, Changle and Jia, Kaixin and Yang, Ling and
              Deng, Huanghuang and Ding, Shiying and Zhang, Shengyuan and Li, Jiayi and Sun, Lingyun},
    year   = {2026},
    eprint = {arXiv:2601.04300},
}""",
    }

    columns = ("prompt", "image", "positive_attributes", "negative_attributes")
    image_columns = ("image",)

    def __init__(
        self,
        model: str | DiffusionPipeline,
        args: AttributeSFTConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        peft_config: LoraConfig | None = DEFAULT_PEFT_CONFIG,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = AttributeSFTConfig(f"{Path(name).name}-AttributeSFT")
        self.criteria = Criteria.load(args.criteria)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if data_collator is None:
            self.data_collator = AttributeCollator(criteria=self.criteria, **self._collator_settings)
        self.attribute_prompts = AttributePrompts(self.criteria, args, self.backbone)
        self._card_parameters = {
            "criteria": self.criteria.name,
            "attribute_separator": repr(args.attribute_separator),
        }
        self.is_taken = False
        if args.sample_prompts:
            self.set_reference(None)  # what the samples are drawn beside
        if args.precompute:
            self.precompute()

    @property
    def has_fixed_prompts(self) -> bool:
        return self.args.attribute_dropout == 0

    def prompts_of(self, row: dict[str, Any]) -> list[str]:
        prompt, _ = self.attribute_prompts(row["prompt"], row["positive_attributes"], row["negative_attributes"])
        return super().prompts_of({"prompt": prompt})

    def train(self, *args, **kwargs):
        self.check_not_taken()
        return super().train(*args, **kwargs)

    def take_adapter(self) -> None:
        """
        Takes the LoRA out of the pipeline, which then is the base that it was before. This trainer is of no use afterwards.
        """
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).unload()
        self.is_taken = True

    def check_not_taken(self) -> None:
        """Raises a `ValueError` where [`~AttributeSFTTrainer.take_adapter`] was called."""
        if self.is_taken:
            raise ValueError(
                "This trainer's LoRA was taken out of its pipeline, which a `ComplexPOTrainer` trains now. Save an expert "
                "before it is handed over, or load another pipeline for the `ComplexPOTrainer`."
            )

    def _prepare_dataset(self, dataset, name: str) -> Dataset | IterableDataset:
        dataset = super()._prepare_dataset(dataset, name)
        check_attribute_columns(dataset, name, self.criteria, allow_none=True)
        return dataset

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        ids = inputs["id"]
        latents = self.sample_latents(inputs)
        prompts = self.drop_prompts(self.prompts_with_attributes(inputs), ids)
        conditions = self.encode_prompts(prompts) | self.image_conditions(inputs, latents)

        losses = []
        for timesteps, noise in self.noise_draws(ids, latents.shape[1:]):
            alphas_cumprod = self.backbone.alphas_cumprod
            noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
            target = training_target(latents, noise, timesteps, alphas_cumprod, self.backbone.prediction_type)
            model_pred = self.backbone.predict(model, noisy_latents, timesteps, conditions)
            losses.append(per_sample_errors(model_pred, target))

        losses = torch.stack(losses).mean(dim=0)
        self.record_losses(losses, ids)
        loss = self.mean_loss(losses, num_items_in_batch)
        return (loss, {"losses": losses}) if return_outputs else loss

    def prompts_with_attributes(self, inputs: dict[str, Any]) -> list[str]:
        """
        The prompts of a batch joined with their attributes, after dropping each attribute with the probability
        `args.attribute_dropout` in training.

        Args:
            inputs (`dict`):
                A batch of [`data.collators.AttributeCollator`].

        Returns:
            `list[str]` of length `B`.
        """
        prompts, left_out = [], []
        for row_id, prompt, positive, negative in zip(
            inputs["id"], inputs["prompt"], inputs["positive_attributes"], inputs["negative_attributes"], strict=True
        ):
            if self.model.training and self.args.attribute_dropout > 0:
                draws = torch.rand(
                    len(positive) + len(negative), generator=keyed_generator(*self._key(row_id), "attributes")
                )
                kept = (draws >= self.args.attribute_dropout).tolist()
                positive, negative = (
                    [name for name, keep in zip(names, flags, strict=True) if keep]
                    for names, flags in ((positive, kept[: len(positive)]), (negative, kept[len(positive) :]))
                )
            text, missing = self.attribute_prompts(prompt, positive, negative)
            prompts.append(text)
            left_out.append(missing)
        self.record(**{"attributes/left_out": torch.tensor(left_out, device=self.accelerator.device)})
        return prompts

    @property
    def _example_prompt(self) -> str:
        attributes = [(attribute, "positive") for attribute in self.criteria.attributes]
        return render_prompt(super()._example_prompt, attributes, self.args.attribute_separator, maximum=2)[0]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.check_not_taken()
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir) / EXPERT_FILE_NAME
            path.write_text(json.dumps(describe_expert(self, self.criteria), indent=2) + "\n")
