# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Diffusion-KTO (arXiv:2404.04465): single images that are desirable or not, without pairs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset

from ..data.collators import LabelCollator
from ..data.labels import label_faults, refuse_pairs, warn_of_one_label
from ..losses import diffusion_kto_loss, diffusion_kto_rewards
from ..noising import per_sample_errors
from .diffusion_kto_config import DiffusionKTOConfig
from .diffusion_trainer import DiffusionTrainer, Metrics
from .model_card import Method
from .noised_batch import NoisedBatch
from .row_randomness import NUM_EVAL_TIMESTEPS


ENOUGH_ROWS = 64  # of which some have the rarer label, if a tenth or more of all have it


class Judged(NamedTuple):
    """The rewards `(B,)` of a batch at a timestep, its labels, and which of its rows count, bool `(B,)`."""

    rewards: torch.Tensor
    desirable: torch.Tensor
    counts: torch.Tensor


class DiffusionKTOTrainer(DiffusionTrainer):
    """
    Trainer for Diffusion-KTO, which learns from single images that are labelled as desirable or undesirable.

    The loss compares the reward of each image with the mean reward of all images of the optimizer step, in all micro-batches and
    processes, which stands for the KL divergence from the reference. With gradient accumulation, this takes one more
    forward of the policy for each micro-batch. An evaluation compares with the mean over its whole dataset.

    Datasets have the columns of [`labelled_image_features`]; `id` may be missing. [`unpair_pairs`] makes them of image pairs. `args` is
    a [`DiffusionKTOConfig`]. All arguments are those of [`DiffusionTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer

    trainer = DiffusionKTOTrainer(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        args=DiffusionKTOConfig(output_dir="sd15-kto"),
        train_dataset=load_dataset("user/liked-images", split="train"),
        peft_config=LoraConfig(r=64, lora_alpha=64),
    )
    trainer.train()
    ```
    """

    method = Method(
        "Diffusion-KTO",
        "images",
        ("trl-diffusion", "text-to-image", "diffusion-kto"),
        {
            "title": "Aligning Diffusion Models by Optimizing Human Utility",
            "id": "2404.04465",
            "citation": """\
@inproceedings{li2024aligning,
    title     = {{Aligning Diffusion Models by Optimizing Human Utility}},
    author    = {Li, Shufan and Kallidromitis, Konstantinos and Gokul, Akash and Kato, Yusuke and Kozuka, Kazuki},
    booktitle = {NeurIPS},
    year      = {2024},
    eprint    = {arXiv:2404.04465},
}""",
        },
    )

    columns = ("prompt", "image", "label")
    image_columns = ("image",)
    config_class = DiffusionKTOConfig
    collator_class = LabelCollator
    uses_reference = True
    _output_suffix = "KTO"

    def finish_init(self) -> None:
        self.step_kl: torch.Tensor | None = None  # of a step of several micro-batches
        self.noised_of_step: list[NoisedBatch] = []  # its micro-batches that are still to come
        self.evaluated: list[Judged] = []  # every timestep of every batch of an evaluation

    def _prepare_dataset(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        refuse_pairs(dataset, name)
        dataset = super()._prepare_dataset(dataset, name)
        for fault in label_faults(dataset, name):
            raise ValueError(fault)
        warn_of_one_label(dataset, name)
        return dataset

    def prepare_batch(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        desirable = torch.tensor(inputs["label"]).to(latents.device, non_blocking=True)
        return super().prepare_batch(inputs, latents) | {"desirable": desirable ^ self.args.reverse_preference}

    def objective(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        errors, ref_errors = self._errors(model, noised)
        rewards = diffusion_kto_rewards(errors, ref_errors, self.args.beta)
        judged = self._judged(rewards, noised)
        kl = self.mean_reward([judged]) if self.step_kl is None else self.step_kl
        desirable = judged.desirable
        metrics: Metrics = {
            "rewards/chosen": (rewards, desirable),
            "rewards/rejected": (rewards, ~desirable),
            "errors/chosen": (errors, desirable),
            "errors/rejected": (errors, ~desirable),
            "errors/ref_chosen": (ref_errors, desirable),
            "errors/ref_rejected": (ref_errors, ~desirable),
            "labels/desirable": desirable,
            "kl": kl.expand(len(rewards)),
        }
        if not self.model.training:
            self.evaluated.append(judged)
        return self._losses(judged, kl), metrics

    def _errors(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The errors `(B,)` of policy and reference."""
        target = self.process.target(noised.latents, noised.noise, noised.timesteps)
        errors = per_sample_errors(self.predict_with_policy(model, noised), target)
        return errors, per_sample_errors(noised.frozen["ref_pred"], target)

    def _judged(self, rewards: torch.Tensor, noised: NoisedBatch) -> Judged:
        desirable, is_padding = noised.batch["desirable"], self.meters.is_padding
        return Judged(rewards, desirable, torch.ones_like(desirable) if is_padding is None else ~is_padding)

    def _losses(self, judged: Judged, kl: torch.Tensor) -> torch.Tensor:
        args = self.args
        weights = args.desirable_weight, args.undesirable_weight
        return diffusion_kto_loss(judged.rewards, judged.desirable, kl, args.loss_type, *weights)

    # ---- The KL, over all rows ----

    def mean_reward(self, batches: list[Judged]) -> torch.Tensor:
        """The mean reward of the rows of some batches in all processes, at least 0: a scalar without gradient, float32."""
        return self._mean([judged.rewards for judged in batches], batches).clamp(min=0)

    def _mean(self, values: list[torch.Tensor], batches: list[Judged]) -> torch.Tensor:
        counts = torch.cat([judged.counts for judged in batches])
        kept = torch.cat(values).detach().where(counts, 0.0)
        total, number = self.accelerator.reduce(torch.stack([kept.sum(), counts.sum().to(kept.dtype)]))
        return total / number.clamp(min=1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_rows = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_kl, self.noised_of_step = None, []
        if len(batches) > 1:
            self._look_ahead(batches)
        return batches, num_rows

    @torch.no_grad()
    def _look_ahead(self, batches: list[dict[str, Any]]) -> None:
        """Computes the KL of a step from all its micro-batches, which are kept noised for the step."""
        judged, noised_batches = [], []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                noised = next(self.noised_batches(self.model_wrapped, inputs))
                rewards = diffusion_kto_rewards(*self._errors(self.model_wrapped, noised), self.args.beta)
            judged.append(self._judged(rewards, noised))
            noised_batches.append(noised)
        self.step_kl, self.noised_of_step = self.mean_reward(judged), noised_batches

    def noised_batches(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Iterator[NoisedBatch]:
        if self.model.training and self.noised_of_step:
            yield self.noised_of_step.pop(0)
        else:
            yield from super().noised_batches(model, inputs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self.evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # The loss of a batch knew the KL of that batch; these know that of all rows
        losses, kls = [], []
        for timestep in range(NUM_EVAL_TIMESTEPS):
            batches = self.evaluated[timestep::NUM_EVAL_TIMESTEPS]
            kls.append(self.mean_reward(batches))
            losses.append(self._mean([self._losses(judged, kls[-1]) for judged in batches], batches))
        self.evaluated = []
        for name, values in (("loss", losses), ("kl", kls)):
            output.metrics[f"{metric_key_prefix}_{name}"] = torch.stack(values).mean().item()
        add_margin(output.metrics, f"{metric_key_prefix}_")
        return output

    # ---- What is logged ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self.meters.add_averages("train", logs)
            add_margin(logs)
        super().log(logs, start_time)

    def health_warnings(self, logs: dict[str, float]) -> dict[str, str]:
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * self.state.logging_steps
        if logs.get("labels/desirable") not in (0, 1) or rows < ENOUGH_ROWS:
            return {}
        return {
            "labels": f"All of the last {rows} rows had the same label, so the model is not told what is better. Shuffle the "
            "dataset, or look at its column `label`."
        }


def add_margin(logs: dict[str, float], prefix: str = "") -> None:
    """Adds `rewards/margins`, the mean reward of chosen rows minus that of rejected ones, where there are both."""
    names = [f"{prefix}rewards/{name}" for name in ("chosen", "rejected")]
    if all(name in logs for name in names):
        logs[f"{prefix}rewards/margins"] = logs[names[0]] - logs[names[1]]
