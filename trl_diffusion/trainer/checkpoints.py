# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Saving a training as diffusers reads it, and loading it again."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from ..backbones.base import Backbone
from .lora import LORA_WEIGHTS_NAME, read_lora


def save_weights(backbone: Backbone, model: torch.nn.Module, folder: str | Path) -> None:
    """
    Saves a LoRA as `pytorch_lora_weights.safetensors`, or a trained denoiser within its whole pipeline.

    Args:
        backbone ([`backbones.base.Backbone`]):
            The backbone.
        model (`torch.nn.Module`):
            The policy, not wrapped.
        folder (`str` or `Path`):
            Where the files go.
    """
    if isinstance(model, PeftModel):
        backbone.save_lora(folder, get_peft_model_state_dict(model), model.peft_config["default"])
    else:
        backbone.pipeline.save_pretrained(folder)


def load_weights(backbone: Backbone, model: torch.nn.Module, folder: str | Path) -> None:
    """
    Loads the weights of a checkpoint.

    Args:
        backbone ([`backbones.base.Backbone`]):
            The backbone.
        model (`torch.nn.Module`):
            The policy, not wrapped, changed in place.
        folder (`str` or `Path`):
            The checkpoint.

    Raises:
        `ValueError`: If the checkpoint holds no weights that fit.
    """
    folder, name = Path(folder), backbone.denoiser_name
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
