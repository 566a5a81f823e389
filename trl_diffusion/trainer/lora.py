# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRA files, as diffusers writes them."""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open


LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def find_lora(name_or_path: str | Path) -> Path:
    """
    Finds a LoRA file.

    Args:
        name_or_path (`str` or `Path`):
            A folder with `pytorch_lora_weights.safetensors`, or the Hub id of a repository that has it.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: If there is none.
    """
    if Path(name_or_path).is_dir():
        if (Path(name_or_path) / LORA_WEIGHTS_NAME).exists():
            return Path(name_or_path) / LORA_WEIGHTS_NAME
        raise ValueError(f"The folder {name_or_path} holds no LoRA ({LORA_WEIGHTS_NAME}).")
    if Path(name_or_path).is_file():
        raise ValueError(f"{name_or_path} is a file: name its folder.")
    try:
        return Path(hf_hub_download(str(name_or_path), LORA_WEIGHTS_NAME))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{name_or_path} is no folder, and the Hub gave no {LORA_WEIGHTS_NAME} of that name: {error}"
        ) from error


def read_lora(name_or_path: str | Path) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Reads a denoiser's LoRA and its configuration, which `save_lora_weights` of diffusers writes into the file's header.

    Args:
        name_or_path (`str` or `Path`):
            A folder or a Hub id, see [`trainer.lora.find_lora`].

    Returns:
        `tuple[dict[str, torch.Tensor], LoraConfig]`: the weights, by the names that a [`~peft.PeftModel`] gives them, and
        the configuration.

    Raises:
        `ValueError`: If the file adapts more than the denoiser, or does not hold its configuration.
    """
    path = find_lora(name_or_path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"The LoRA {path} cannot be read: {error}. Download it again.") from error
    denoiser_name, *others = {key.split(".")[0] for key in weights}
    if any(name.startswith("lora_") for name in (denoiser_name, *others)):
        raise ValueError(
            f"The LoRA {path} has the names of another library. Load it into a pipeline and save it with diffusers."
        )
    if others or denoiser_name.startswith("text_encoder"):
        raise ValueError(
            f"The LoRA {path} adapts more than a denoiser: {', '.join(sorted([denoiser_name, *others]))}."
        )
    if not header:
        raise ValueError(
            f"The LoRA {path} does not hold its configuration, without which its strength is unknown. Save it again with "
            f"`pipeline.save_lora_weights(..., {denoiser_name}_lora_adapter_metadata=config.to_dict())`."
        )
    prefix = f"{denoiser_name}."
    try:
        config = LoraConfig(**{key.removeprefix(prefix): value for key, value in header.items()})
    except TypeError as error:
        raise ValueError(
            f"The configuration of the LoRA {path} is of another version of peft: {error}. Update peft."
        ) from error
    return {f"base_model.model.{key.removeprefix(prefix)}": value for key, value in weights.items()}, config
