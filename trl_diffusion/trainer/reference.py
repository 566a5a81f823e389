# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The reference: the frozen model that the policy is compared to."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import PeftModel
from trl.trainer.utils import disable_dropout_in_model

from ..backbones import Backbone, load_backbone
from ..backbones.quantization import compute_as_autocast
from .adapters import adapter_layers, with_adapter
from .diffusion_config import DiffusionConfig
from .fingerprints import base_fingerprint, module_fingerprint, tensors_hash
from .initial_lora import add_reference_adapter
from .policy import loading_settings
from .sharding import is_sharding, shard, whole_lora


# Largest distance of two predictions that are equal but for rounding, as a share of their size. With TF32 or in half precision,
# the kernels of another batch size round differently.
MAX_DIFFERENCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Reference:
    """
    Lends the reference's denoiser: that of another model, or the policy with its adapters switched off.

    Args:
        denoiser (`torch.nn.Module` or `None`):
            The reference's denoiser, prepared for its device; `None` for the policy without adapters, which costs no memory.
        policy (`torch.nn.Module`):
            The policy's denoiser, not wrapped.
        adapter (`str`, *optional*):
            The policy's adapter that is the reference's, which costs the memory of a LoRA; left out, the reference has none.
        base (`list[float]`, *optional*):
            [`trainer.fingerprints.base_fingerprint`] of the denoiser.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module | None,
        policy: torch.nn.Module,
        adapter: str | None = None,
        base: list[float] | None = None,
    ):
        self.denoiser, self.base = denoiser, base
        self.policy, self.adapter = policy, adapter
        self.adapter_layers = adapter_layers(policy)

    @contextmanager
    def lend(self, policy: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """
        Lends the reference, without gradient.

        Args:
            policy (`torch.nn.Module`):
                The policy, wrapped or not.

        Yields:
            `torch.nn.Module`
        """
        with torch.no_grad():
            if self.denoiser is not None:
                # The resnets of diffusers lay out memory differently in training, which changes the last digit.
                if self.denoiser.training != policy.training:
                    self.denoiser.train(policy.training)
                yield self.denoiser
                return
            with with_adapter(self.adapter_layers, self.adapter):
                yield policy

    def to(self, device: torch.device) -> None:
        """Moves the reference's own denoiser to a device."""
        if self.denoiser is not None:
            self.denoiser.to(device)

    def shard(self, accelerator: Accelerator) -> None:
        """Cuts the reference's own denoiser over the processes, see [`trainer.sharding.shard`]."""
        if self.denoiser is not None:
            shard(self.denoiser, accelerator)
            accelerator._models.remove(self.denoiser)  # which is no model whose gradient is clipped

    def fingerprint(self) -> list[str]:
        """What the reference's predictions depend on."""
        fingerprint = [module_fingerprint(self.denoiser or self.policy)]
        if self.adapter is not None:
            fingerprint.append(tensors_hash(whole_lora(self.policy, self.adapter)))
        return fingerprint


def frozen_denoiser(denoiser: torch.nn.Module, half_dtype: torch.dtype | None) -> torch.nn.Module:
    """
    Freezes a denoiser.

    Args:
        denoiser (`torch.nn.Module`):
            The denoiser, changed in place.
        half_dtype (`torch.dtype` or `None`):
            The type of mixed precision, if any. What autocast would cast in every forward is cast once; the rest stays in
            float32, so that no digit changes.

    Returns:
        `torch.nn.Module`
    """
    denoiser.requires_grad_(False)
    disable_dropout_in_model(denoiser)
    compute_as_autocast(denoiser)
    for module in denoiser.modules():
        is_cast = half_dtype is not None and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        # One by one, so that the whole is never in memory in float32
        module._apply(partial(_cast, dtype=half_dtype if is_cast else torch.float32), recurse=False)
    return denoiser


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def make_reference(
    ref_model: str | DiffusionPipeline | None,
    backbone: Backbone,
    policy: torch.nn.Module,
    args: DiffusionConfig,
    accelerator: Accelerator,
) -> Reference:
    """
    Makes the reference.

    Args:
        ref_model (`str`, [`~diffusers.DiffusionPipeline`] or `None`):
            Another model; `None` for the policy as it is now, or without its LoRA where that started at `args.initial_lora` and
            `args.initial_lora_in_reference` is off.
        backbone ([`backbones.base.Backbone`]):
            The policy's backbone.
        policy (`torch.nn.Module`):
            The policy's denoiser, not wrapped.
        args ([`DiffusionConfig`]):
            The configuration.
        accelerator ([`~accelerate.Accelerator`]):
            Prepares the frozen model.

    Returns:
        [`trainer.reference.Reference`]

    Raises:
        `ValueError`: If `ref_model` is the pipeline that is trained, or does not fit it.
    """
    if ref_model is backbone.pipeline:
        raise ValueError(
            "`ref_model` is the pipeline that is trained, and would change with it. Leave `ref_model` out: the reference is "
            "then the model before training."
        )
    if ref_model is not None:
        other = load_backbone(ref_model, **loading_settings(args, isinstance(policy, PeftModel)))
        with backbone.encoders_on_device():
            backbone.check_reference(other.pipeline)
        denoiser = other.denoiser
    elif isinstance(policy, PeftModel):
        keeps_lora = args.initial_lora is not None and args.initial_lora_in_reference
        return Reference(None, policy, add_reference_adapter(policy) if keeps_lora else None)
    else:
        denoiser = copy.deepcopy(policy)
    denoiser = frozen_denoiser(denoiser, args.half_dtype)
    placement = False if is_sharding(accelerator) else None  # it is cut before it is on the device
    prepared = accelerator.prepare_model(denoiser, device_placement=placement, evaluation_mode=True)
    return Reference(prepared, policy, base=base_fingerprint(denoiser))


def check_untrained(model_pred: torch.Tensor, ref_pred: torch.Tensor, dtype: torch.dtype) -> None:
    """
    Checks that the policy predicts what the reference does before anything was trained.

    Args:
        model_pred (`torch.Tensor`):
            The policy's prediction.
        ref_pred (`torch.Tensor`):
            The reference's prediction.
        dtype (`torch.dtype`):
            The precision that both were computed in.

    Raises:
        `ValueError`: If they differ by more than rounding.
    """
    size = ref_pred.float().square().mean().sqrt()
    difference = ((model_pred.detach().float() - ref_pred.float()).square().mean().sqrt() / size).item()
    if difference > MAX_DIFFERENCE[dtype]:  # what is not finite is left to the health callback, which names the rows
        raise ValueError(
            f"Policy and reference differ by {difference:.1%} of their predictions in the first step, although nothing was "
            "trained yet, so the loss would compare two different models. Load the pipeline anew and train it before "
            "anything else changes it; if it is meant to differ from the reference, pass the reference as `ref_model`."
        )
