# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Saving a training as diffusers reads it, and loading it again."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..backbones.base import Backbone
from ..backbones.checks import plain_tokenizer
from ..backbones.names import INDEX
from ..files import write_file
from ..hub import hub_id
from .alike import check_weights_alike
from .lora import LORA_WEIGHTS_NAME, load_lora_into, read_lora
from .run_record import check_resumed_run, compare_loras, describe_lora, describe_run
from .sharding import as_whole, cut_as, plain_class, whole_lora, whole_weights


def trained_weights(model: torch.nn.Module, is_kept: bool) -> dict[str, torch.Tensor]:
    """
    The weights of a policy that are saved. Of one that is cut over processes, all of them call this.

    Args:
        model (`torch.nn.Module`):
            The policy, not wrapped.
        is_kept (`bool`):
            Whether this process wants them.

    Returns:
        `dict[str, torch.Tensor]`: whole, by name; of a LoRA by the names of peft. Empty where they are not kept.
    """
    return whole_lora(model, is_kept=is_kept) if isinstance(model, PeftModel) else whole_weights(model, is_kept)


def save_weights(
    backbone: Backbone, model: torch.nn.Module, folder: str | Path, weights: dict[str, torch.Tensor]
) -> None:
    """
    Saves a LoRA as `pytorch_lora_weights.safetensors`, or a trained denoiser within its whole pipeline. Of the checkpoints of a run
    the first holds the frozen components, and the others link to its files: each is complete, and the disk holds them once.

    Args:
        backbone ([`backbones.base.Backbone`]):
            The backbone.
        model (`torch.nn.Module`):
            The policy, not wrapped.
        folder (`str` or `Path`):
            Where the files go: an empty folder.
        weights (`dict[str, torch.Tensor]`):
            See [`trainer.checkpoints.trained_weights`].
    """
    if isinstance(model, PeftModel):
        backbone.save_lora(folder, weights, model.peft_config["default"])
        return
    with as_whole(model, weights):
        _save_pipeline(backbone, model, folder)


def _save_pipeline(backbone: Backbone, model: torch.nn.Module, folder: str | Path) -> None:
    folder, earlier = Path(folder).resolve(), backbone.saved_in
    is_checkpoint = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    if is_checkpoint and earlier not in (None, folder) and (earlier / INDEX).exists():
        model.save_pretrained(folder / backbone.denoiser_name)
        for name in json.loads((earlier / INDEX).read_text(encoding="utf-8")).keys() - {backbone.denoiser_name}:
            _link_folder(earlier / name, folder / name)
        shutil.copyfile(earlier / INDEX, folder / INDEX)
    else:
        with backbone.complete() as pipeline:
            for name in backbone.tokenizer_names:
                _forget_last_call(plain_tokenizer(getattr(pipeline, name)))
            pipeline.save_pretrained(folder)
    _forget_paths(folder)
    if is_checkpoint:
        backbone.saved_in = folder


def _forget_last_call(tokenizer: PreTrainedTokenizerBase) -> None:
    """Takes out how the last texts were cut and padded, which a tokenizer would save, and each call sets."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def _link_folder(source: Path, target: Path) -> None:
    """Links the weights of a component, or copies them where the file system has no links; copies what may be edited."""
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        if file.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            with suppress(OSError):
                os.link(file, copy)
                continue
        shutil.copyfile(file, copy)


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
        saved = plain_class(model).from_pretrained(folder / name, use_safetensors=True).state_dict()
        check_weights_alike(folder, saved)
        model.load_state_dict(cut_as(model.state_dict(), saved))
        return
    weights, config = read_lora(folder)
    errors, _ = compare_loras(describe_lora(config), record["lora"])  # a checkpoint of an older version has no record
    if errors:
        raise ValueError(f"The LoRA of the checkpoint {folder} is another than `peft_config`: {'; '.join(errors)}.")
    check_weights_alike(folder, weights)
    load_lora_into(model, weights, f"The LoRA of the checkpoint {folder}")


def describe_trainer(trainer: Trainer) -> dict[str, Any]:
    """
    Describes the run of a trainer, see [`trainer.run_record.describe_run`].

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, before its first step.

    Returns:
        `dict[str, Any]`: what JSON can hold.
    """
    is_known = trainer.reference_is_initial_policy or trainer.reference is None
    reference_base = None if is_known else trainer.reference.base or trainer.base
    return describe_run(
        trainer.args,
        type(trainer).__name__,
        trainer.base,
        trainer.process.describe(),
        trainer.policy.peft_config["default"] if isinstance(trainer.policy, PeftModel) else None,
        trainer.rows,
        (*trainer.columns, "id", "instances"),
        reference_base,
        trainer.backbone.quantization,
        initial_lora=trainer.initial_weights,
        resolved={"resolution": trainer.resolution, **trainer.backbone.settings},
        **trainer.record_details(),
    )


class BestCheckpointCallback(TrainerCallback):
    """Finds the best checkpoint again when a run is resumed; its path is not in the saved state."""

    def on_train_begin(self, args, state, control, **kwargs):
        best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)


def forget_best_checkpoint(checkpoint: Path) -> None:
    """Takes the path of the best checkpoint out of the state that a checkpoint holds."""
    file = checkpoint / TRAINER_STATE_NAME
    if file.exists():
        _write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"best_model_checkpoint": None})


def _forget_paths(folder: Path) -> None:
    """Takes out of a saved pipeline where its parts were loaded from, but for the Hub id of the whole."""
    for file in (folder / INDEX, *folder.glob("*/*config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        name = config.pop("_name_or_path", None)
        if name and file.parent == folder and hub_id(name):
            config["_name_or_path"] = name
        if name:
            _write_json(file, config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_file(file, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
