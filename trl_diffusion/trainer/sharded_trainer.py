# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Where the Trainer of transformers does otherwise when weights are cut over processes. What it saves is that of any other run."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl.trainer.base_trainer import _BaseTrainer

from . import zero
from .sharding import is_sharding, keeping_shards, load_optimizer_state, shard, whole, whole_optimizer_state


class ShardedTrainer(_BaseTrainer):
    """
    TRL's base trainer for models that the trainer itself cuts over the processes, see [`trainer.sharding`].

    A checkpoint has the files of an unsharded run, so that either continues the other; all processes take part in writing it.
    """

    @cached_property
    def is_sharding(self) -> bool:
        """Whether the weights of policy and reference are cut over the processes."""
        return is_sharding(self.accelerator)

    def place_whole_models(self) -> None:
        """Moves policy and reference to the device as a whole, to be asked before they are cut."""
        if self.is_sharding:
            self.policy.to(self.args.device)
            self.reference.to(self.args.device)

    def cut_models(self) -> None:
        """Cuts policy and reference over the processes, see [`trainer.sharding.shard`]."""
        if self.is_sharding:
            if self.reference is not None:
                self.reference.shard(self.accelerator)
            shard(self.policy, self.accelerator)

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.deepspeed_plugin is not None:
            AcceleratorState._reset_state()  # that of an accelerator before takes no plugin, see [`trainer.row_order`]
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            zero.configure(self.accelerator, self.args)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.is_deepspeed_enabled:  # which lays the weights of a group together
            self.trained_weights = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        if not self.is_sharding:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if not self.is_deepspeed_enabled:
            with keeping_shards(self.accelerator):
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.deepspeed is not None:
            raise ValueError("With DeepSpeed a trainer trains once. Make another one, and resume with it.")
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)  # while the weights are whole
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def evaluation_loop(self, *args, **kwargs) -> Any:
        is_deepspeed_enabled, is_unwrapped = self.is_deepspeed_enabled, self.model_wrapped is self.model
        self.is_deepspeed_enabled &= self.deepspeed is not None  # before a training the weights are whole
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = is_deepspeed_enabled
            if is_unwrapped:  # else a training after it would not wrap the model, and each process would train alone
                self.model_wrapped, self.model._is_accelerate_prepared = self.model, False

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor | float:
        return whole(super()._get_grad_norm(model, grad_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves what diffusers loads, a LoRA or a whole pipeline. Of a sharded run, all processes must call it.

        Args:
            output_dir (`str`, *optional*):
                The folder. Defaults to `args.output_dir`.
        """
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
        is_kept, schedule = self.args.should_save, self.lr_scheduler.state_dict()
        if self.is_deepspeed_enabled:
            state = zero.whole_optimizer_state(self.optimizer, self.trained_weights, is_kept)
            schedule = zero.whole_schedule(schedule, self.trained_weights)
        else:
            state = whole_optimizer_state(self.optimizer, is_kept)
        if is_kept:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule, Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharding:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [] if checkpoint is None else [Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        if files and all(file.is_file() for file in files):  # as the Trainer, which starts anew without them
            state, schedule = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
            if self.is_deepspeed_enabled:
                zero.load_optimizer_state(self.optimizer, self.trained_weights, state)
                schedule = zero.own_schedule(schedule, self.trained_weights)
            else:
                load_optimizer_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(schedule)
