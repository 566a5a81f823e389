# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stage 2 of CPO (arXiv 2601.04300): towards the expert's positive prediction and away from its negative one."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from ..criteria import Criteria
from ..data.collators import AttributeCollator
from ..data.formats import check_attribute_columns
from ..losses import complex_po_loss, reflected_target, strengthened_target
from ..noising import add_noise, per_sample_errors, timestep_weights
from .attribute_sft_trainer import AttributeSFTTrainer
from .attributes import (
    DEFAULT_PEFT_CONFIG,
    AttributePrompts,
    add_expert,
    check_expert,
    describe_expert,
    read_expert,
)
from .complex_po_config import ComplexPOConfig
from .diffusion_trainer import DiffusionTrainer
from .hub import hub_id


logger = get_logger(__name__)

MAX_DRIFT = 1.0


class ComplexPOTrainer(DiffusionTrainer):
    """
    Trainer for complex preference optimisation (CPO) of text-to-image diffusion models.

    On one noised image the frozen expert predicts twice: for the prompt with the positive and for the prompt with the
    negative attributes. The policy learns, from the prompt alone, to predict the one and not the other.

    Expert, policy and reference are adapters on one base: the expert's predictions and the reference's are the rows of a
    single forward without gradient, and no second copy of the base is in memory.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            What to train, of a family that is supported (Stable Diffusion 1.x and 2.x, SDXL):

            - a Hub id or a folder of a pipeline, loaded with `args.model_init_kwargs`, or
            - a loaded pipeline. Its denoiser is trained in place.

            It is the reference too, and must be the base that the expert was trained on.
        expert (`str` or [`AttributeSFTTrainer`]):
            The expert: a folder or a Hub id with its LoRA, or the trainer that trained it. Where that trainer holds the
            very pipeline given as `model`, its LoRA is taken out of it, and it can neither train nor save any more.
        args ([`ComplexPOConfig`], *optional*):
            Configuration of the training. If left out, a default one whose output directory is named after the model.
        data_collator (`Callable`, *optional*):
            From rows to a batch. Defaults to [`data.collators.AttributeCollator`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Images with attributes, with the columns of [`attribute_features`]. `id` may be missing; further columns are
            ignored. A row with attributes of one kind only trains on the term that it has.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Images to evaluate on, or several such datasets by name.
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `LoraConfig(r=64, lora_alpha=64)`):
            The LoRA to train; `target_modules` defaults to the attention projections.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler to use instead of those that `args` names.

    Raises:
        `ValueError`: If the pipeline's family is not supported; if the expert is no LoRA, was trained on another base or on
            other criteria; if a dataset lacks columns, or a row has no attributes, some that the criteria do not know, or
            some that contradict one another.

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

    _tag_names = ["trl-diffusion", "text-to-image", "complex-po"]
    _name = "CPO"
    _unit = "images"
    _paper = AttributeSFTTrainer._paper

    columns = ("prompt", "image", "positive_attributes", "negative_attributes")
    image_columns = ("image",)

    def __init__(
        self,
        model: str | DiffusionPipeline,
        expert: str | Path | AttributeSFTTrainer,
        args: ComplexPOConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        peft_config: LoraConfig = DEFAULT_PEFT_CONFIG,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = ComplexPOConfig(f"{Path(name).name}-CPO")
        if peft_config is None:
            raise ValueError(
                "`peft_config` cannot be `None`: expert, reference and policy are adapters on one base. Leave it out for "
                "a LoRA of rank 64."
            )
        self.criteria = Criteria.load(args.criteria)
        expert_weights, expert_config, expert_description = read_expert(expert)
        if isinstance(expert, AttributeSFTTrainer) and expert.backbone.pipeline is model:
            if train_dataset is not None:
                self._prepare_dataset(train_dataset, "train_dataset")  # a mistake here must not cost the expert
            expert.take_adapter()
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
            "expert": (hub_id(str(expert)) if isinstance(expert, str | Path) else expert.hub_model_id)
            or "not published",
            "criteria": self.criteria.name,
            "attribute_separator": repr(args.attribute_separator),
        }
        check_expert(expert_description, describe_expert(self, self.criteria))
        add_expert(self.model, expert_weights, expert_config)
        self.warned_of_drift = False
        if args.precompute:
            self.precompute()

    def _prepare_dataset(self, dataset, name: str) -> Dataset | IterableDataset:
        dataset = super()._prepare_dataset(dataset, name)
        check_attribute_columns(dataset, name, self.criteria, allow_none=False)
        return dataset

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        args, ids = self.args, inputs["id"]
        stabilized = args.loss_type == "stabilized"
        latents = self.sample_latents(inputs)
        prompts = self.prompts(inputs)
        frozen_conditions, policy_conditions = self._conditions(prompts, inputs, latents)

        losses = []
        for timesteps, noise in self.noise_draws(ids, latents.shape[1:]):
            alphas_cumprod, prediction_type = self.backbone.alphas_cumprod, self.backbone.prediction_type
            noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
            weights = timestep_weights(timesteps, alphas_cumprod, args.timestep_weighting, prediction_type)

            # z_w = e_expert(x_t, t, y + A_pos), z_l = e_expert(x_t, t, y + A_neg), e_ref
            chosen_target, rejected_target, ref_pred = self.frozen_predictions(
                model, noisy_latents, timesteps, frozen_conditions
            )
            model_pred = self.backbone.predict(model, noisy_latents, timesteps, policy_conditions)

            # What the policy moves towards in the second term, or away from
            second_target = (
                reflected_target(ref_pred, rejected_target, args.reflection_weight) if stabilized else rejected_target
            )
            chosen_errors = prompts.has_chosen * per_sample_errors(model_pred, chosen_target)
            second_errors = prompts.has_rejected * per_sample_errors(model_pred, second_target)
            ref_chosen_errors = prompts.has_chosen * per_sample_errors(ref_pred, chosen_target)
            ref_second_errors = prompts.has_rejected * per_sample_errors(ref_pred, second_target)
            loss, chosen_rewards, rejected_rewards = complex_po_loss(
                chosen_errors, second_errors, ref_chosen_errors, ref_second_errors, args.beta, weights, stabilized
            )
            losses.append(loss)

            # What each term contributes to the gradient of a sample's loss with respect to its prediction
            slope = args.beta * weights * (1 - (-loss.detach()).exp()) / model_pred[0].numel() ** 0.5
            rejected_errors = per_sample_errors(model_pred, rejected_target)
            ref_rejected_errors = per_sample_errors(ref_pred, rejected_target)
            # At the minimum of the stabilised loss at most 1, and at most 1/2 where a row has both terms
            drift = per_sample_errors(model_pred, ref_pred) / (ref_chosen_errors + ref_second_errors).clamp(min=1e-12)
            has_chosen, has_rejected = prompts.has_chosen.bool(), prompts.has_rejected.bool()
            self.record(
                **{
                    "rewards/margins": chosen_rewards - rejected_rewards,
                    "rewards/accuracies": chosen_rewards > rejected_rewards,
                    "drift": drift,
                }
            )
            self.record(
                where=has_chosen,
                **{
                    "rewards/chosen": chosen_rewards,
                    "errors/chosen": chosen_errors,
                    "errors/ref_chosen": ref_chosen_errors,
                    "grad_norms/chosen": slope * chosen_errors.sqrt(),
                },
            )
            self.record(
                where=has_rejected,
                **{
                    "rewards/rejected": rejected_rewards,
                    "errors/rejected": rejected_errors,
                    "errors/ref_rejected": ref_rejected_errors,
                    "grad_norms/rejected": slope * second_errors.sqrt(),
                },
            )
            distance = per_sample_errors(chosen_target, rejected_target)
            self.record(where=has_chosen & has_rejected, **{"targets/distance": distance})

        losses = torch.stack(losses).mean(dim=0)
        self.record_losses(losses, ids)
        loss = self.mean_loss(losses, num_items_in_batch)
        return (loss, {"losses": losses}) if return_outputs else loss

    def prompts(self, inputs: dict[str, Any]) -> "ComplexPrompts":
        """
        What the expert is asked for each row of a batch, and what the policy is given.

        Args:
            inputs (`dict`):
                A batch of [`data.collators.AttributeCollator`].

        Returns:
            [`trainer.complex_po_trainer.ComplexPrompts`]
        """
        plain = self.drop_prompts(inputs["prompt"], inputs["id"])
        chosen, rejected, sides, left_out = [], [], [], []
        for row_id, prompt, positive, negative in zip(
            inputs["id"], plain, inputs["positive_attributes"], inputs["negative_attributes"], strict=True
        ):
            if not positive and not negative:  # of a stream: a dataset in memory is checked before
                raise ValueError(
                    f"The row with id {row_id!r} has neither positive nor negative attributes, so that there is nothing "
                    "to learn from it. Drop such rows with `dataset.filter`."
                )
            asked = self._asked(positive, negative)
            (chosen_text, chosen_left_out), (rejected_text, rejected_left_out) = (
                self.attribute_prompts(prompt, *attributes) for attributes in asked
            )
            chosen.append(chosen_text)
            rejected.append(rejected_text)
            sides.append([bool(sum(attributes, [])) for attributes in asked])
            left_out.append(chosen_left_out + rejected_left_out)
        device = self.accelerator.device
        self.record(**{"attributes/left_out": torch.tensor(left_out, device=device)})
        has_chosen, has_rejected = torch.tensor(sides, dtype=torch.float32, device=device).T
        return ComplexPrompts(plain, chosen, rejected, has_chosen, has_rejected)

    def _asked(self, positive: list[str], negative: list[str]) -> list[tuple[list[str], list[str]]]:
        """The (positive, negative) attributes that the expert is asked for what to go to, and for what to leave."""
        if self.args.attribute_targets == "paired":
            positive = negative = [*positive, *negative]
        asked = [(positive, []), ([], negative)]
        return asked[::-1] if self.args.reverse_preference else asked

    def prompts_of(self, row: dict[str, Any]) -> list[str]:
        asked = [([], []), *self._asked(row["positive_attributes"], row["negative_attributes"])]
        return [
            self.attribute_prompts(prompt, *attributes)[0]
            for prompt in super().prompts_of(row)
            for attributes in asked
        ]

    def _conditions(self, prompts: "ComplexPrompts", inputs: dict[str, Any], latents: torch.Tensor):
        """Conditions of the rows of the frozen forward, see `frozen_predictions`, and the policy's, its last `B` rows."""
        positive = prompts.rejected if self.args.reverse_preference else prompts.chosen
        policy = prompts.plain if self.args.policy_condition == "prompt" else positive
        expert = [prompts.chosen, prompts.rejected] + ([prompts.plain] if self.args.target_strength != 1 else [])
        image_conditions = {
            name: value.repeat(len(expert) + 1, *[1] * (value.ndim - 1))
            for name, value in self.image_conditions(inputs, latents).items()
        }
        frozen = self.encode_prompts(sum(expert, []) + policy) | image_conditions
        return frozen, {name: condition[-len(policy) :] for name, condition in frozen.items()}

    @torch.no_grad()
    def frozen_predictions(
        self,
        model: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The expert's targets and the reference's prediction, from one forward of the base in which each row names its
        adapter.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            noisy_latents (`torch.Tensor` of shape `(B, C, h, w)`):
                Noised latents.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps.
            conditions (`dict[str, torch.Tensor]`):
                Conditions of `3B` rows: the expert's positive and negative ones, and the reference's; of `4B` rows with
                the expert's plain ones before the last where `args.target_strength` is not 1.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each of shape `(B, C, h, w)`: float32 `z_w`, `z_l` and
            `e_ref`.
        """
        rows = len(next(iter(conditions.values()))) // len(noisy_latents)
        adapters = ["expert"] * (rows - 1) * len(noisy_latents) + ["__base__"] * len(noisy_latents)
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        training = model.training
        model.eval()  # peft mixes adapters in a batch only then
        predictions = self.backbone.predict(
            partial(model, adapter_names=adapters),
            noisy_latents.repeat(rows, 1, 1, 1),
            timesteps.repeat(rows),
            conditions,
        )
        model.train(training)
        chosen, rejected, *plain, ref_pred = predictions.float().chunk(rows)
        if plain:
            strength = self.args.target_strength
            chosen, rejected = (strengthened_target(target, plain[0], strength) for target in (chosen, rejected))
        return chosen, rejected, ref_pred

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if logs.get("drift", 0) > MAX_DRIFT and not self.warned_of_drift:
            self.warned_of_drift = True
            logger.warning(
                f"The policy's predictions are {logs['drift'] ** 0.5:.1f} times as far from the reference's as its targets "
                "are: it has left the region that they describe, as the unstabilised loss does once its "
                "term without bound takes over. Rewards and accuracies look fine meanwhile, and the images decay. Lower "
                "`learning_rate` or `max_steps`, raise `beta`, or train with `loss_type='stabilized'`."
            )


class ComplexPrompts(NamedTuple):
    """
    The prompts of a batch.

    Attributes:
        plain (`list[str]` of length `B`):
            The prompts alone.
        chosen (`list[str]` of length `B`):
            What the expert is asked for the targets to go to.
        rejected (`list[str]` of length `B`):
            What the expert is asked for the targets to leave.
        has_chosen (`torch.Tensor` of shape `(B,)`):
            1 where there are attributes to go to, else 0: float32.
        has_rejected (`torch.Tensor` of shape `(B,)`):
            1 where there are attributes to leave, else 0: float32.
    """

    plain: list[str]
    chosen: list[str]
    rejected: list[str]
    has_chosen: torch.Tensor
    has_rejected: torch.Tensor
