# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""IAPO: Instance-Aware Preference Optimization (CVPR 2026). Without instances, Diffusion-DPO (arXiv:2311.12908)."""

from typing import Any

import torch

from ..data.collators import InstancePairCollator
from ..losses import diffusion_dpo_loss
from ..masks import instance_masks, masked_area
from ..noising import per_sample_errors
from .callbacks import MaskExamplesCallback
from .diffusion_trainer import DiffusionTrainer, Metrics
from .instance_dpo_config import InstanceDPOConfig
from .model_card import Method
from .noised_batch import NoisedBatch


class InstanceDPOTrainer(DiffusionTrainer):
    """
    Trainer for instance-aware preference optimization (IAPO) of text-to-image diffusion models.

    Where a dataset says that an instance is drawn better in the rejected image than in the chosen one, a mask takes its
    region out of the Diffusion-DPO loss. A dataset without instances trains plain Diffusion-DPO.

    Datasets have the columns of [`instance_pair_features`]; `id` and `instances` may be missing. `args` is an
    [`InstanceDPOConfig`]. All arguments are those of [`DiffusionTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer

    trainer = InstanceDPOTrainer(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        args=InstanceDPOConfig(output_dir="sd15-iapo"),
        train_dataset=load_dataset("user/pickapic-instance", split="train"),
        peft_config=LoraConfig(r=64, lora_alpha=64),
    )
    trainer.train()
    ```
    """

    method = Method(
        "IAPO",
        "pairs",
        ("trl-diffusion", "text-to-image", "iapo", "diffusion-dpo"),
        {
            "title": "Instance-Aware Preference Optimization",
            "venue": "CVPR 2026",
            "citation": """\
@inproceedings{sun2026iapo,
    title     = {{Instance-Aware Preference Optimization}},
    author    = {Sun and others},
    booktitle = {CVPR},
    year      = {2026},
}""",
        },
    )

    columns = ("prompt", "chosen", "rejected")
    image_columns = ("chosen", "rejected")
    config_class = InstanceDPOConfig
    collator_class = InstancePairCollator
    uses_reference = True
    _output_suffix = "IAPO"

    def make_collator(self, **settings: Any) -> InstancePairCollator:
        return self.collator_class(box_margin=self.args.box_margin, **settings)

    def finish_init(self) -> None:
        if self.args.mask_examples:
            self.add_callback(MaskExamplesCallback(self.rows, self.data_collator, self.backbone.vae_scale_factor))

    def prepare_batch(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        masks = torch.cat(
            [
                instance_masks(
                    inputs[f"{column}_boxes"],
                    inputs["judged"],
                    inputs["conflicts"],
                    *latents.shape[2:],
                    w_neg=self.args.w_neg,
                    mask_overlap=self.args.mask_overlap,
                    masks=inputs.get(f"{column}_masks"),
                )
                for column in self.image_columns
            ]
        )
        self.record({"masks/area": masked_area(masks), "masks/empty": (masks == 0).flatten(1).all(dim=1)})
        return super().prepare_batch(inputs, latents) | {"masks": masks}

    def objective(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        # One batch for both images: (2B, ...), chosen then rejected
        target = self.process.target(noised.latents, noised.noise, noised.timesteps)
        model_pred = self.predict_with_policy(model, noised)
        ref_pred, masks = noised.frozen["ref_pred"], noised.batch["masks"]

        # d = mean(M . (eps - e(x_t, t, c))^2)
        errors = list(per_sample_errors(model_pred, target, masks).chunk(2))
        ref_errors = list(per_sample_errors(ref_pred, target, masks).chunk(2))
        if self.args.reverse_preference:
            # Every label turns round, an instance's as well as its image's: the masks stay
            errors.reverse()
            ref_errors.reverse()
        chosen_errors, rejected_errors = errors
        ref_chosen_errors, ref_rejected_errors = ref_errors
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
            "errors/ref_chosen": ref_chosen_errors,
            "errors/ref_rejected": ref_rejected_errors,
        }

    def health_warnings(self, logs: dict[str, float]) -> dict[str, str]:
        if logs.get("masks/empty", 0) < 1:
            return {}
        return {
            "masks": "Every mask is zero since the last log, so the loss is constant and nothing is learned: each image is covered "
            f"by instances that contradict its label, and `w_neg` is {self.args.w_neg}. Look at the boxes with `trl-diffusion "
            "show-masks`, raise `w_neg`"
            + (", or use `mask_overlap='mean'`." if self.args.mask_overlap == "covering" else ".")
        }
