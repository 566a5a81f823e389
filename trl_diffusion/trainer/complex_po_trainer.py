# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Stage 2 of CPO (arXiv 2601.04300): towards the expert's positive prediction and away from its negative one. Without an expert, the
reference itself is asked for both.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from ..criteria import Criteria
from ..data.collators import AttributeCollator, ImageCollator, SingleImageCollator
from ..data.formats import check_attribute_columns
from ..hub import hub_id
from ..losses import complex_po_diagnostics, complex_po_loss, reflected_target, strengthened_target
from ..noising import per_sample_errors, timestep_weights
from .adapters import AdapterMixer
from .attribute_sft_trainer import AttributeSFTTrainer
from .attributes import (
    DEFAULT_PEFT_CONFIG,
    AttributePrompts,
    add_expert,
    attribute_words,
    check_expert,
    describe_expert,
    read_expert,
    without_default,
)
from .complex_po_config import ComplexPOConfig
from .diffusion_trainer import DiffusionTrainer, Metrics
from .model_card import Method
from .noised_batch import NoisedBatch
from .publishing import Publisher, criteria_file
from .target_prompts import (
    ComplexPrompts,
    asked_attributes,
    check_expert_or_prompts,
    check_has_attributes,
    degraded,
    degraded_prompts,
    prompts_with_attributes,
    why_targets_coincide,
)


MAX_DRIFT = 1.0
OF_ATTRIBUTES = ("criteria", "attribute_order", "attribute_separator", "max_attributes", "attribute_targets")


class ComplexPOTrainer(DiffusionTrainer):
    """
    Trainer for complex preference optimisation (CPO) of text-to-image diffusion models.

    On one noised image the frozen expert predicts twice: for the prompt with the positive and for the prompt with the
    negative attributes. The policy learns, from the prompt alone, to predict the one and not the other.

    Expert, policy and reference are adapters on one base: the expert's predictions and the reference's are the rows of a
    single forward without gradient, and no second copy of the base is in memory.

    Without an expert, the reference is asked what `args.target_prompts` says: the prompts that an expert would get, or the prompt and
    a part of its words.

    Datasets have the columns of [`attribute_features`]; `id` may be missing. A row with attributes of one kind only trains on
    the term that it has. With `target_prompts="degraded"`, `prompt` and `image` suffice. `args` is a [`ComplexPOConfig`]. The other
    arguments are those of [`DiffusionTrainer`].

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            As for [`DiffusionTrainer`]. It is the reference too, and must be the base that the expert was trained on.
        expert (`str` or [`AttributeSFTTrainer`], *optional*):
            The expert: a folder or a Hub id with its LoRA, or the trainer that trained it. Where that trainer holds the
            very pipeline given as `model`, its LoRA is taken out of it, and it can neither train nor save any more. If left out,
            `args.target_prompts` says what the reference is asked instead.
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `LoraConfig(r=64, lora_alpha=64)`):
            The LoRA to train; `target_modules` defaults to the attention projections. `None` trains all weights, which is only
            possible without an expert.

    Raises:
        `ValueError`: As [`DiffusionTrainer`]; also if the expert is no LoRA, was trained on another base or on other criteria;
            if there is neither an expert nor `args.target_prompts`, or both; if a row has no attributes, some that the criteria do
            not know, or some that contradict one another.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion import ComplexPOConfig, ComplexPOTrainer

    trainer = ComplexPOTrainer(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        expert="user/painting-expert",
        args=ComplexPOConfig(output_dir="sdxl-cpo"),
        train_dataset=load_dataset("user/painting-attributes", split="train"),
    )
    trainer.train()
    ```
    """

    method = Method(
        "CPO", "images", ("trl-diffusion", "text-to-image", "complex-po"), AttributeSFTTrainer.method.paper
    )

    columns = ("prompt", "image", "positive_attributes", "negative_attributes")
    image_columns = ("image",)
    config_class = ComplexPOConfig
    uses_reference = True
    _output_suffix = "CPO"

    def __init__(
        self,
        model: str | DiffusionPipeline,
        expert: str | Path | AttributeSFTTrainer | None = None,
        args: ComplexPOConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        peft_config: LoraConfig | None = DEFAULT_PEFT_CONFIG,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        args = args or self.default_args(model)
        peft_config = without_default(peft_config, args)
        check_expert_or_prompts(expert is not None, args.target_prompts)
        self.is_degraded = args.target_prompts == "degraded"
        self.criteria = None if self.is_degraded else Criteria.load(args.criteria)
        if self.is_degraded:
            self.columns = ("prompt", "image")
            self._card_parameters = dict.fromkeys(OF_ATTRIBUTES, "not used")
        else:
            separator = repr(args.attribute_separator)
            self._card_parameters = {"criteria": self.criteria.name, "attribute_separator": separator}
        self.expert = None
        if expert is not None:
            self._take_expert(expert, model, args, train_dataset, peft_config)
        super().__init__(
            model, None, args, data_collator, train_dataset, eval_dataset, peft_config, callbacks, optimizers
        )

    # ---- The algorithm ----

    def prepare_batch(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        prompts = self.degraded_prompts(inputs) if self.is_degraded else self.expert_prompts(inputs)
        better, worse = prompts.chosen, prompts.rejected
        if self.args.reverse_preference:
            better, worse = worse, better
        policy = prompts.plain if self.args.policy_condition == "prompt" else better
        if self.is_degraded:
            asked = [worse]  # the prediction for the other prompt is the reference's own
        else:
            asked = [prompts.chosen, prompts.rejected] + ([prompts.plain] if self.args.target_strength != 1 else [])
        # The rows of the frozen forward; the last are those of the reference and of the policy
        frozen = self.encoder.conditions(sum(asked, []) + policy, inputs, latents)
        return {
            "prompts": prompts,
            "frozen_conditions": frozen,
            "conditions": {name: value[-len(policy) :] for name, value in frozen.items()},
        }

    def frozen_predictions(self, model: torch.nn.Module, noised: NoisedBatch) -> dict[str, torch.Tensor]:
        """
        The targets and the reference's prediction, from one forward of the base in which each row has its adapter.

        Returns:
            `dict[str, torch.Tensor]`, each of shape `(B, C, h, w)`: float32 `chosen_target` (`z_w`), `rejected_target`
            (`z_l`) and `ref_pred` (`e_ref`).
        """
        args = self.args
        *asked, ref_pred = self._ask_frozen_models(model, noised)
        if self.is_degraded:
            # z_w = e_ref: the first term of the loss holds the policy at the reference. A copy, as a file shares no memory
            targets, plain = [ref_pred.clone(), *asked], [ref_pred]
            chosen, rejected = targets[::-1] if args.reverse_preference else targets
        else:
            chosen, rejected, *plain = asked
        if args.target_strength != 1:
            chosen, rejected = (
                strengthened_target(target, plain[0], args.target_strength) for target in (chosen, rejected)
            )
        return {"chosen_target": chosen, "rejected_target": rejected, "ref_pred": ref_pred}

    def _ask_frozen_models(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, ...]:
        """The predictions `(B, C, h, w)` for each prompt of a row: those of the expert, or of the reference in its place; last `e_ref`."""
        conditions, size = noised.batch["frozen_conditions"], len(noised.latents)
        rows = len(next(iter(conditions.values()))) // size
        inputs = torch.cat([noised.noisy_latents] * rows), noised.timesteps.repeat(rows), conditions
        if self.expert is None:
            with self.reference.lend(model) as reference:
                predictions = self.backbone.predict(reference, *inputs)
        else:
            with self.mixer.mixing([("expert", (rows - 1) * size), (self.reference.adapter, size)]):
                predictions = self.backbone.predict(self.mixer.policy, *inputs)
        return predictions.float().chunk(rows)

    def objective(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        args, prompts = self.args, noised.batch["prompts"]
        stabilized = args.loss_type == "stabilized"
        weights = timestep_weights(noised.timesteps, self.process, args.timestep_weighting)
        model_pred = self.predict_with_policy(model, noised)

        # z_w = e_expert(x_t, t, y + A_pos), z_l = e_expert(x_t, t, y + A_neg), e_ref; without an expert, z_w and z_l are e_ref's
        chosen_target, rejected_target = noised.frozen["chosen_target"], noised.frozen["rejected_target"]
        ref_pred = noised.frozen["ref_pred"]
        # What the policy moves towards in the second term, or away from
        second_target = (
            reflected_target(ref_pred, rejected_target, args.reflection_weight) if stabilized else rejected_target
        )
        chosen_errors = prompts.has_chosen * per_sample_errors(model_pred, chosen_target)
        second_errors = prompts.has_rejected * per_sample_errors(model_pred, second_target)
        ref_chosen_errors = prompts.has_chosen * per_sample_errors(ref_pred, chosen_target)
        ref_second_errors = prompts.has_rejected * per_sample_errors(ref_pred, second_target)
        losses, chosen_rewards, rejected_rewards = complex_po_loss(
            chosen_errors, second_errors, ref_chosen_errors, ref_second_errors, args.beta, weights, stabilized
        )

        chosen_norms, rejected_norms, drift = complex_po_diagnostics(
            losses,
            *(chosen_errors, second_errors, ref_chosen_errors, ref_second_errors, model_pred, ref_pred),
            args.beta,
            weights,
        )
        distance = per_sample_errors(chosen_target, rejected_target)
        has_chosen, has_rejected = prompts.has_chosen.bool(), prompts.has_rejected.bool()
        has_both = has_chosen & has_rejected
        return losses, {
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "drift": drift,
            "rewards/chosen": (chosen_rewards, has_chosen),
            "errors/chosen": (chosen_errors, has_chosen),
            "errors/ref_chosen": (ref_chosen_errors, has_chosen),
            "grad_norms/chosen": (chosen_norms, has_chosen),
            "rewards/rejected": (rejected_rewards, has_rejected),
            "errors/rejected": (per_sample_errors(model_pred, rejected_target), has_rejected),
            "errors/ref_rejected": (per_sample_errors(ref_pred, rejected_target), has_rejected),
            "grad_norms/rejected": (rejected_norms, has_rejected),
            "targets/distance": (distance, has_both),
            "targets/coinciding": (distance < 1e-12, has_both),
        }

    def degraded_prompts(self, inputs: dict[str, Any]) -> ComplexPrompts:
        """The prompts of a batch of the collator, and what degrading leaves of them."""
        return degraded_prompts(inputs["prompt"], self.args).to(self.accelerator.device)

    def expert_prompts(self, inputs: dict[str, Any]) -> ComplexPrompts:
        """The prompts of a batch of the collator, and those that the expert is asked, or the reference in its place."""
        check_has_attributes(inputs)
        plain = self.randomness.drop_prompts(inputs["prompt"], inputs["id"])
        prompts, left_out = prompts_with_attributes(plain, inputs, self.attribute_prompts, self.args)
        device = self.accelerator.device
        self.record({"attributes/left_out": left_out.to(device, non_blocking=True)})
        return prompts.to(device)

    # ---- What the training needs for it ----

    def _take_expert(
        self, expert, model, args: ComplexPOConfig, train_dataset, peft_config: LoraConfig | None
    ) -> None:
        if peft_config is None and args.initial_lora is None:
            raise ValueError(
                "`peft_config` cannot be `None`: expert, reference and policy are adapters on one base. Leave it out for "
                "a LoRA of rank 64."
            )
        is_trainer = isinstance(expert, AttributeSFTTrainer)
        self.expert = expert.read_expert() if is_trainer else read_expert(expert)
        if is_trainer and expert.backbone.pipeline is model:
            if train_dataset is not None:
                self._prepare_dataset(train_dataset, "train_dataset")  # a mistake here must not cost the expert
            self.args = args
            Publisher(self)  # nor must a token that may not write
            expert.take_adapter()
        name = (expert.hub_model_id if is_trainer else hub_id(str(expert))) or "not published"
        self._card_parameters = {"expert": name, **self._card_parameters}

    def make_collator(self, **settings: Any) -> ImageCollator:
        return (
            SingleImageCollator(**settings)
            if self.is_degraded
            else AttributeCollator(criteria=self.criteria, **settings)
        )

    def prepare_prompts(self) -> None:
        if not self.is_degraded:
            self.attribute_prompts = AttributePrompts(self.criteria, self.args, self.backbone)

    def finish_init(self) -> None:
        if self.expert is None:
            return
        weights, config, description = self.expert
        check_expert(description, describe_expert(self.policy, self.base, self.criteria, self.args))
        add_expert(self.policy, weights, config)
        self.mixer = AdapterMixer(self.policy)

    def _prepare_dataset(self, dataset, name: str) -> Dataset | IterableDataset:
        dataset = super()._prepare_dataset(dataset, name)
        if not self.is_degraded:
            check_attribute_columns(dataset, name, self.criteria, allow_none=False)
        return dataset

    def prompts_of(self, row: dict[str, Any]) -> list[str | None]:
        if self.is_degraded:
            return [row["prompt"], degraded(row["prompt"], self.args)]
        sides = asked_attributes(row["positive_attributes"], row["negative_attributes"], self.args)
        return [
            self.attribute_prompts(prompt, *side)[0]
            for prompt in super().prompts_of(row)
            for side in [([], []), *sides]
        ]

    @property
    def prompt_settings(self) -> tuple:
        args = self.args
        if self.is_degraded:
            return args.dropped_words, args.seed
        return args.prompt_dropout > 0, args.attribute_targets, self.attribute_prompts.settings

    def _frozen_fingerprints(self) -> list[Any]:
        args, fingerprints = self.args, super()._frozen_fingerprints()
        asked = (args.attribute_targets, args.target_strength, args.reverse_preference, args.policy_condition)
        if self.is_degraded:
            return [*fingerprints, asked, args.dropped_words]
        written = self.attribute_prompts.settings
        if self.expert is None:
            return [*fingerprints, asked, written]
        weights, config, description = self.expert
        expert = {name: weight.float().cpu().numpy() for name, weight in weights.items()}
        return [*fingerprints, Hasher.hash((expert, config.to_dict(), description)), asked, written]

    def record_details(self) -> dict[str, Any]:
        criteria = {} if self.is_degraded else {"criteria": attribute_words(self.criteria)}
        return criteria if self.expert is None else {**criteria, "expert": self.expert[0]}

    def further_files(self) -> dict[str, bytes]:
        return {} if self.is_degraded else criteria_file(self.criteria, self.args)

    def health_warnings(self, logs: dict[str, float]) -> dict[str, str]:
        args, warnings = self.args, {}
        if logs.get("drift", 0) > MAX_DRIFT:
            bounded = args.loss_type == "stabilized"
            warnings["drift"] = (
                f"The policy's predictions are {logs['drift'] ** 0.5:.1f} times as far from the reference's as its targets are. "
                "Rewards and accuracies look fine meanwhile, and the images decay. Lower `learning_rate` or `max_steps`, or "
                + (
                    "lower `reflection_weight`."
                    if bounded
                    else "train with `loss_type='stabilized'`, which is bounded."
                )
            )
        if logs.get("targets/coinciding", 0) > 0:
            advice = why_targets_coincide(args.target_prompts, logs.get("attributes/left_out", 0) > 0)
            asked = "reference" if self.expert is None else "expert"
            warnings["targets"] = (
                f"For {logs['targets/coinciding']:.0%} of the samples the {asked}'s positive and negative predictions are equal, so "
                f"there is nothing to learn from them. {advice}"
            )
        return warnings
