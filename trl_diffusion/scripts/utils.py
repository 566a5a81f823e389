# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the scripts share."""

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from peft import LoraConfig
from transformers import TrainingArguments
from trl import ScriptArguments

from ..trainer.model_config import ModelConfig


if TYPE_CHECKING:
    from ..trainer.diffusion_config import DiffusionConfig
    from ..trainer.diffusion_trainer import DiffusionTrainer
    from .annotation import AnnotationArguments


def load_splits(
    script_args: "ScriptArguments | AnnotationArguments", revision: str | None = None
) -> DatasetDict | IterableDatasetDict:
    """
    Loads the dataset that a command names: a Hub id, a folder of Parquet files or images, or a folder that
    `save_to_disk` wrote.

    Args:
        script_args ([`~trl.ScriptArguments`] or [`AnnotationArguments`]):
            `dataset_name`, `dataset_config` and `dataset_streaming` are read.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Returns:
        `DatasetDict` or `IterableDatasetDict`

    Raises:
        `ValueError`: If no dataset is named.
    """
    if not script_args.dataset_name:
        raise ValueError("`--dataset_name` is missing: name a dataset of the Hub, or a folder.")
    folder = Path(script_args.dataset_name)
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        dataset = load_from_disk(str(folder))
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
    return load_dataset(
        script_args.dataset_name,
        name=script_args.dataset_config,
        revision=revision,
        streaming=script_args.dataset_streaming,
    )


def get_split(splits: DatasetDict | IterableDatasetDict, name: str, flag: str) -> Dataset | IterableDataset:
    """
    Picks a split.

    Args:
        splits (`DatasetDict` or `IterableDatasetDict`):
            The splits.
        name (`str`):
            The split's name.
        flag (`str`):
            The flag that names it, for the message.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If there is no such split.
    """
    if name not in splits:
        raise ValueError(f"The dataset has no split `{name}`; it has {', '.join(splits)}. Name one with `{flag}`.")
    return splits[name]


def get_datasets(
    script_args: ScriptArguments, training_args: TrainingArguments
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Loads the splits that a command trains and evaluates on.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            The dataset and its splits.
        training_args ([`~transformers.TrainingArguments`]):
            Whether to evaluate, by `eval_strategy`.

    Returns:
        `tuple`: the training split, and the other or `None`.

    Raises:
        `ValueError`: If no dataset is named, or a split is missing.
    """
    splits = load_splits(script_args)
    train_dataset = get_split(splits, script_args.dataset_train_split, "--dataset_train_split")
    if training_args.eval_strategy == "no":
        return train_dataset, None
    return train_dataset, get_split(splits, script_args.dataset_test_split, "--dataset_test_split")


def get_model(model_args: ModelConfig, training_args: "DiffusionConfig") -> str:
    """
    The model that the flags name; `--model_revision` and `--variant` join `training_args.model_init_kwargs`.

    Args:
        model_args ([`ModelConfig`]):
            The flags.
        training_args ([`DiffusionConfig`]):
            Changed in place.

    Returns:
        `str`: Hub id or folder.

    Raises:
        `ValueError`: If no model is named.
    """
    if not model_args.model_name_or_path:
        raise ValueError("`--model_name_or_path` is missing: name a diffusers pipeline of the Hub, or its folder.")
    model_init_kwargs = {"revision": model_args.model_revision, "variant": model_args.variant}
    training_args.model_init_kwargs = {
        **{name: value for name, value in model_init_kwargs.items() if value is not None},
        **(training_args.model_init_kwargs or {}),
    }
    return model_args.model_name_or_path


def run_training(trainer: "DiffusionTrainer", dataset_name: str) -> None:
    """
    Trains, or resumes where `resume_from_checkpoint` says so, saves the model and its card, and pushes them where
    `push_to_hub` says so.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer.
        dataset_name (`str`):
            The dataset, for the card.
    """
    args = trainer.args
    resume = args.resume_from_checkpoint  # a folder, or "true" for the last checkpoint of `output_dir`
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.accelerator.print("Training completed.")

    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """
    The LoRA that the flags describe.

    Args:
        model_args ([`ModelConfig`]):
            The flags.

    Returns:
        [`~peft.LoraConfig`], or `None` where `use_peft` is false.
    """
    if not model_args.use_peft:
        return None
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        use_rslora=model_args.use_rslora,
    )
