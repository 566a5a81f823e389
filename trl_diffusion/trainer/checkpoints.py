# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Saving a training as diffusers reads it, and loading it again."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from ..backbones.base import Backbone
from .lora import LORA_WEIGHTS_NAME, load_lora_into, read_lora
from .run_record import check_resumed_run, compare_loras, describe_lora


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
        with backbone.complete() as pipeline:
            pipeline.save_pretrained(folder)


def load_weights(backbone: Backbone, model: torch.nn.Module, folder: str | Path, record: dict[str, Any]) -> None:
    """
    Loads the weights of a checkpoint. What is another run than the one that was stopped is said.

    Args:
        backbone ([`backbones.base.Backbone`]):
            The backbone.
        model (`torch.nn.Module`):
            The policy, not wrapped, changed in place.
        folder (`str` or `Path`):
            The checkpoint.
        record (`dict[str, Any]`):
            What the run is, see [`trainer.run_record.describe_run`].

    Raises:
        `ValueError`: If the checkpoint holds no weights that fit, or they would mean something else in this run.
    """
    folder, name = Path(folder), backbone.denoiser_name
    is_lora = isinstance(model, PeftModel)
    if not (folder / (LORA_WEIGHTS_NAME if is_lora else name)).exists():
        raise ValueError(
            f"The checkpoint {folder} holds no {f'LoRA ({LORA_WEIGHTS_NAME})' if is_lora else f'`{name}` folder'}: "
            f"resume {'with' if not is_lora else 'without'} `peft_config`, as it was trained, or name another."
        )
    check_resumed_run(folder, record)
    if not is_lora:
        model.load_state_dict(type(model).from_pretrained(folder / name).state_dict())
        return
    weights, config = read_lora(folder)
    errors, _ = compare_loras(describe_lora(config), record["lora"])  # a checkpoint of an older version has no record
    if errors:
        raise ValueError(f"The LoRA of the checkpoint {folder} is another than `peft_config`: {'; '.join(errors)}.")
    load_lora_into(model, weights, f"The LoRA of the checkpoint {folder}")
