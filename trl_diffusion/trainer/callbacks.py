# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Callbacks of the trainers."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..visualization import image_grid


if TYPE_CHECKING:
    from .diffusion_trainer import DiffusionTrainer


class SampleImagesCallback(TrainerCallback):
    """
    Draws fixed prompts from fixed noise with the base and with the policy, side by side: before training, every
    `args.sample_steps` steps and at the end. The pictures are written to `samples/` in the output directory, and go to
    wandb, trackio and tensorboard where `report_to` names them.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, whose `args` hold the prompts and how they are sampled.
    """

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer
        self.base_images = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._sample(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        # The last step here and not at the end of training, when tensorboard's writer is closed
        if state.global_step % args.sample_steps == 0 or state.global_step == state.max_steps:
            self._sample(args, state)

    def _sample(self, args, state):
        if not state.is_world_process_zero:
            return
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        if self.base_images is None:
            with self.trainer.reference(policy) as base:
                self.base_images = self.trainer.draw(base, args.sample_prompts)
        images = self.trainer.draw(policy, args.sample_prompts)
        grid = image_grid(
            [list(pair) for pair in zip(self.base_images, images, strict=True)],
            column_labels=["base", f"step {state.global_step}"],
            row_labels=args.sample_prompts,
        )
        folder = Path(args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"step-{state.global_step:06d}.png")
        self._report(grid, args, state)

    def _report(self, grid: PIL.Image.Image, args, state):
        if "wandb" in args.report_to:
            import wandb

            wandb.log({"samples": wandb.Image(grid), "train/global_step": state.global_step})
        if "trackio" in args.report_to:
            import trackio

            trackio.log({"samples": trackio.Image(grid), "train/global_step": state.global_step})
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples", np.asarray(grid), state.global_step, dataformats="HWC")


class NonFiniteLossCallback(TrainerCallback):
    """
    Stops a run before the optimizer steps on a loss that is not finite, and names the rows.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, which collects the losses since the last step.
    """

    def __init__(self, trainer: "DiffusionTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        ids, losses = zip(*self.trainer.losses_since_step, strict=True)
        self.trainer.losses_since_step.clear()
        finite = torch.cat(losses).isfinite()
        if not finite.all():
            ids = [row_id for batch in ids for row_id in batch]
            rows = [row_id for row_id, ok in zip(ids, finite.tolist(), strict=True) if not ok]
            raise ValueError(
                f"The loss is not finite at step {state.global_step + 1}, for the rows with id {', '.join(rows[:20])}"
                f"{' and others' if len(rows) > 20 else ''}. The optimizer has not stepped. Look at these rows; where they "
                "are fine, lower `learning_rate`, or train with `bf16=True` instead of `fp16=True`."
            )
