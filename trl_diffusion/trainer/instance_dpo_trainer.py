# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""IAPO: Instance-Aware Preference Optimization (CVPR 2026). Without instances, Diffusion-DPO (arXiv:2311.12908)."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from ..data.caching import TensorTable
from ..data.collators import InstancePairCollator
from ..inversion import ddim_inversion
from ..losses import diffusion_dpo_loss
from ..masks import instance_masks, masked_area
from ..noising import add_noise, explaining_noise, keyed_noise, per_sample_errors, training_target
from .diffusion_trainer import DiffusionTrainer
from .instance_dpo_config import InstanceDPOConfig
from .precompute import module_fingerprint, precompute_by_id, text_fingerprint


class InstanceDPOTrainer(DiffusionTrainer):
    """
    Trainer for instance-aware preference optimization (IAPO) of text-to-image diffusion models.

    Where a dataset says that an instance is drawn better in the rejected image than in the chosen one, a mask takes its
    region out of the Diffusion-DPO loss. A dataset without instances trains plain Diffusion-DPO.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            What to train, of a family that is supported (Stable Diffusion 1.x and 2.x, SDXL):

            - a Hub id or a folder of a pipeline, loaded with `args.model_init_kwargs`, or
            - a loaded pipeline. Its denoiser is trained in place.
        ref_model (`str` or [`~diffusers.DiffusionPipeline`], *optional*):
            The reference. If left out it is the model before training: the policy with its adapters off where a LoRA is
            trained, a frozen copy else.
        args ([`InstanceDPOConfig`], *optional*):
            Configuration of the training. If left out, a default one whose output directory is named after the model.
        data_collator (`Callable`, *optional*):
            From rows to a batch. Defaults to [`data.collators.InstancePairCollator`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Image pairs, with the columns of [`instance_pair_features`]. `id` and `instances` may be missing; further
            columns are ignored.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Image pairs to evaluate on, or several such datasets by name.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train; `target_modules` defaults to the attention projections. If left out, all weights of the
            denoiser are trained.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler to use instead of those that `args` names.

    Raises:
        `ValueError`: If the pipeline's family is not supported, or a dataset lacks columns.

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

    _tag_names = ["trl-diffusion", "text-to-image", "iapo", "diffusion-dpo"]
    _name = "IAPO"
    _unit = "pairs"
    _paper = {
        "title": "Instance-Aware Preference Optimization",
        "venue": "CVPR 2026",
        "citation": """\
@inproceedings{sun2026iapo,
    title     = {{Instance-Aware Preference Optimization}},
    author    = {Sun and others},
    booktitle = {CVPR},
    year      = {2026},
}""",
    }

    columns = ("prompt", "chosen", "rejected")
    image_columns = ("chosen", "rejected")

    def __init__(
        self,
        model: str | DiffusionPipeline,
        ref_model: str | DiffusionPipeline | None = None,
        args: InstanceDPOConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = InstanceDPOConfig(f"{Path(name).name}-IAPO")
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
            self.data_collator = InstancePairCollator(**self._collator_settings)
        self.set_reference(ref_model)
        self.draw_tables: list[TensorTable] = []
        if args.precompute:
            self.precompute()

    @property
    def _moment(self) -> int | str:
        # With inversion, or where the reference is asked beforehand, the epoch takes the step's place: a row's draws are then
        # known before the training.
        if (self.args.noise_source == "inversion" or self.args.precompute_ref_preds) and self.model.training:
            return f"epoch {self._epoch}"
        return super()._moment

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        args, ids = self.args, inputs["id"]

        # One batch for both images: (2B, ...), chosen then rejected
        latents = self.sample_latents(inputs)
        masks = torch.cat([self.masks(inputs, column, latents.shape[2:]) for column in self.image_columns])
        conditions = self._conditions(inputs, latents)

        losses = []
        for timesteps, noisy_latents, noise, ref_pred in self.noised_pairs(model, latents, conditions, ids):
            alphas_cumprod, prediction_type = self.backbone.alphas_cumprod, self.backbone.prediction_type
            target = training_target(latents, noise, timesteps, alphas_cumprod, prediction_type)
            model_pred = self.backbone.predict(model, noisy_latents, timesteps, conditions)

            # d = mean(M . (eps - e(x_t, t, c))^2)
            errors = list(per_sample_errors(model_pred, target, masks).chunk(2))
            ref_errors = list(per_sample_errors(ref_pred, target, masks).chunk(2))
            if args.reverse_preference:
                # Every label turns round, an instance's as well as its image's: the masks stay
                errors.reverse()
                ref_errors.reverse()
            chosen_errors, rejected_errors = errors
            ref_chosen_errors, ref_rejected_errors = ref_errors
            loss, chosen_rewards, rejected_rewards = diffusion_dpo_loss(
                chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors, args.beta
            )
            losses.append(loss)
            self.record(
                **{
                    "rewards/chosen": chosen_rewards,
                    "rewards/rejected": rejected_rewards,
                    "rewards/margins": chosen_rewards - rejected_rewards,
                    "rewards/accuracies": chosen_rewards > rejected_rewards,
                    "errors/chosen": chosen_errors,
                    "errors/rejected": rejected_errors,
                    "errors/ref_chosen": ref_chosen_errors,
                    "errors/ref_rejected": ref_rejected_errors,
                }
            )

        losses = torch.stack(losses).mean(dim=0)
        self.record_losses(losses, ids)
        self.record(**{"masks/area": masked_area(masks)})
        loss = self.mean_loss(losses, num_items_in_batch)
        return (loss, {"losses": losses}) if return_outputs else loss

    def noised_pairs(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        ids: list[str],
    ) -> Iterator["NoisedPairs"]:
        """
        What a step needs before the policy is asked, all of it without gradient: noised images, by random noise or by
        inversion, and the reference's predictions for them. Once in training, at 8 fixed timesteps in evaluation.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            latents (`torch.Tensor` of shape `(2B, C, h, w)`):
                Clean latents, chosen then rejected.
            conditions (`dict[str, torch.Tensor]`):
                Conditions of the `2B` rows.
            ids (`list[str]` of length `B`):
                Ids of the rows.

        Yields:
            [`trainer.instance_dpo_trainer.NoisedPairs`]
        """
        alphas_cumprod = self.backbone.alphas_cumprod
        if self.model.training and self._epoch < len(self.draw_tables):
            by_row = self.draw_tables[self._epoch][ids]
            timesteps, noisy_latents, ref_pred = (
                by_row[name].transpose(0, 1).flatten(0, 1).to(latents.device, non_blocking=True)
                for name in ("timesteps", "noisy_latents", "ref_pred")
            )
            noise = explaining_noise(latents, noisy_latents, timesteps, alphas_cumprod)
            yield NoisedPairs(timesteps, noisy_latents, noise, ref_pred)
            return
        for timesteps, keys in self.timestep_draws(ids):
            # The pair shares its timestep, and its noise where that is random
            timesteps_on_cpu = timesteps.repeat(2)
            timesteps = timesteps_on_cpu.to(latents.device, non_blocking=True)
            if self.args.noise_source == "inversion":
                keys = [(*key, column) for column in self.image_columns for key in keys]
                noisy_latents = self.invert(model, latents, timesteps_on_cpu, conditions, keys)
                noise = explaining_noise(latents, noisy_latents, timesteps, alphas_cumprod)
            else:
                noise = keyed_noise(keys, latents.shape[1:], latents.device).repeat(2, 1, 1, 1)
                noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
            with self.reference(model) as ref_model:
                ref_pred = self.backbone.predict(ref_model, noisy_latents, timesteps, conditions)
            yield NoisedPairs(timesteps, noisy_latents, noise, ref_pred)

    def precompute(self) -> None:
        """
        Encodes images and prompts; where the reference inverts, or `args.precompute_ref_preds` is set, also noises each pair
        for each epoch and keeps the reference's predictions, so that a training step asks the policy alone.
        """
        super().precompute()
        args = self.args
        by_reference = args.noise_source == "inversion" and args.inversion_model == "reference"
        if self.train_dataset is None or not (by_reference or args.precompute_ref_preds):
            return
        reference = self.model if self.ref_model is None else self.ref_model
        depends_on = (
            module_fingerprint(self.accelerator.unwrap_model(reference, keep_torch_compile=False)),
            text_fingerprint(self, sorted({"", *self.train_dataset["prompt"]})),
            self.backbone.alphas_cumprod.tolist(),
            self.backbone.prediction_type,
            self.timestep_range,
            (args.seed, args.prompt_dropout),
            (args.noise_source, args.inversion_steps, args.inversion_eta),
        )

        @torch.no_grad()
        def noise(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
            latents = self.sample_latents(inputs)
            with self.accelerator.autocast():
                pairs = next(self.noised_pairs(self.model, latents, self._conditions(inputs, latents), inputs["id"]))
            by_row = {name: value.unflatten(0, (2, -1)).transpose(0, 1) for name, value in pairs._asdict().items()}
            del by_row["noise"]  # follows from the others
            return by_row

        self.model.train()  # as in a step
        tables = []
        for epoch in range(self.num_epochs):
            self.state.epoch = epoch
            tables.append(
                precompute_by_id(
                    self, self.train_dataset, noise, f"noised pairs of epoch {epoch + 1}", (depends_on, epoch)
                )
            )
        self.state.epoch = 0
        self.draw_tables = tables

    def invert(
        self,
        model: torch.nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        keys: list[tuple],
    ) -> torch.Tensor:
        """
        Noised latents by DDIM inversion, with the prompt and without guidance, see [`inversion.ddim_inversion`].

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            latents (`torch.Tensor` of shape `(2B, C, h, w)`):
                Clean latents.
            timesteps (`torch.Tensor` of shape `(2B,)`):
                Where each arrives, on the CPU.
            conditions (`dict[str, torch.Tensor]`):
                Conditions of the `2B` rows.
            keys (`list[tuple]` of length `2B`):
                Keys of the random term.

        Returns:
            `torch.Tensor` of shape `(2B, C, h, w)`: float32.
        """
        by_reference = self.args.inversion_model == "reference"
        with self.reference(model) if by_reference else nullcontext(model) as denoiser:
            return ddim_inversion(
                lambda noisy_latents, timesteps, rows: self.backbone.predict(
                    denoiser, noisy_latents, timesteps, {name: value[rows] for name, value in conditions.items()}
                ),
                latents,
                timesteps,
                self.backbone.alphas_cumprod,
                self.backbone.prediction_type,
                self.args.inversion_steps,
                self.args.inversion_eta,
                keys,
            )

    def masks(self, inputs: dict[str, Any], column: str, size: tuple[int, int]) -> torch.Tensor:
        """
        The instance masks of one image of each pair.

        Args:
            inputs (`dict`):
                A batch of [`data.collators.InstancePairCollator`].
            column (`str`):
                `"chosen"` or `"rejected"`.
            size (`tuple[int, int]`):
                (height, width) of the latent grid.

        Returns:
            `torch.Tensor` of shape `(B, h, w)`.
        """
        return instance_masks(
            inputs[f"{column}_boxes"],
            inputs["judged"],
            inputs["conflicts"],
            *size,
            w_neg=self.args.w_neg,
            mask_overlap=self.args.mask_overlap,
        )

    def _conditions(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Text conditions, encoded once a pair, and image conditions, each image's own: first dimension 2B."""
        text = self.encode_prompts(self.drop_prompts(inputs["prompt"], inputs["id"]))
        conditions = {name: torch.cat([value, value]) for name, value in text.items()}
        return conditions | self.image_conditions(inputs, latents)


class NoisedPairs(NamedTuple):
    """
    Noised images of a batch of pairs, chosen then rejected, and what the reference makes of them.

    Attributes:
        timesteps (`torch.Tensor` of shape `(2B,)`):
            Timesteps.
        noisy_latents (`torch.Tensor` of shape `(2B, C, h, w)`):
            `x_t`, float32.
        noise (`torch.Tensor` of shape `(2B, C, h, w)`):
            The noise in them, float32.
        ref_pred (`torch.Tensor` of shape `(2B, C, h, w)`):
            The reference's prediction.
    """

    timesteps: torch.Tensor
    noisy_latents: torch.Tensor
    noise: torch.Tensor
    ref_pred: torch.Tensor
