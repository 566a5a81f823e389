# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""DDSPO: Direct Diffusion Score Preference Optimization (arXiv 2512.23426), with targets from the reference itself."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..cards.methods import CITATIONS
from ..data.collators import InstancePairCollator
from ..losses import diffusion_dpo_loss
from ..noising import per_sample_errors
from .ddspo_config import DDSPOConfig
from .diffusion_trainer import DiffusionTrainer, Metrics
from .model_card import Method
from .noised_batch import NoisedBatch
from .target_prompts import degraded, warn_of_prompts_without_words


class DDSPOTrainer(DiffusionTrainer):
    """
    Trainer for direct diffusion score preference optimization (DDSPO) of text-to-image diffusion models.

    Like Diffusion-DPO, it compares two images of one prompt. But what the policy should predict is not the noise: on the chosen image
    it is the reference's prediction for the prompt, and on the rejected image it should leave the reference's prediction for a
    degraded prompt, which has lost some of its words.

    Datasets have the columns `prompt`, `chosen` and `rejected`; `id` may be missing, and `instances` are not used. `args` is a
    [`DDSPOConfig`]. All arguments are those of [`DiffusionTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_diffusion import DDSPOConfig, DDSPOTrainer

    trainer = DDSPOTrainer(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        args=DDSPOConfig(output_dir="sd15-ddspo"),
        train_dataset=load_dataset("user/pickapic-instance", split="train"),
        peft_config=LoraConfig(r=64, lora_alpha=64),
    )
    trainer.train()
    ```
    """

    method = Method(
        "DDSPO",
        "pairs",
        ("trl-diffusion", "text-to-image", "ddspo"),
        {
            "title": "Direct Diffusion Score Preference Optimization via Stepwise Contrastive Policy-Pair Supervision",
            "id": "2512.23426",
            "citation": CITATIONS["DDSPO"],
        },
    )

    columns = ("prompt", "chosen", "rejected")
    image_columns = ("chosen", "rejected")
    config_class = DDSPOConfig
    collator_class = InstancePairCollator
    uses_reference = True
    _output_suffix = "DDSPO"

    def _prepare_dataset(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        dataset = super()._prepare_dataset(dataset, name)
        warn_of_prompts_without_words(dataset, name)
        return dataset

    def objective(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        # One batch for both images: (2B, ...), chosen then rejected
        model_pred, target = self.predict_with_policy(model, noised), noised.frozen["target"]
        chosen_errors, rejected_errors = per_sample_errors(model_pred, target).chunk(2)
        ref_chosen_errors, ref_rejected_errors = per_sample_errors(noised.frozen["ref_pred"], target).chunk(2)
        losses, chosen_rewards, rejected_rewards = diffusion_dpo_loss(
            chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors, self.args.beta
        )
        return losses, {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "errors/chosen": chosen_errors,
            "errors/rejected": rejected_errors,
            "errors/ref_rejected": ref_rejected_errors,
        }

    def prepare_batch(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        prompts = inputs["prompt"]
        left = [degraded(prompt, self.args) for prompt in prompts]
        # Encoded together, so that they are padded to one length: (c, x^w), (c-, x^l), (c, x^w), (c, x^l), (c-, x^w), (c, x^l)
        both = self.encoder.conditions([*prompts, *left, *prompts], inputs, latents)
        parts = {name: value.chunk(6) for name, value in both.items()}
        return {
            "conditions": {name: torch.cat([part[0], part[3]]) for name, part in parts.items()},
            "frozen_conditions": {name: torch.cat([part[0], part[3], part[1]]) for name, part in parts.items()},
        }

    def frozen_predictions(self, model: torch.nn.Module, noised: NoisedBatch) -> dict[str, torch.Tensor]:
        """
        The reference's predictions, from one forward of three rows for each pair.

        Returns:
            `dict[str, torch.Tensor]`, each of shape `(2B, C, h, w)`: float32 `ref_pred`, for the prompt on both images, and `target`:
            `z_w`, which is the same on the chosen image, and `z_l`, for the degraded prompt on the rejected one.
        """
        noisy_latents, timesteps = (
            torch.cat([value, value.chunk(2)[1]]) for value in (noised.noisy_latents, noised.timesteps)
        )
        with self.reference.lend(model) as reference:
            predictions = self.backbone.predict(reference, noisy_latents, timesteps, noised.batch["frozen_conditions"])
        chosen, rejected, rejected_degraded = predictions.float().chunk(3)
        return {"ref_pred": torch.cat([chosen, rejected]), "target": torch.cat([chosen, rejected_degraded])}

    def prompts_of(self, row: dict[str, Any]) -> list[str | None]:
        return [row["prompt"], degraded(row["prompt"], self.args)]

    @property
    def prompt_settings(self) -> tuple:
        return self.args.dropped_words, self.args.seed

    def _frozen_fingerprints(self) -> list[Any]:
        return [*super()._frozen_fingerprints(), self.args.dropped_words]
