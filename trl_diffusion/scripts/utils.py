# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the commands share: loading datasets, and the training of every trainer."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import LoraConfig
from transformers import TrainerState

from ..cli.stopping import finishing
from ..data.presets import training_columns
from ..data.sources import load_source
from ..machine import public_name
from ..trainer.callbacks import StopCallback
from ..trainer.model_config import ModelConfig
from .dataset_arguments import DatasetArguments


if TYPE_CHECKING:
    from ..trainer.diffusion_config import DiffusionConfig


def load_splits(
    name: str | None, config: str | None = None, revision: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """
    Loads the dataset that a command names.

    Args:
        name (`str`, *optional*):
            `--dataset_name`: a Hub id, a file or a folder, see [`data.sources.load_source`].
        config (`str`, *optional*):
            Configuration of the dataset.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Stream the dataset instead of downloading it first.

    Returns:
        `DatasetDict` or `IterableDatasetDict`

    Raises:
        `ValueError`: If no dataset is named, or it does not exist or cannot be read.
    """
    if not name:
        raise ValueError("`--dataset_name` is missing: give the Hub id of a dataset, or a file or folder.")
    return load_source(name, config, revision, streaming)


def get_split(splits: DatasetDict | IterableDatasetDict, name: str, flag: str) -> Dataset | IterableDataset:
    """
    Picks a split.

    Args:
        splits (`DatasetDict` or `IterableDatasetDict`):
            The splits.
        name (`str`):
            Name of the split.
        flag (`str`):
            The flag that sets this name, for the message.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If there is no such split.
    """
    if name not in splits:
        raise ValueError(f"The dataset has no split `{name}`; it has {', '.join(splits)}. Name one with `{flag}`.")
    return splits[name]


def get_datasets(
    script_args: DatasetArguments, evaluates: bool
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Loads the splits that a command trains and evaluates on, with the trainers' columns.

    Args:
        script_args ([`DatasetArguments`]):
            The dataset and its splits.
        evaluates (`bool`):
            Whether the training evaluates, so that the second split is needed.

    Returns:
        `tuple`: the split to train on, and the split to evaluate on or `None`.

    Raises:
        `ValueError`: If no dataset is named, a split is missing, or a column that `--columns` names.
    """
    args, mapping = script_args, script_args.mapping
    splits = load_splits(args.dataset_name, args.dataset_config, args.dataset_revision, args.dataset_streaming)
    train_dataset = get_split(splits, args.dataset_train_split, "--dataset_train_split")
    if not evaluates:
        return training_columns(train_dataset, mapping), None
    test_dataset = get_split(splits, args.dataset_test_split, "--dataset_test_split")
    return training_columns(train_dataset, mapping), training_columns(test_dataset, mapping)


def get_model(model_args: ModelConfig, training_args: "DiffusionConfig") -> str:
    """
    Returns the model that the flags name. `--model_revision`, `--variant`, `--single_file_config`, `--vae`, `--load_in_4bit` and
    `--load_in_8bit` are added to `training_args.model_init_kwargs`.

    Args:
        model_args ([`ModelConfig`]):
            The flags.
        training_args ([`DiffusionConfig`]):
            Changed in place.

    Returns:
        `str`: Hub id or folder.

    Raises:
        `ValueError`: If no model is named, or the flags contradict each other or `model_init_kwargs`.
    """
    if not model_args.model_name_or_path:
        raise ValueError("`--model_name_or_path` is missing: give the Hub id or the folder of a diffusers pipeline.")
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "variant": model_args.variant,
        "config": model_args.single_file_config,
        "vae": model_args.vae,
        "quantization_config": model_args.quantization_config,
    }
    if model_init_kwargs["quantization_config"] and (training_args.model_init_kwargs or {}).get("quantization_config"):
        raise ValueError(
            "`--load_in_4bit` and `--load_in_8bit` are `quantization_config` of `--model_init_kwargs` in short. Give one of the two."
        )
    training_args.model_init_kwargs = {
        **{name: value for name, value in model_init_kwargs.items() if value is not None},
        **(training_args.model_init_kwargs or {}),
    }
    return model_args.model_name_or_path


def get_peft_config(model_args: ModelConfig, initial_lora: str | None = None) -> LoraConfig | None:
    """
    Returns the LoRA that the flags describe.

    Args:
        model_args ([`ModelConfig`]):
            The flags.
        initial_lora (`str`, *optional*):
            The LoRA that the training starts at.

    Returns:
        [`~peft.LoraConfig`], or `None` if `use_peft` is false, or `initial_lora` is given and the flags of the LoRA are left at their
        defaults: it then has its own settings.
    """
    flags = {field.name: field.default for field in fields(ModelConfig) if "lora" in field.name}
    are_defaults = all(getattr(model_args, name) == default for name, default in flags.items())
    if not model_args.use_peft or (initial_lora is not None and are_defaults):
        return None
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        use_rslora=model_args.use_rslora,
    )


def dataset_flags(script_args: DatasetArguments) -> dict[str, Any]:
    """The flags of the dataset that differ from their defaults, for the recipe in the card: of a path the last part."""
    values = {field.name: getattr(script_args, field.name) for field in fields(DatasetArguments)}
    values |= {"dataset_name": public_name(script_args.dataset_name), "columns": script_args.mapping}
    return {field.name: x for field in fields(DatasetArguments) if (x := values[field.name]) != field.default}


def train(
    trainer_class: Callable, script_args: DatasetArguments, training_args: "DiffusionConfig", model_args: ModelConfig
) -> None:
    """
    Trains, or resumes if `resume_from_checkpoint` says so, saves the model and its card, and pushes them if `push_to_hub`
    says so.

    Args:
        trainer_class (`Callable`):
            The trainer's class. Arguments that only this trainer has are set with `functools.partial`.
        script_args ([`DatasetArguments`]):
            The dataset and its splits.
        training_args ([`DiffusionConfig`]):
            The trainer's config.
        model_args ([`ModelConfig`]):
            The model and the LoRA.

    Raises:
        `ValueError`: If a model or a dataset is not named, or a split is missing.
    """
    model = get_model(model_args, training_args)
    train_dataset, eval_dataset = get_datasets(script_args, evaluates=training_args.eval_strategy != "no")
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args, training_args.initial_lora),
    )
    trainer._recipe_parameters = dataset_flags(script_args)
    with finishing() as stop:
        trainer.add_callback(StopCallback(lambda: stop is not None and stop.number is not None))
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if stop is not None and stop.number is not None and trainer.state.global_step < trainer.state.max_steps:
        stop.say(after_stop(trainer.state, training_args))
        trainer.accelerator.wait_for_everyone()  # a launcher ends all processes where one ends
        return
    trainer.accelerator.print("Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    if training_args.should_save:  # of several machines the first one, unless each is asked to
        print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def after_stop(state: TrainerState, args: "DiffusionConfig") -> str:
    """What a training that was stopped leaves, and how it goes on."""
    done = f"{state.global_step} of {state.max_steps} steps are done"
    if args.save_strategy == "no":
        return f"{done}, and nothing is saved, because `save_strategy` is `no`."
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return f"{done} and saved in {folder}: the same command with `--resume_from_checkpoint {folder}` continues."
