# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Where the Trainer of transformers saves otherwise: checkpoints and models are there whole or not at all."""

from functools import partial
from pathlib import Path

import torch

from ..backbones.base import Backbone
from .checkpoints import save_weights, trained_weights
from .saving import Saver
from .sharded_trainer import ShardedTrainer


class SavingTrainer(ShardedTrainer):
    """Base trainer whose checkpoints and models are written aside and renamed, see [`trainer.saving.Saver`]."""

    saver: Saver
    backbone: Backbone
    policy: torch.nn.Module

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save and not self.is_sharding:
            return
        weights = trained_weights(self.policy, is_kept=self.args.should_save)
        if self.args.should_save:
            with self.saver.model_folder(Path(output_dir or self.args.output_dir)) as folder:
                self.save_files(folder, weights)

    def save_files(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes the weights into an empty folder, and what belongs to them."""
        save_weights(self.backbone, self.policy, folder, weights)

    def _get_output_dir(self, trial) -> str:
        return str(self.saver.folder or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        self.create_model_card()
        self.saver.save(Path(self._get_output_dir(trial)), partial(super()._save_checkpoint, model, trial))

    def _finalize_training(self, trial, *args):
        self.saver.keep_the_best(Path(self._get_output_dir(trial)))
        return super()._finalize_training(trial, *args)

    def _push_from_checkpoint(self, folder: str) -> None:
        """Nothing is pushed before it is in its place, see [`trainer.saving.Saver.save`]."""
