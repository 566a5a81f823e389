# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""IAPO: Instance-Aware Preference Optimization (CVPR 2026). Without instances, Diffusion-DPO (arXiv:2311.12908)."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..data.collators import InstancePairCollator
from ..losses import (
    PAIR_LOSSES,
    PairSettings,
    image_terms,
    instance_terms,
    pair_errors,
    safeguard_scale,
    scaled_gradient,
)
from ..masks import instance_masks, instance_regions, masked_area
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

    Raises:
        `ValueError`: As [`DiffusionTrainer`]; also if `ref_model` is given with `loss_type="mapo"`, which has no reference, or a
            `data_collator` with `box_margin`, which is the trainer's own collator's.

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
    _output_suffix = "IAPO"

    def check_arguments(self, ref_model: str | DiffusionPipeline | None, data_collator) -> None:
        if ref_model is not None and not self.uses_reference:
            raise ValueError("`ref_model` has no use with `loss_type='mapo'`, which has no reference. Leave it out.")
        if data_collator is not None and self.args.box_margin:
            raise ValueError(
                "`box_margin` needs the trainer's own collator, which widens the boxes. Leave out `data_collator`, or `box_margin`."
            )

    @property
    def uses_reference(self) -> bool:
        return self.args.loss_type != "mapo"

    def make_collator(self, **settings: Any) -> InstancePairCollator:
        return self.collator_class(box_margin=self.args.box_margin, **settings)

    def finish_init(self) -> None:
        if self.args.mask_examples:
            self.add_callback(MaskExamplesCallback(self.rows, self.data_collator, self.backbone.vae_scale_factor))

    def prepare_batch(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        if self.args.grouped_instances:
            return super().prepare_batch(inputs, latents) | self.prepare_regions(inputs, latents)
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

    def prepare_regions(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """The terms of grouped instances: their regions and the background."""
        regions = [
            instance_regions(
                inputs[f"{column}_boxes"], inputs["judged"], *latents.shape[2:], masks=inputs.get(f"{column}_masks")
            )
            for column in self.image_columns
        ]
        terms = instance_terms(torch.cat(regions), inputs["conflicts"])
        self.record(
            {
                "masks/area": torch.cat([1 - region[:, -1].mean(dim=(1, 2)) for region in regions]),
                "masks/empty": ~terms.exists.any(dim=1),
                "masks/terms": terms.exists.sum(dim=1),
            }
        )
        return {"terms": terms}

    def objective(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        args = self.args
        # One batch for both images: (2B, ...), chosen then rejected
        target = self.process.target(noised.latents, noised.noise, noised.timesteps)
        model_pred = self.predict_with_policy(model, noised)
        ref_pred = noised.frozen["ref_pred"] if self.uses_reference else None

        # What is compared: (B, R), the two images under their masks (R = 1), or the regions of instances and the background
        terms = noised.batch["terms"] if args.grouped_instances else image_terms(noised.batch["masks"])
        if args.reverse_preference:
            # Every label turns round, an instance's as well as its image's: the masks stay
            terms = terms._replace(is_swapped=~terms.is_swapped)

        # d = mean(M . (eps - e(x_t, t, c))^2)
        errors = pair_errors(model_pred, ref_pred, target, terms, with_drift=args.loss_type == "dspo")
        metrics: Metrics = {}
        if args.safeguard_mu is not None:
            scale = safeguard_scale(model_pred, target, terms, args.safeguard_mu)
            errors = errors._replace(rejected=scaled_gradient(errors.rejected, scale))
            metrics["safeguard/scale"] = terms.mean(scale)

        settings = PairSettings(args.beta, args.label_smoothing, self.process.num_timesteps)
        losses, chosen_rewards, rejected_rewards = PAIR_LOSSES[args.loss_type](errors, settings)
        losses = terms.mean(losses)
        if args.anchor_alpha > 0:
            metrics["anchor/distance"] = per_sample_errors(model_pred, ref_pred).chunk(2)[args.reverse_preference]
            losses = losses + args.anchor_alpha * metrics["anchor/distance"]
        metrics |= {
            "rewards/chosen": terms.mean(chosen_rewards),
            "rewards/rejected": terms.mean(rejected_rewards),
            "rewards/margins": terms.mean(chosen_rewards - rejected_rewards),
            "rewards/accuracies": terms.mean((chosen_rewards > rejected_rewards).float()),
            "errors/chosen": terms.mean(errors.chosen),
            "errors/rejected": terms.mean(errors.rejected),
        }
        if self.uses_reference:
            metrics["errors/ref_chosen"] = terms.mean(errors.ref_chosen)
            metrics["errors/ref_rejected"] = terms.mean(errors.ref_rejected)
        return losses, metrics

    def health_warnings(self, logs: dict[str, float]) -> dict[str, str]:
        if logs.get("masks/empty", 0) < 1:
            return {}
        if self.args.grouped_instances:
            return {
                "masks": "No pair since the last log has anything to compare, so nothing is learned: each instance, and the background, "
                "is missing in one of its two images. Look at the boxes with `trl-diffusion show-masks`, or leave out "
                "`grouped_instances`."
            }
        return {
            "masks": "Every mask is zero since the last log, so the loss is constant and nothing is learned: each image is covered "
            f"by instances that contradict its label, and `w_neg` is {self.args.w_neg}. Look at the boxes with `trl-diffusion "
            "show-masks`, raise `w_neg`"
            + (", or use `mask_overlap='mean'`." if self.args.mask_overlap == "covering" else ".")
        }
