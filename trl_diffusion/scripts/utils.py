# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What the scripts share."""

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from peft import LoraConfig
from trl import ScriptArguments

from ..trainer.model_config import ModelConfig


def load_splits(script_args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """
    Loads the dataset that a command names: a Hub id, a folder of Parquet files or images, or a folder that
    `save_to_disk` wrote.

    Args:
        script_args ([`~trl.ScriptArguments`]):
            `dataset_name`, `dataset_config` and `dataset_streaming` are read.

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
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
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


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """
    The LoRA that the flags describe.

    Args:
        model_args ([`ModelConfig`]):
            The flags.

    Returns:
        [`~peft.LoraConfig`], or `None` without `--use_peft`.
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
