# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Where the Trainer of transformers does otherwise when weights are cut over processes. What it saves is that of any other run."""

from functools import cached_property
from pathlib import Path

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl.trainer.base_trainer import _BaseTrainer

from .sharding import is_sharding, keeping_shards, load_optimizer_state, whole, whole_optimizer_state


class ShardedTrainer(_BaseTrainer):
    """
    TRL's base trainer for models that the trainer itself cuts over the processes, see [`trainer.sharding`].

    A checkpoint has the files of an unsharded run, so that either continues the other; all processes take part in writing it.
    """

    @cached_property
    def is_sharding(self) -> bool:
        """Whether the weights of policy and reference are cut over the processes."""
        return is_sharding(self.accelerator)

    def _prepare_for_training(self, *args, **kwargs):
        if not self.is_sharding:
            return super()._prepare_for_training(*args, **kwargs)
        with keeping_shards(self.accelerator):
            return super()._prepare_for_training(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor | float:
        return whole(super()._get_grad_norm(model, grad_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]: what diffusers loads. Of a sharded run, all processes must call it."""
        if not self.is_sharding:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharding:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer, is_kept=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharding:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [] if checkpoint is None else [Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        if files and all(file.is_file() for file in files):  # as the Trainer, which starts anew without them
            state, schedule = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
            load_optimizer_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(schedule)
