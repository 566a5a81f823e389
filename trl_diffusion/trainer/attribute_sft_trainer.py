# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stage 1 of CPO (arXiv 2601.04300): the expert, a LoRA that knows attributes by their words."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from ..criteria import Criteria, render_prompt
from ..data.collators import AttributeCollator
from ..data.formats import check_attribute_columns
from ..noising import per_sample_errors
from ..randomness import keyed_generator
from .attribute_sft_config import AttributeSFTConfig
from .attributes import (
    DEFAULT_PEFT_CONFIG,
    EXPERT_FILE_NAME,
    AttributePrompts,
    attribute_words,
    describe_expert,
    without_default,
)
from .diffusion_trainer import DiffusionTrainer, Metrics
from .model_card import Method
from .noised_batch import NoisedBatch
from .publishing import criteria_file
from .sharding import whole_lora


class AttributeSFTTrainer(DiffusionTrainer):
    """
    Trainer for supervised fine-tuning on images with attributes: stage 1 of complex preference optimisation (CPO).

    The model learns to generate an image from its prompt joined with the positive and the negative attributes that it has.
    The LoRA that is saved is the expert of [`ComplexPOTrainer`].

    Datasets have the columns of [`attribute_features`]; `id` may be missing. `args` is an [`AttributeSFTConfig`]. The other
    arguments are those of [`DiffusionTrainer`].

    Args:
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `LoraConfig(r=64, lora_alpha=64)`):
            The LoRA to train; `target_modules` defaults to the attention projections. `None` trains all weights, which
            gives a fine-tuned model, but no expert.

    Raises:
        `ValueError`: As [`DiffusionTrainer`]; also if a row has attributes that the criteria do not know or that contradict
            one another.

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

    method = Method(
        "attribute SFT, stage 1 of CPO",
        "images",
        ("trl-diffusion", "text-to-image", "attribute-sft"),
        {
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
        },
    )

    columns = ("prompt", "image", "positive_attributes", "negative_attributes")
    image_columns = ("image",)
    config_class = AttributeSFTConfig
    _output_suffix = "AttributeSFT"

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
        args = args or self.default_args(model)
        peft_config = without_default(peft_config, args)
        self.criteria = Criteria.load(args.criteria)
        self.is_taken = False
        super().__init__(
            model, None, args, data_collator, train_dataset, eval_dataset, peft_config, callbacks, optimizers
        )

    def make_collator(self, **settings: Any) -> AttributeCollator:
        return AttributeCollator(criteria=self.criteria, **settings)

    def prepare_prompts(self) -> None:
        self.attribute_prompts = AttributePrompts(self.criteria, self.args, self.backbone)
        self._card_parameters = {
            "criteria": self.criteria.name,
            "attribute_separator": repr(self.args.attribute_separator),
        }

    def _prepare_dataset(self, dataset, name: str) -> Dataset | IterableDataset:
        dataset = super()._prepare_dataset(dataset, name)
        check_attribute_columns(dataset, name, self.criteria, allow_none=True)
        return dataset

    def objective(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        target = self.process.target(noised.latents, noised.noise, noised.timesteps)
        return per_sample_errors(self.predict_with_policy(model, noised), target), {}

    def prompts(self, inputs: dict[str, Any]) -> list[str | None]:
        """
        Joins prompts with their attributes; in training, each attribute is dropped with `args.attribute_dropout`.

        Args:
            inputs (`dict[str, Any]`):
                A batch of the collator, of which `id`, `prompt`, `positive_attributes` and `negative_attributes` are read.

        Returns:
            `list[str | None]` of length `B`: the prompts; `None` is the unconditional branch.
        """
        prompts, left_out = [], []
        for row_id, prompt, positive, negative in zip(
            inputs["id"], inputs["prompt"], inputs["positive_attributes"], inputs["negative_attributes"], strict=True
        ):
            if self.model.training and self.args.attribute_dropout > 0:
                generator = keyed_generator(*self.randomness.key(row_id), "attributes")
                uniform = torch.rand(len(positive) + len(negative), generator=generator)
                kept = (uniform >= self.args.attribute_dropout).tolist()
                positive, negative = (
                    [name for name, keep in zip(names, flags, strict=True) if keep]
                    for names, flags in ((positive, kept[: len(positive)]), (negative, kept[len(positive) :]))
                )
            text, missing = self.attribute_prompts(prompt, positive, negative)
            prompts.append(text)
            left_out.append(missing)
        self.record({"attributes/left_out": torch.tensor(left_out).to(self.accelerator.device, non_blocking=True)})
        return self.randomness.drop_prompts(prompts, inputs["id"])

    def prompts_of(self, row: dict[str, Any]) -> list[str | None]:
        prompt, _ = self.attribute_prompts(row["prompt"], row["positive_attributes"], row["negative_attributes"])
        return super().prompts_of({"prompt": prompt})

    @property
    def prompt_settings(self) -> tuple:
        return self.args.prompt_dropout > 0, self.attribute_prompts.settings

    @property
    def has_fixed_prompts(self) -> bool:
        return self.args.attribute_dropout == 0

    # ---- The expert ----

    def train(self, *args, **kwargs):
        self.check_not_taken()
        return super().train(*args, **kwargs)

    def read_expert(self) -> tuple[dict[str, torch.Tensor], LoraConfig, dict[str, Any]]:
        """
        The expert, as [`trainer.attributes.read_expert`] reads a saved one.

        Returns:
            `tuple[dict[str, torch.Tensor], LoraConfig, dict[str, Any]]`: weights, configuration and description.

        Raises:
            `ValueError`: If all weights were trained, or the LoRA was taken out of its pipeline.
        """
        self.check_not_taken()
        if not isinstance(self.policy, PeftModel):
            raise ValueError(
                "`expert` was trained with all its weights. Expert, reference and policy are adapters on one base: train "
                "the expert with a `peft_config`."
            )
        weights = {name: weight.clone() for name, weight in whole_lora(self.policy).items()}
        return weights, self.policy.peft_config["default"], self._description()

    def take_adapter(self) -> None:
        """
        Takes the LoRA out of the pipeline, which is then the base that it was before. This trainer cannot be used afterwards.
        """
        if self.is_sharding:
            raise ValueError(
                "The pipeline of `expert` is cut over the processes, and cannot be trained again. Save the expert, and train from its "
                "folder in another run."
            )
        self.policy.unload()
        self.is_taken = True

    def check_not_taken(self) -> None:
        """Raises a `ValueError` where [`~AttributeSFTTrainer.take_adapter`] was called."""
        if self.is_taken:
            raise ValueError(
                "This trainer's LoRA was taken out of its pipeline, which a `ComplexPOTrainer` trains now. Save an expert "
                "before it is handed over, or load another pipeline for the `ComplexPOTrainer`."
            )

    def record_details(self) -> dict[str, Any]:
        return {"criteria": attribute_words(self.criteria)}

    def _description(self) -> dict[str, Any]:
        return describe_expert(self.policy, self.base, self.criteria, self.args)

    @property
    def _example_prompt(self) -> str:
        attributes = [(attribute, "positive") for attribute in self.criteria.attributes]
        return render_prompt(super()._example_prompt, attributes, self.args.attribute_separator, maximum=2)[0]

    def save_files(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        self.check_not_taken()
        super().save_files(folder, weights)
        (folder / EXPERT_FILE_NAME).write_bytes(self._described())

    def _described(self) -> bytes:
        return (json.dumps(self._description(), indent=2) + "\n").encode()

    def further_files(self) -> dict[str, bytes]:
        return {EXPERT_FILE_NAME: self._described(), **criteria_file(self.criteria, self.args)}
