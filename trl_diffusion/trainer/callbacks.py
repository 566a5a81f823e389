# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Callbacks of the trainers."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..cards.facts import EVALUATION_NAME
from ..data.formats import shortened
from ..files import write_file
from ..sampling import NotFiniteError, only_colour
from ..visualization import image_grid
from .card_pictures import clear_masks, clear_samples, save_masks, save_samples
from .provenance import SECONDS, forget_trackers, tracker_urls, training_seconds


logger = get_logger(__name__)


class SampleImagesCallback(TrainerCallback):
    """
    Samples fixed prompts from fixed noise with the base and with the policy, side by side: before training, every
    `args.sample_steps` steps and at the end. With `args.sample_model`, that model draws without the LoRA and with it. The pictures
    are written to `samples/` in the output directory, and go to wandb, trackio and tensorboard where `report_to` names them. The
    last ones are also kept one by one in `images/`, for the model card.

    Args:
        sample (`Callable`):
            Samples images: `sample(prompts)` with the policy, `sample(prompts, with_reference=True)` with the base, as
            [`DiffusionTrainer.sample`] does.
        callbacks (`list[TrainerCallback]`):
            The trainer's callbacks, among which tensorboard's writer is found.
        in_all_processes (`bool`, *optional*, defaults to `False`):
            Whether all processes sample, as they must where the weights are cut over them; the main one alone keeps images.
    """

    def __init__(
        self,
        sample: Callable[..., list[PIL.Image.Image]],
        callbacks: list[TrainerCallback],
        in_all_processes: bool = False,
    ):
        self.sample = sample
        self.callbacks, self.in_all_processes = callbacks, in_all_processes
        self.base_images = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # a resumed run draws where the run that was stopped would have
            self._sample(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        # The last step here and not at the end of training, when tensorboard's writer is closed
        if state.global_step % args.sample_steps == 0 or state.global_step == state.max_steps:
            self._sample(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        # The best weights are loaded by now, and the card is of them
        if args.load_best_model_at_end and state.best_global_step not in (None, state.global_step):
            self._draw(args, state, state.best_global_step)

    def _draw(self, args, state, step: int) -> list[PIL.Image.Image] | None:
        """Samples for the card of a step. `None` in another process than the main one, and where an image is not finite."""
        is_main = state.is_world_process_zero
        if not (is_main or self.in_all_processes):
            return None
        try:
            if self.base_images is None:
                self.base_images = self.sample(args.sample_prompts, with_reference=True)
            images = self.sample(args.sample_prompts)
        except NotFiniteError as error:
            if not is_main:
                return None
            logger.warning(f"There are no samples of step {step}. {error}")
            clear_samples(args.output_dir)
            return None
        if not is_main:
            return None
        save_samples(args.output_dir, args.sample_prompts, self.base_images, images, step, args.sample_model)
        return images

    def _sample(self, args, state):
        images = self._draw(args, state, state.global_step)
        if images is None:
            return
        if flat := [prompt for prompt, image in zip(args.sample_prompts, images, strict=True) if only_colour(image)]:
            logger.warning(
                f"{len(flat)} of {len(images)} samples of step {state.global_step} are of one colour: {shortened(flat)}."
            )
        grid = image_grid(
            [list(pair) for pair in zip(self.base_images, images, strict=True)],
            column_labels=[Path(args.sample_model).name if args.sample_model else "base", f"step {state.global_step}"],
            row_labels=args.sample_prompts,
        )
        content = io.BytesIO()
        grid.save(content, "PNG")
        write_file(Path(args.output_dir) / "samples" / f"step-{state.global_step:06d}.png", content.getvalue())
        self._report(grid, args, state)

    def _report(self, grid: PIL.Image.Image, args, state):
        if "wandb" in args.report_to:
            import wandb

            wandb.log({"samples": wandb.Image(grid), "train/global_step": state.global_step})
        if "trackio" in args.report_to:
            import trackio

            trackio.log({"samples": trackio.Image(grid), "train/global_step": state.global_step})
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples", np.asarray(grid), state.global_step, dataformats="HWC")


class RunCallback(TrainerCallback):
    """
    Keeps what a model card says of a run and what is gone when the card is written: its seconds, which a checkpoint's state carries
    into a resumed run, and the addresses at the trackers. Pictures of an earlier run in the same output directory are deleted, and the
    evaluation that its card had, which was one of other weights.
    """

    def __init__(self):
        self.seconds = self.seconds_before = self.start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds_before, self.start = training_seconds(state) or 0.0, time.perf_counter()
        forget_trackers()
        tracker_urls(args.report_to)
        if state.is_world_process_zero:
            clear_masks(args.output_dir)
            evaluation = Path(args.output_dir) / EVALUATION_NAME
            if evaluation.exists():
                evaluation.unlink()
                logger.warning(
                    f"{evaluation} was of the weights before this training, and is deleted. Put that of the new ones into the card "
                    "with `trl-diffusion model-card`."
                )
            if state.global_step == 0 or not args.sample_prompts:
                clear_samples(args.output_dir)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = self.seconds_before + time.perf_counter() - self.start
        state.stateful_callbacks[SECONDS] = {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_log(self, args, state, control, **kwargs):
        tracker_urls(args.report_to)


class MaskExamplesCallback(TrainerCallback):
    """
    Draws masks over the first training images whose masks matter, as many as `args.mask_examples`, for the model card.

    Args:
        rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training rows, with images.
        collate (`Callable`):
            The collator.
        vae_scale_factor (`int`):
            Width and height in pixels of a latent cell.
    """

    def __init__(self, rows: Dataset | IterableDataset, collate: Callable, vae_scale_factor: int):
        self.rows, self.collate, self.vae_scale_factor = rows, collate, vae_scale_factor

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            settings = {"w_neg": args.w_neg, "mask_overlap": args.mask_overlap}
            save_masks(
                *(args.output_dir, self.rows, args.mask_examples, self.collate),
                vae_scale_factor=self.vae_scale_factor,
                **settings,
            )


class NothingToTrainError(ValueError):
    """A run has no steps, or those that it has are done."""


class HealthCallback(TrainerCallback):
    """
    Stops a run that cannot learn: one without a step, or, before the optimizer steps, one whose loss or gradient is not
    finite. The trainer reports the losses of each micro-batch and the norm of the gradient to it, and warnings.

    Args:
        scaler (`torch.amp.GradScaler`, *optional*):
            The scaler of a training in float16, whose gradients may overflow.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None):
        self.scaler = scaler
        self.warned: set[str] = set()
        self.losses: list[tuple[list[str], torch.Tensor, torch.Tensor | None]] = []  # since the last optimizer step
        self.gradient_norm: torch.Tensor | float | None = None

    def warn_once(self, warnings: dict[str, str]) -> None:
        """Logs warnings, each once by its name."""
        for name in warnings.keys() - self.warned:
            self.warned.add(name)
            logger.warning(warnings[name])

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses.clear()  # of a run that was stopped within a step
        if state.global_step >= state.max_steps:
            done = f"{state.global_step} of them are done already" if state.global_step else "that is none"
            raise NothingToTrainError(
                f"There is nothing to train: the run has {state.max_steps} optimizer steps, and {done}. Raise `max_steps` or "
                "`num_train_epochs`, or do not resume."
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        recorded = list(self.losses)
        self.losses.clear()
        self._check(args, state, recorded, self.gradient_norm)

    def check_losses(self, args, state) -> None:
        """Stops where a loss is not finite: before a backward that makes the step too."""
        self._check(args, state, self.losses, 0.0)

    def _check(self, args, state, recorded, gradient_norm: torch.Tensor | float) -> None:
        ids, losses, paddings = zip(*recorded, strict=True)
        losses = [
            x if padding is None else x.masked_fill(padding, 0) for x, padding in zip(losses, paddings, strict=True)
        ]
        losses_are_finite = torch.cat(losses).isfinite()
        gradient_is_finite = torch.as_tensor(gradient_norm).isfinite().to(losses_are_finite.device)
        if torch.stack([losses_are_finite.all(), gradient_is_finite]).all():
            return
        advice = (
            "train with `bf16=True` instead of `fp16=True`, or lower `learning_rate`"
            if args.fp16
            else "lower `learning_rate` or `max_grad_norm`, or raise `warmup_steps`"
        )
        ids = [row_id for batch in ids for row_id in batch]
        rows = [row_id for row_id, finite in zip(ids, losses_are_finite.tolist(), strict=True) if not finite]
        if rows:
            raise ValueError(
                f"The loss is not finite in step {state.global_step + 1}, for the rows with id {shortened(rows)}. The optimizer "
                f"has not made this step. Look at these rows; if nothing is wrong with them, {advice}."
            )
        if self.scaler is not None and self.scaler.get_scale() >= 1:
            return  # an overflow: the scaler skips this step and lowers its scale
        raise ValueError(
            f"The gradient is not finite in step {state.global_step + 1}, although all losses are. The optimizer has not made "
            f"this step. Its rows have the ids {shortened(ids)}: look at them; if nothing is wrong with them, {advice}."
        )


class StopCallback(TrainerCallback):
    """
    Ends a training after the current optimizer step, in all processes alike, once any of them is asked to. If the run saves
    checkpoints, one is saved.

    Args:
        is_stopped (`Callable`):
            Tells whether this process is asked to end.
    """

    def __init__(self, is_stopped: Callable[[], bool]):
        self.is_stopped = is_stopped

    def on_step_end(self, args, state, control, **kwargs):
        stopped = self.is_stopped()
        if args.world_size > 1:
            agreed = torch.tensor(float(stopped), device=args.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            stopped = bool(agreed)
        if stopped:
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = args.save_strategy != "no"
