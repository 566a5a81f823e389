# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The mechanics that the trainers share. Objectives live in the trainers' own files."""

import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate.logging import get_logger
from accelerate.utils import AutocastKwargs
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, set_seed
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import disable_dropout_in_model

from ..backbones import load_backbone
from ..data.buckets import BucketSampler, bucket_sizes
from ..data.caching import TENSORS, TensorTable
from ..data.formats import prepare_dataset
from ..data.padding import (
    IS_PADDING,
    PaddedRows,
    PaddedSampler,
    PaddedStream,
    PaddingCollator,
    as_padding,
    count_rows,
    mean_over_rows,
)
from ..noising import fixed_timesteps, keyed_generator, keyed_noise, keyed_timesteps
from ..sampling import sample_images
from .callbacks import NonFiniteLossCallback, SampleImagesCallback
from .diffusion_config import DiffusionConfig
from .hub import diffusion_model_card
from .lora import LORA_WEIGHTS_NAME, read_lora
from .precompute import TRAINING_SIZE, precompute_datasets


logger = get_logger(__name__)

NUM_EVAL_TIMESTEPS = 8


class DiffusionTrainer(_BaseTrainer):
    """
    Base class of the trainers of this library: TRL's base trainer, made to work with the models of diffusers.

    A trainer derives from it, sets the class attributes below and implements `compute_loss`.

    Attributes:
        columns (`tuple[str, ...]`):
            The columns that a dataset must have.
        image_columns (`tuple[str, ...]`):
            Those of them that hold images.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a pipeline, or a loaded pipeline, whose denoiser is trained in place.
        args ([`DiffusionConfig`]):
            Configuration of the training.
        data_collator (`Callable`):
            From rows to a batch.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset to train on.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Dataset to evaluate on, or several by name.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train. If left out, all weights of the denoiser are trained.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler to use instead of those that `args` names.
    """

    loss_is_scaled_for_ga = True  # a loss here is its rows' share in the mean over all rows of the optimizer step
    _tag_names = ["trl-diffusion", "text-to-image"]
    _example_prompt = "a red bicycle leaning on a stone wall"
    _card_parameters: dict[str, object] = {}  # what the card says in place of, or beside, what `args` holds

    columns: tuple[str, ...]
    image_columns: tuple[str, ...]

    def __init__(
        self,
        model: str | DiffusionPipeline,
        args: DiffusionConfig,
        data_collator,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        if train_dataset is not None:
            train_dataset = self._prepare_dataset(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(split, f"eval_dataset[{name!r}]") for name, split in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, "eval_dataset")
        for setting in ("precompute", "aspect_ratio_buckets"):
            if getattr(args, setting) and data_collator is not None:
                raise ValueError(
                    f"`{setting}` needs the trainer's own collator. Leave out `data_collator`, or train without `{setting}`."
                )
        if isinstance(train_dataset, IterableDataset) and args.aspect_ratio_buckets:
            raise ValueError(
                "`train_dataset` is a stream, whose rows cannot be sorted by size. Load it without `streaming=True`, or train "
                "without `aspect_ratio_buckets`."
            )
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`accelerator_config` asks for `dispatch_batches`, and the main process cannot cut batches that hold strings "
                "for the others. Leave it out: each process then reads its own rows."
            )
        args.accelerator_config.dispatch_batches = False  # `None` would mean `True` for a stream

        self.backbone = load_backbone(model, **(args.model_init_kwargs or {}))
        self.resolution = args.resolution or self.backbone.default_resolution
        if self.resolution % self.backbone.pipeline.vae_scale_factor:
            raise ValueError(
                f"`resolution` is {self.resolution}, which is no multiple of {self.backbone.pipeline.vae_scale_factor}, "
                "the number of pixels that this VAE puts into a latent cell."
            )
        num_timesteps = len(self.backbone.alphas_cumprod)
        self.timestep_range = args.timestep_range or [0, num_timesteps]
        if self.timestep_range[1] > num_timesteps:
            raise ValueError(
                f"`timestep_range` is {self.timestep_range}, but this model has {num_timesteps} timesteps only."
            )

        denoiser = self.backbone.denoiser
        # Trackers ask models for a transformers config, and the Trainer for activation checkpointing.
        denoiser._internal_dict = _TrackableConfig(denoiser.config)
        denoiser.activation_checkpointing_enable = partial(_enable_gradient_checkpointing, denoiser)
        disable_dropout_in_model(denoiser)
        if peft_config is not None:
            set_seed(args.seed)
            denoiser.requires_grad_(False)
            _cast(denoiser, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32)
            denoiser = get_peft_model(denoiser, self._complete_peft_config(peft_config))
        else:
            denoiser.requires_grad_(True)
            _cast(denoiser, torch.float32)  # the optimizer's steps are smaller than what half precision resolves

        super().__init__(
            model=denoiser,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Sharded training (FSDP, DeepSpeed) is not supported yet: what is saved would not be what diffusers "
                "loads. Train on several GPUs with `accelerate launch --multi_gpu`, or a LoRA by `peft_config`."
            )
        self.backbone.to(self.accelerator.device)
        if args.channels_last:
            for module in (denoiser, self.backbone.pipeline.vae):
                module.to(memory_format=torch.channels_last)
        self.ref_model = None
        self.prompt_table: TensorTable | None = None
        self._is_padding: torch.Tensor | None = None  # bool (B,): rows of the batch that count nothing
        self.losses_since_step: list[tuple[list[str], torch.Tensor]] = []
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.add_callback(NonFiniteLossCallback(self))
        if args.sample_prompts:
            self.add_callback(SampleImagesCallback(self))

    def _complete_peft_config(self, peft_config: LoraConfig) -> LoraConfig:
        if not isinstance(peft_config, LoraConfig) or peft_config.modules_to_save:
            raise ValueError(
                "`peft_config` must be a `peft.LoraConfig` without `modules_to_save`: other adapters have no file format "
                "that `pipeline.load_lora_weights` reads."
            )
        peft_config = copy.deepcopy(peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(self.backbone.lora_target_modules)
        return peft_config

    @property
    def _collator_settings(self) -> dict[str, Any]:
        """What every default collator is made with."""
        return {
            "resolution": self.resolution,
            "center_crop": self.args.center_crop,
            "random_flip": self.args.random_flip,
            "seed": self.args.seed,
            "buckets": bucket_sizes(self.resolution, self.backbone.size_multiple)
            if self.args.aspect_ratio_buckets
            else None,
        }

    def _prepare_dataset(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        return prepare_dataset(dataset, name, self.columns, self.image_columns)

    # ---- Data ----

    def precompute(self) -> None:
        """
        Encodes the images and prompts of the datasets once, into Arrow files, or finds them there; the encoders then leave
        the accelerator. Trainers call it at the end of their `__init__` where `args.precompute` is set.

        Raises:
            `ValueError`: If a dataset is a stream or has an id twice, or if the disk has not the room.
        """
        precompute_datasets(self)

    @property
    def has_fixed_prompts(self) -> bool:
        """Whether a row is trained with the same prompts in every step."""
        return True

    def prompts_of(self, row: dict[str, Any]) -> list[str]:
        """
        Every prompt that a row can be trained with.

        Args:
            row (`dict`):
                A row of a dataset.

        Returns:
            `list[str]`
        """
        return [row["prompt"], ""] if self.args.prompt_dropout > 0 else [row["prompt"]]

    @property
    def num_epochs(self) -> int:
        """How many epochs the training begins."""
        args = self.args
        rows = len(self._bucket_sampler(self.train_dataset) if args.aspect_ratio_buckets else self.train_dataset)
        batches = rows / (self._train_batch_size * args.world_size)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        steps = math.ceil(batches / args.gradient_accumulation_steps)
        return math.ceil(args.max_steps / max(1, steps)) if args.max_steps > 0 else math.ceil(args.num_train_epochs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if not self.args.aspect_ratio_buckets:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = self._bucket_sampler(dataset)
        if len(sampler) == 0:
            raise ValueError(
                f"No size has the {self._train_batch_size} rows of a batch. Lower `per_device_train_batch_size`, or train "
                "without `aspect_ratio_buckets`."
            )
        if left_out := len(dataset) - len(sampler):
            logger.warning(
                f"{left_out} of {len(dataset)} rows are left out of each epoch, other ones each time: of their size there "
                f"are not {self._train_batch_size} more for a batch."
            )
        return sampler

    def _bucket_sampler(self, dataset: Dataset) -> BucketSampler:
        return BucketSampler(
            self._training_sizes(dataset),
            self._train_batch_size,
            self.args.seed,
            # Asked for, not set: a run that resumes within an epoch wraps its sampler so that nobody reaches it
            lambda: self._epoch,
        )

    def _training_sizes(self, dataset: Dataset) -> list[list[int]]:
        """The size of each row, of which a batch has one."""
        if TRAINING_SIZE not in dataset.column_names:
            dataset = dataset.map(
                lambda row: {TRAINING_SIZE: self.data_collator.size(row)},
                remove_columns=dataset.column_names,
                new_fingerprint=Hasher.hash((dataset._fingerprint, self.data_collator.buckets)),
                desc="Reading the sizes of images",
            )
        return dataset[TRAINING_SIZE][:]

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None):
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        # Where workers persist, the Trainer would give the last dataset's loader again, whatever the dataset
        return super().get_test_dataloader(self._prepare_to_evaluate(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset):
        return super().get_test_dataloader(self._prepare_to_evaluate(test_dataset, "test_dataset"))

    def _prepare_to_evaluate(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """What is given to `evaluate` or `predict`, prepared as the datasets that the trainer was made with."""
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if any(dataset is split for split in [*own, self.train_dataset]):
            return dataset
        if TENSORS in (getattr(dataset, "column_names", None) or []):
            return dataset
        if self.args.precompute:
            raise ValueError(
                "With `precompute` only the datasets that were given when the trainer was made can be evaluated on: pass "
                "this one as `eval_dataset` then, or train without `precompute`."
            )
        return self._prepare_dataset(dataset, name)

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        if self.args.aspect_ratio_buckets and not is_training:
            batch_size = 1  # an evaluation takes every row, in order
        if self.args.world_size > 1:
            # Accelerate would fill the last batches with rows that count twice
            multiple = batch_size * (1 if self.args.accelerator_config.split_batches else self.args.world_size)
            if isinstance(dataset, IterableDataset):
                dataset = PaddedStream(dataset, multiple)
            elif not self.args.dataloader_drop_last:
                order = sampler_fn(dataset) or torch.utils.data.SequentialSampler(dataset)
                sampler = PaddedSampler(order, multiple, lambda: self._epoch, self.args.data_seed)
                dataset, sampler_fn = PaddedRows(dataset), lambda _: sampler
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        # Called for whatever is no `datasets.Dataset`: the padded rows, and every stream
        return PaddingCollator(data_collator)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_rows = super().get_batch_samples(epoch_iterator, num_batches, device)
        # A stream may end within a step. The Trainer steps after the last micro-batch only, so the missing ones count nothing
        batches += [as_padding(batches[-1]) for _ in range(num_batches - len(batches)) if batches]
        return batches, num_rows

    def _get_num_items_in_batch(self, batch_samples, device):
        num_rows = count_rows(batch_samples)
        if self.args.world_size > 1 and batch_samples:
            num_rows = self.accelerator.reduce(torch.as_tensor(num_rows, device=device))
        return num_rows

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        self._is_padding = inputs.get(IS_PADDING)
        return inputs

    # ---- The reference ----

    def set_reference(self, ref_model: str | DiffusionPipeline | None) -> None:
        """
        Sets the frozen model that the policy is compared to: the given one, or the policy as it is now, which costs no
        memory where a LoRA is trained (its adapters are switched off) and a copy of the denoiser else.

        Args:
            ref_model (`str`, [`~diffusers.DiffusionPipeline`] or `None`):
                The reference, or `None` for the policy as it is now.

        Raises:
            `ValueError`: If `ref_model` is the pipeline that is trained.
        """
        if ref_model is not None:
            if ref_model is self.backbone.pipeline:
                raise ValueError(
                    "`ref_model` is the pipeline that is trained, and would move with it. Leave `ref_model` out: the "
                    "reference then is the model before training."
                )
            denoiser = load_backbone(ref_model, **(self.args.model_init_kwargs or {})).denoiser
        elif not isinstance(self.model, PeftModel):
            denoiser = copy.deepcopy(self.model)
        else:
            return
        denoiser.requires_grad_(False)
        disable_dropout_in_model(denoiser)
        if self.args.bf16 or self.args.fp16:
            # What autocast casts in every forward is cast once; the rest stays in float32, so that no digit changes
            for module in denoiser.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    module.to(torch.bfloat16 if self.args.bf16 else torch.float16)
        self.ref_model = self.accelerator.prepare_model(denoiser, evaluation_mode=True)

    @contextmanager
    def reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """
        Lends the reference's denoiser.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.

        Yields:
            `torch.nn.Module`: what to call for the reference's predictions, without gradient.
        """
        with torch.no_grad():
            if self.ref_model is not None:
                # The resnets of diffusers lay out memory differently in training, which changes the last digit.
                if self.ref_model.training != model.training:
                    self.ref_model.train(model.training)
                yield self.ref_model
                return
            # peft's own `disable_adapter` looks through all modules several times: as long as a forward of a small model
            for layer in self._adapter_layers:
                layer._disable_adapters = True
            try:
                yield model
            finally:
                for layer in self._adapter_layers:
                    layer._disable_adapters = False

    @cached_property
    def _adapter_layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    # ---- What every step needs ----

    @property
    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    @property
    def _moment(self) -> int | str:
        """What a row's randomness depends on besides seed and row: the global step in training, nothing in evaluation."""
        return self.state.global_step if self.model.training else "eval"

    def _key(self, row_id: str, column: str = "") -> tuple:
        return (self.args.seed, self._moment, row_id, column)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encodes images to the moments of the VAE's posterior.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images in [-1, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, each of shape `(B, C, h, w)`: float32 mean and standard deviation.
        """
        with self.accelerator.autocast(AutocastKwargs(enabled=not self.backbone.pipeline.vae.config.force_upcast)):
            return self.backbone.encode_images(pixel_values)

    def sample_latents(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Samples latents of a batch's images from the VAE's posterior with keyed noise. The posterior is encoded here, all
        images in one batch, unless it was [precomputed](DiffusionConfig).

        Args:
            inputs (`dict`):
                A batch of the collator.

        Returns:
            `torch.Tensor` of shape `(n * B, C, h, w)` for `n` image columns, one column after the other: float32 latents
            in the denoiser's scale.
        """
        columns = self.image_columns
        if f"{columns[0]}_latents_mean" in inputs:
            mean, std = (
                torch.cat([inputs[f"{column}_latents_{what}"] for column in columns]) for what in ("mean", "std")
            )
        else:
            mean, std = self.encode_images(torch.cat([inputs[f"{column}_pixel_values"] for column in columns]))
        keys = [self._key(row_id, column) for column in columns for row_id in inputs["id"]]
        return mean + std * keyed_noise(keys, mean.shape[1:], mean.device)

    def image_conditions(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The denoiser's conditions that describe how each image was made.

        Args:
            inputs (`dict`):
                A batch of the collator.
            latents (`torch.Tensor` of shape `(n * B, C, h, w)`):
                The latents of its images.

        Returns:
            `dict[str, torch.Tensor]`: tensors whose first dimension is `n * B`; empty where the model has none.
        """
        original_sizes, crop_top_lefts = (
            torch.cat([inputs[f"{column}_{what}"] for column in self.image_columns])
            for what in ("original_sizes", "crop_top_lefts")
        )
        height, width = (side * self.backbone.pipeline.vae_scale_factor for side in latents.shape[2:])
        return self.backbone.image_conditions(original_sizes, crop_top_lefts, (height, width))

    def drop_prompts(self, prompts: list[str], ids: list[str]) -> list[str]:
        """
        Replaces each prompt by the empty one with the probability `args.prompt_dropout` in training.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts.
            ids (`list[str]` of length `B`):
                Ids of the rows.

        Returns:
            `list[str]` of length `B`.
        """
        if not self.model.training or self.args.prompt_dropout == 0:
            return prompts
        draws = [torch.rand((), generator=keyed_generator(*self._key(row_id), "prompt")) for row_id in ids]
        return ["" if u < self.args.prompt_dropout else prompt for u, prompt in zip(draws, prompts, strict=True)]

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """
        Encodes prompts, each once however often it occurs, or looks them up where they were precomputed.

        Args:
            prompts (`list[str]` of length `B`):
                The prompts.

        Returns:
            `dict[str, torch.Tensor]`: text conditions whose first dimension is `B`.
        """
        device = self.accelerator.device
        if self.prompt_table is not None:
            conditions = self.prompt_table[prompts]
            return {name: value.to(device, non_blocking=True) for name, value in conditions.items()}
        different = list(dict.fromkeys(prompts))
        with self.accelerator.autocast():
            conditions = self.backbone.encode_prompts(different)
        if len(different) == len(prompts):
            return conditions
        places = torch.tensor([different.index(prompt) for prompt in prompts]).to(device, non_blocking=True)
        return {name: value[places] for name, value in conditions.items()}

    def timestep_draws(self, ids: list[str]) -> Iterator[tuple[torch.Tensor, list[tuple]]]:
        """
        Draws timesteps for the rows of a batch: once in training, 8 fixed ones in evaluation.

        Args:
            ids (`list[str]` of length `B`):
                Ids of the rows.

        Yields:
            `tuple[torch.Tensor, list[tuple]]`: timesteps `(B,)`, on the CPU, and the keys of the noise that belongs to
            them.
        """
        keys = [self._key(row_id) for row_id in ids]
        if self.model.training:
            yield keyed_timesteps(keys, *self.timestep_range), keys
        else:
            for timestep in fixed_timesteps(*self.timestep_range, NUM_EVAL_TIMESTEPS):
                yield torch.full((len(ids),), timestep), [(*key, timestep) for key in keys]

    def noise_draws(self, ids: list[str], shape: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        Draws timesteps and noise for the rows of a batch: once in training, at 8 fixed timesteps in evaluation.

        Args:
            ids (`list[str]` of length `B`):
                Ids of the rows.
            shape (`tuple[int, ...]`):
                Shape of one row's latents.

        Yields:
            `tuple[torch.Tensor, torch.Tensor]`: timesteps `(B,)` and noise `(B, *shape)`.
        """
        device = self.accelerator.device
        for timesteps, keys in self.timestep_draws(ids):
            yield timesteps.to(device, non_blocking=True), keyed_noise(keys, shape, device)

    # ---- Loss and metrics ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def record(self, where: torch.Tensor | None = None, **values: torch.Tensor) -> None:
        """
        Collects per-sample values for the next log, which averages them over all samples and processes. Nothing is
        gathered or moved off the device before.

        Args:
            where (`torch.Tensor` of shape `(B,)`, *optional*):
                Which of the samples have these values; all if left out.
            **values (`torch.Tensor` of shape `(B,)`):
                Values by metric.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            value = value.detach().float()
            counts = torch.ones_like(value, dtype=torch.bool) if where is None else where
            if self._is_padding is not None:
                counts = counts & ~self._is_padding.repeat(
                    len(value) // len(self._is_padding)
                )  # (n * B,): n images a row
            metrics[name].append((value, counts))

    def mean_loss(self, losses: torch.Tensor, num_rows: torch.Tensor | int | None) -> torch.Tensor:
        """
        What the losses of a batch contribute to the loss that the optimizer steps on, the mean over all rows of all
        micro-batches and processes.

        Args:
            losses (`torch.Tensor` of shape `(B,)`):
                The losses.
            num_rows (`torch.Tensor` or `int`, *optional*):
                The number of these rows, which `compute_loss` is given as `num_items_in_batch`; `None` for the mean of this
                batch.

        Returns:
            `torch.Tensor` without dimensions.
        """
        num_processes = 1 if num_rows is None else self.args.world_size
        return mean_over_rows(losses, self._is_padding, num_rows, num_processes)

    def record_losses(self, losses: torch.Tensor, ids: list[str]) -> None:
        """
        Notes the losses of a batch: for the check, before the optimizer steps, that they are finite, and for the mean loss
        that is logged, over rows and not over steps.

        Args:
            losses (`torch.Tensor` of shape `(B,)`):
                The losses.
            ids (`list[str]` of length `B`):
                Ids of the rows.
        """
        if self.model.training:
            counted = losses.detach() if self._is_padding is None else losses.detach().masked_fill(self._is_padding, 0)
            self.losses_since_step.append((ids, counted))
        self.record(loss=losses)

    def _averaged_metrics(self, mode: str) -> dict[str, float]:
        metrics = {}
        for name, recorded in self._metrics[mode].items():
            values, where = (torch.cat(parts) for parts in zip(*recorded, strict=True))
            values = torch.where(where, values.double(), 0)
            total, count = self.accelerator.reduce(torch.stack([values.sum(), where.sum().double()]))
            if count > 0:
                metrics[name] = (total / count).item()
        self._metrics[mode].clear()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = self._averaged_metrics("train")
            if "loss" in logs:
                logs["loss"] = metrics.get(
                    "loss", logs["loss"]
                )  # the Trainer's is a mean over steps, of any number of rows
            logs.update({name: value for name, value in metrics.items() if name != "loss"})
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._metrics["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self._averaged_metrics("eval").items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def draw(self, denoiser: torch.nn.Module, prompts: list[str]) -> list[PIL.Image.Image]:
        """
        Draws prompts, always from the same noise, as `args.num_inference_steps` and `args.guidance_scale` say.

        Args:
            denoiser (`torch.nn.Module`):
                Policy or reference, not wrapped.
            prompts (`list[str]`):
                The prompts.

        Returns:
            `list[PIL.Image.Image]`: an image a prompt.
        """
        was_training = denoiser.training
        denoiser.eval()
        with self.backbone.drawing_with(denoiser) as pipeline:
            images = sample_images(
                pipeline,
                prompts,
                seed=self.args.seed,
                batch_size=self.args.per_device_eval_batch_size,
                num_inference_steps=self.args.num_inference_steps,
                guidance_scale=self.args.guidance_scale,
            )
        denoiser.train(was_training)
        return images

    # ---- Saving and loading: what diffusers reads ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        pipeline, name = self.backbone.pipeline, self.backbone.denoiser_name
        if isinstance(model, PeftModel):
            weights = get_peft_model_state_dict(model)
            pipeline.save_lora_weights(
                output_dir,
                **{
                    f"{name}_lora_layers": {key.removeprefix("base_model.model."): w for key, w in weights.items()},
                    # Without the metadata, alpha silently becomes r when the file is loaded.
                    f"{name}_lora_adapter_metadata": model.peft_config["default"].to_dict(),
                },
            )
        else:
            pipeline.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        folder, name = Path(resume_from_checkpoint), self.backbone.denoiser_name
        is_lora = isinstance(model, PeftModel)
        if not (folder / (LORA_WEIGHTS_NAME if is_lora else name)).exists():
            raise ValueError(
                f"The checkpoint {folder} holds no {f'LoRA ({LORA_WEIGHTS_NAME})' if is_lora else f'`{name}` folder'}: "
                f"resume {'with' if not is_lora else 'without'} `peft_config`, as it was trained, or name another."
            )
        if is_lora:
            weights, _ = read_lora(folder)
            unexpected = set_peft_model_state_dict(model, weights).unexpected_keys
            if unexpected or set(weights) != set(get_peft_model_state_dict(model)):
                raise ValueError(f"The LoRA in {folder} targets other modules than `peft_config`.")
        else:
            model.load_state_dict(type(model).from_pretrained(folder / name).state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model, trial) -> None:
        self.create_model_card(model_name=self._model_name())
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._save(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    # ---- Hub ----

    def _model_name(self) -> str:
        return (self.args.hub_model_id or Path(self.args.output_dir).absolute().name).split("/")[-1]

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes the model card, `README.md` in the output directory.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the last part of `args.hub_model_id` or of the output directory.
            dataset_name (`str`, *optional*):
                Hub id of the dataset.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else tags or []
        card = diffusion_model_card(
            trainer=self, model_name=model_name or self._model_name(), dataset_name=dataset_name, tags=tags
        )
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        card.save(Path(self.args.output_dir) / "README.md")

    def _send_telemetry(self) -> None:
        # TRL counts the use of its own trainers and of transformers' models here; neither is what this is.
        pass


class _TrackableConfig(FrozenDict):
    """A diffusers model's configuration with the two methods that trackers call on one of transformers."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, default=str)


def _enable_gradient_checkpointing(denoiser, activation_checkpointing_kwargs=None, every_n_layers=1, offload=False):
    if every_n_layers != 1 or offload:
        raise ValueError(
            "`activation_checkpointing_kwargs` may not hold `every_n_layers` or `offload`: the models of diffusers know "
            "neither."
        )
    kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    denoiser.enable_gradient_checkpointing(partial(checkpoint, **kwargs))


def _cast(denoiser: torch.nn.Module, dtype: torch.dtype) -> None:
    if denoiser.dtype != dtype:  # diffusers warns of any cast, one that changes nothing included
        denoiser.to(dtype)
