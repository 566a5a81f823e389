# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The loop that all trainers share. Objectives live in the trainers' own files."""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from ..data.buckets import BucketSampler, training_sizes
from ..data.caching import TensorCache
from ..data.collators import ImageCollator
from ..data.formats import all_datasets, each_dataset, prepare_dataset
from ..data.padding import IS_PADDING, PaddingCollator, as_padding, count_rows, mean_over_rows, pad_for_processes
from .alike import check_data_alike
from .callbacks import HealthCallback, RunCallback, SampleImagesCallback
from .checkpoints import BestCheckpointCallback, describe_trainer, load_weights
from .diffusion_config import DiffusionConfig, check_data_settings, collator_settings
from .encoding import BatchEncoder, with_rows
from .fingerprints import base_fingerprint
from .initial_lora import read_initial_lora
from .meters import Meters, Metrics
from .model_card import Method, write_model_card
from .noised_batch import NoisedBatch, Noiser, by_row
from .policy import evaluation_mode, make_backbone, make_policy, training_mode
from .precompute import Precomputation, noising_settings
from .publishing import Publisher
from .reference import Reference, check_untrained, make_reference
from .row_order import seeded, visited_rows
from .row_randomness import RowRandomness
from .samples import Samples
from .saving import Saver
from .saving_trainer import SavingTrainer
from .sharding import check_is_sharded, check_sharding
from .zero import writable


class DiffusionTrainer(SavingTrainer):
    """
    Base class of the trainers of this library: TRL's base trainer, made to work with the models of diffusers.

    It noises latents (by random noise or by inversion), asks the frozen models, evaluates at fixed timesteps, averages metrics,
    precomputes, samples and saves. A trainer sets the class attributes below and implements [`~DiffusionTrainer.objective`].

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            What to train, of a family that is supported (the page "Models" lists them): a Hub id, a folder or a file, loaded
            with `args.model_init_kwargs`, or a loaded pipeline, whose denoiser is trained in place.
        ref_model (`str` or [`~diffusers.DiffusionPipeline`], *optional*):
            The reference. If left out it is the model before training: the policy with its adapters off where a LoRA is
            trained, with a frozen copy of the LoRA where it started at `args.initial_lora`, else a frozen copy.
        args ([`DiffusionConfig`], *optional*):
            Configuration of the training. If left out, a default one whose output directory is named after the model.
        data_collator (`Callable`, *optional*):
            From rows, whose images are not decoded, to a batch. Defaults to the trainer's own collator.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Dataset to train on, with the trainer's columns; `id` may be missing, except in a stream.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Dataset to evaluate on, or several by name.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The LoRA to train; `target_modules` defaults to the attention projections. If left out, all weights of the denoiser
            are trained, or the LoRA that `args.initial_lora` names.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].

    Raises:
        `ValueError`: If a pipeline, a LoRA, a dataset or a setting cannot be trained rightly, with the reason and the way out.
    """

    loss_is_scaled_for_ga = True  # a loss here is its rows' share in the mean over all rows of the optimizer step
    _example_prompt = "a red bicycle leaning on a stone wall"
    _card_parameters: dict[str, object] = {}  # what the card says in place of, or beside, what `args` holds
    _recipe_parameters: dict[str, object] = {}  # what only the command knows of its flags
    _output_suffix: str  # of the default output directory

    method: Method
    columns: tuple[str, ...]  # that a dataset must have
    image_columns: tuple[str, ...]  # n for each row: a batch of B rows has n * B latents, one column after the other
    config_class: type[DiffusionConfig]
    collator_class: type[ImageCollator]
    uses_reference = False  # whether the objective compares the policy to a reference
    prompt_settings: Any = None  # what `prompts_of` depends on besides the row, where prompts take long to make

    def __init__(
        self,
        model: str | DiffusionPipeline,
        ref_model: str | DiffusionPipeline | None = None,
        args: DiffusionConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        self.args = args = args or self.default_args(model)
        self.check_arguments(ref_model, data_collator)
        check_sharding(args)
        self.saver = Saver(self, trains=train_dataset is not None)
        self.publisher = Publisher(self)
        train_dataset = each_dataset(train_dataset, "train_dataset", self._prepare_dataset)
        eval_dataset = each_dataset(eval_dataset, "eval_dataset", self._prepare_dataset)
        self.prepared = all_datasets(train_dataset, eval_dataset)
        check_data_settings(args, data_collator, train_dataset)
        check_data_alike(args, train_dataset, eval_dataset, (*self.columns, "id", "instances"))

        self.backbone = make_backbone(model, args, peft_config)
        self.initial_weights, peft_config = read_initial_lora(args, self.backbone, peft_config)
        self.process = self.backbone.process
        self.resolution = self.backbone.check_resolution(args.resolution)
        self.samples = Samples(args, self.backbone, self.resolution, peft_config)
        self.backbone.to(args.device, args.channels_last, args.offload_encoders)
        self.rows, settings = train_dataset, collator_settings(args, self.resolution, self.backbone)
        self.data_collator = data_collator or self.make_collator(**settings)
        self.encoder = BatchEncoder(
            self.backbone, args.device, args.half_dtype, self.image_columns, args.size_conditions
        )
        self.prepare_prompts()
        if args.precompute:  # before the denoiser is in memory
            self.files = Precomputation.for_training(self.encoder, self.data_collator, args)
            visited = partial(visited_rows, self, every_epoch=args.is_noised_by_epoch)
            prompts = (self.prompts_of, self.prompt_settings) if self.has_fixed_prompts else (None, None)
            train_dataset, eval_dataset = self.files.datasets(train_dataset, eval_dataset, visited, *prompts)
            self.prepared += all_datasets(train_dataset, eval_dataset)
        denoiser = self.backbone.load_denoiser()
        self.denoiser_was_training, targets = denoiser.training, self.backbone.lora_target_modules
        super().__init__(
            model=make_policy(denoiser, peft_config, targets, args.half_dtype, args.seed, self.initial_weights),
            args=args,
            data_collator=self.data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[*(callbacks or []), BestCheckpointCallback, RunCallback],
            optimizers=optimizers,
        )
        check_is_sharded(args, self.accelerator, self.backbone)
        if args.channels_last:
            self.policy.to(memory_format=torch.channels_last)
        self.base = base_fingerprint(self.policy)  # as it is before the training
        self.randomness = RowRandomness(args.seed, self.process, args.prompt_dropout, self._moment)
        self.noiser = Noiser(self.process, self.image_columns, args, self.encoder.ahead.noise)
        self.need = partial(self.encoder.need, self.randomness, self.prompts_of, args.noise_source == "random")
        self.noised_caches: list[TensorCache] = []  # one for each epoch
        self.meters = Meters(self.accelerator)
        self.finish_init()
        self.reference_is_initial_policy = ref_model is None and args.starts_at_reference
        self.reference: Reference | None = None
        if self.uses_reference or args.sample_prompts or args.reference_inverts:
            self.set_reference(ref_model)
        self.health = HealthCallback(self.accelerator.scaler)
        self.add_callback(self.health)
        if args.sample_prompts:
            self.add_callback(SampleImagesCallback(self.sample, self.callback_handler.callbacks, self.is_sharding))
        if train_dataset is not None and args.precompute and (args.reference_inverts or args.precompute_ref_preds):
            self.precompute_noised()
        self.cut_models()  # whatever runs from here on runs in all processes

    @classmethod
    def default_args(cls, model: str | DiffusionPipeline) -> DiffusionConfig:
        name = type(model).__name__ if isinstance(model, DiffusionPipeline) else model
        return cls.config_class(f"{Path(name).name}-{cls._output_suffix}")

    def check_arguments(self, ref_model: str | DiffusionPipeline | None, data_collator) -> None:
        """Raises a `ValueError` where an argument has no use with `args`, before anything is loaded."""

    def make_collator(self, **settings: Any) -> ImageCollator:
        """The collator that is used where the user gives none, see [`data.collators.ImageCollator`]."""
        return self.collator_class(**settings)

    def prepare_prompts(self) -> None:
        """What a trainer needs to make prompts, before anything is precomputed. There is no policy yet."""

    def finish_init(self) -> None:
        """What a trainer prepares once the policy is there."""

    def prompts(self, inputs: dict[str, Any]) -> list[str | None]:
        """The policy's prompts `(B,)` for a batch of the collator; `None` is the unconditional branch."""
        return self.randomness.drop_prompts(inputs["prompt"], inputs["id"])

    def prompts_of(self, row: dict[str, Any]) -> list[str | None]:
        """Every prompt that may be encoded for a row of a dataset; `None` is the unconditional branch."""
        return [row["prompt"], None] if self.args.prompt_dropout > 0 else [row["prompt"]]

    @property
    def has_fixed_prompts(self) -> bool:
        """Whether [`~DiffusionTrainer.prompts_of`] knows all prompts, so that they can be encoded before the training."""
        return True

    def prepare_batch(self, inputs: dict[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """What does not depend on the timestep: `"conditions"` of the `n * B` images, and whatever else the objective needs."""
        return {"conditions": self.encoder.conditions(self.prompts(inputs), inputs, latents)}

    def frozen_predictions(self, model: torch.nn.Module, noised: NoisedBatch) -> dict[str, torch.Tensor]:
        """The frozen models' predictions by name, each `(n * B, C, h, w)`, without gradient: `"ref_pred"` is the reference's."""
        if not self.uses_reference:
            return {}
        with self.reference.lend(model) as reference:
            return {"ref_pred": self._predict(reference, noised)}

    def objective(self, model: torch.nn.Module, noised: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        """
        The losses `(B,)` of a noised batch, and metrics by name: values `(B,)`, or a tuple of values and of which samples have
        them, bool `(B,)`. `model` is the policy, wrapped or not.
        """
        raise NotImplementedError

    def health_warnings(self, logs: dict[str, float]) -> dict[str, str]:
        """Warnings about what was logged, by a name; each is said once."""
        return {}

    def _prepare_dataset(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        return prepare_dataset(dataset, name, self.columns, self.image_columns)

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        if not any(dataset is known for known in self.prepared):  # given to `evaluate` or `predict`
            dataset = self._prepare_dataset(dataset, description)
        if self.args.aspect_ratio_buckets and not is_training:
            batch_size = 1  # an evaluation takes every row, in order
        args = self.args
        if args.world_size > 1 and (isinstance(dataset, IterableDataset) or not args.dataloader_drop_last):
            multiple = batch_size * (1 if args.accelerator_config.split_batches else args.world_size)
            dataset, sampler_fn = pad_for_processes(dataset, sampler_fn, multiple, lambda: self._epoch, args.data_seed)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)

    def get_train_dataloader(self):
        with seeded(self.args.seed):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None):
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # Not by the Trainer's own method, which with persistent workers returns the loader of another dataset
        return self._get_dataloader(eval_dataset, "eval_dataset", self.args.eval_batch_size, self._get_eval_sampler)

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset):
        return self._get_dataloader(test_dataset, "test_dataset", self.args.eval_batch_size, self._get_eval_sampler)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if not self.args.aspect_ratio_buckets:
            return super()._get_train_sampler(train_dataset)
        sampler = self._bucket_sampler(train_dataset or self.train_dataset)
        sampler.check()
        return sampler

    def _bucket_sampler(self, dataset: Dataset) -> BucketSampler:
        collator = self.data_collator
        sizes = training_sizes(dataset, collator.size, repr(collator.buckets), self.image_columns)
        # The epoch is a function: a run that resumes within an epoch wraps its sampler so that it cannot be set
        return BucketSampler(sizes, self._train_batch_size, self.args.seed, lambda: self._epoch)

    def precompute_noised(self) -> None:
        """Noises the precomputed rows of each epoch, and asks the frozen models, which every process has whole until then."""
        self.place_whole_models()
        self.model.train()  # as in a step
        depends_on = noising_settings(self.args, self.encoder), self._frozen_fingerprints()
        self.noised_caches = self.files.by_epoch(self.train_dataset, self._noised_tensors, depends_on)
        self.state.epoch = 0
        self.meters.averages("train")  # none of these was a step
        self.model.train(self.denoiser_was_training)

    @torch.no_grad()
    def _noised_tensors(self, inputs: dict[str, Any], epoch: int) -> dict[str, torch.Tensor]:
        self.state.epoch = epoch
        with self.accelerator.autocast():
            noised = next(self.noised_batches(self.model, self._prepare_inputs(inputs)))
        tensors = {"timesteps": noised.timesteps, "noisy_latents": noised.noisy_latents, **noised.frozen}
        return {name: by_row(value, len(self.image_columns)) for name, value in tensors.items()}

    def _frozen_fingerprints(self) -> list[Any]:
        """What the predictions of the frozen models depend on besides the rows and how they are noised."""
        return self.reference.fingerprint()

    def set_reference(self, ref_model: str | DiffusionPipeline | None) -> None:
        """Sets the model that the policy is compared to, `None` for the policy as it is now; see [`trainer.reference`]."""
        self.reference = make_reference(ref_model, self.backbone, self.policy, self.args, self.accelerator)

    @property
    def policy(self) -> torch.nn.Module:
        """The policy, not wrapped."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def _moment(self) -> int | str | None:
        """What the randomness of a row changes with: the step, or the epoch where it must be known before the training."""
        if not self.model.training:
            return None
        return f"epoch {self._epoch}" if self.args.is_noised_by_epoch else self.state.global_step

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        losses = []
        for noised in self.noised_batches(model, inputs):
            timestep_losses, metrics = self.objective(model, noised)
            losses.append(timestep_losses)
            self.record(metrics)
        losses, is_padding = torch.stack(losses).mean(dim=0), self.meters.is_padding
        self.record({"loss": losses})
        if self.model.training:
            self.encoder.ahead.advance()
            self.health.losses.append((inputs["id"], losses.detach(), is_padding))
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:  # the backward steps
                self.health.check_losses(self.args, self.state)
        loss = mean_over_rows(losses, is_padding, num_items_in_batch, self.args.world_size)
        return (loss, {"losses": losses}) if return_outputs else loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        self.meters.is_padding = inputs.get(IS_PADDING)
        return inputs

    def _get_num_items_in_batch(self, batch_samples, device):
        return count_rows(batch_samples, self.accelerator)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_rows = super().get_batch_samples(self.encoder.ahead.read(epoch_iterator), num_batches, device)
        # A stream may end within a step. The Trainer steps after the last micro-batch only, so the missing ones count nothing
        batches += [as_padding(batches[-1]) for _ in range(num_batches - len(batches)) if batches]
        self.encoder.ahead.plan(partial(self.need, self.noised_caches[self._epoch :][:1]), batches, self.state)
        return batches, num_rows

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        # Called for whatever is no `datasets.Dataset`: the padded rows, and every stream
        return PaddingCollator(data_collator)

    def noised_batches(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Iterator[NoisedBatch]:
        """The noised latents of a batch with the frozen models' predictions: once in training, at 8 timesteps in evaluation."""
        latents = self.encoder.sample_latents(inputs, self.randomness.image_keys(inputs["id"], self.image_columns))
        batch = self.prepare_batch(inputs, latents)
        for cache in with_rows(self.noised_caches[self._epoch :][:1], inputs["id"]) if self.model.training else ():
            yield self.noiser.cached(batch, latents, self.encoder.ahead.rows(cache, inputs["id"]))
            return
        for timesteps, keys in self.randomness.timesteps(inputs["id"], latents.shape[2:]):
            with self.reference.lend(model) if self.args.reference_inverts else nullcontext(model) as inverter:
                noised = self.noiser(batch, latents, timesteps, keys, partial(self.backbone.predict, inverter))
            yield noised._replace(frozen=self.frozen_predictions(model, noised))

    def predict_with_policy(self, model: torch.nn.Module, noised: NoisedBatch) -> torch.Tensor:
        """The policy's prediction `(n * B, C, h, w)`; in the first step it must be the reference's, if both are one model."""
        model_pred = self._predict(model, noised)
        is_untrained = self.model.training and self.state.global_step == 0
        if is_untrained and self.reference_is_initial_policy and "ref_pred" in noised.frozen:
            check_untrained(model_pred, noised.frozen["ref_pred"], self.args.half_dtype or torch.float32)
        return model_pred

    def _predict(self, model: torch.nn.Module, noised: NoisedBatch) -> torch.Tensor:
        return self.backbone.predict(model, noised.noisy_latents, noised.timesteps, noised.batch["conditions"])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        training = training_mode(self.policy, self.denoiser_was_training)
        with self.saver.training(), training, closing(self.encoder.ahead):
            self.model.train()  # as in a step: the first batch is made ready before it
            return self.saver.resume(super().train, resume_from_checkpoint, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        self.health.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.health.gradient_norm

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def record(self, metrics: Metrics) -> None:
        """Collects metrics for the next log, see [`trainer.meters.Meters`]."""
        self.meters.record("train" if self.model.training else "evaluation", metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self.meters.add_averages("train", logs)
            self.health.warn_once(self.health_warnings(logs))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self.meters.averages("evaluation")  # of an evaluation that was stopped
        with evaluation_mode(self.model), self.encoder.keeping_encoders():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.meters.add_averages("evaluation", output.metrics, f"{metric_key_prefix}_")
        return output

    def sample(self, prompts: list[str], with_reference: bool = False) -> list[PIL.Image.Image]:
        """One image for each prompt, by policy or reference or `args.sample_model`, as trained in size, always from the same noise."""
        return self.samples.draw(prompts, self.policy, self.reference, with_reference)

    def pipeline(self) -> DiffusionPipeline:
        """A pipeline that samples with the policy as it is now, such as `trainer.pipeline()("a red bicycle").images[0]`."""
        return self.samples.pipeline(self.policy)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        with writable(model, self.deepspeed):
            load_weights(self.backbone, model, resume_from_checkpoint, self.run_record)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    @cached_property
    def run_record(self) -> dict[str, Any]:
        """What this run is, to compare a resumed run with."""
        return describe_trainer(self)

    def record_details(self) -> dict[str, Any]:
        """What belongs into the record of a run besides: `expert`, `criteria`."""
        return {}

    def further_files(self) -> dict[str, bytes]:
        """What is pushed beside the model and its card, by its path in the repository."""
        return {}

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.hub_model_id = self.publisher.repo_id  # created before anything that takes long

    def _finish_current_push(self) -> None:
        self.publisher.finish()

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **card
    ):
        """
        As [`~transformers.Trainer.push_to_hub`], of listed files only, see the page "Pushing to the Hub".

        Args:
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to what its owner has set.
            **card:
                Arguments of [`~DiffusionTrainer.create_model_card`]: `model_name`, `dataset_name`, `tags`.

        Raises:
            `ValueError`: If the push fails, with the reason and the way out.
        """
        return self.publisher.push(commit_message, blocking, token, revision, private, card)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
        """Writes the model card and what belongs to it, see [`trainer.model_card.write_model_card`]."""
        if self.is_world_process_zero():
            write_model_card(self, model_name, dataset_name, tags)

    def _send_telemetry(self) -> None:
        """TRL counts the use of its own trainers and of transformers' models here; neither is what this is."""
