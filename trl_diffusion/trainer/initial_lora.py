# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A training that starts at the weights of an earlier LoRA."""

import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key

from ..backbones.base import Backbone
from ..lora_files import base_modules, empty_copy, read_lora, targeted_modules
from .diffusion_config import DiffusionConfig
from .lora import check_fits, check_lora_config, check_lora_on_quantized, load_lora_into, with_target_modules


NAME = "`initial_lora`"
REFERENCE_ADAPTER = "reference"


def read_initial_lora(
    args: DiffusionConfig, backbone: Backbone, peft_config: LoraConfig | None
) -> tuple[dict[str, torch.Tensor] | None, LoraConfig | None]:
    """
    Reads the LoRA that a training starts at, and checks that it fits the model and the settings.

    Args:
        args ([`DiffusionConfig`]):
            The configuration, whose `initial_lora` names it.
        backbone ([`backbones.base.Backbone`]):
            The backbone. Its denoiser may still have no weights.
        peft_config ([`~peft.LoraConfig`] or `None`):
            The settings that the user gave.

    Returns:
        `tuple[dict[str, torch.Tensor] | None, LoraConfig | None]`: the weights, `None` if there is no such LoRA, and the settings
        of the training: the user's, or else those of the LoRA.

    Raises:
        `ValueError`: If the LoRA cannot be read, does not fit the model, or has another rank, alpha or targets than `peft_config`.
    """
    if args.initial_lora is None:
        return None, peft_config
    try:
        weights, config = read_lora(args.initial_lora, backbone.pipeline, backbone.denoiser_name)
    except ValueError as error:
        raise ValueError(f"{NAME} cannot be read: {error}") from error
    config = check_lora_config(config, backbone.denoiser, NAME, loaded=True)
    check_lora_on_quantized(config, backbone, NAME)
    config.inference_mode = False
    model = get_peft_model(empty_copy(backbone.denoiser), config)
    check_fits(get_peft_model_state_dict(model), weights, NAME)
    if peft_config is None:
        return weights, config
    peft_config = with_target_modules(peft_config, backbone.lora_target_modules)
    differing = _differences(config, peft_config, backbone.denoiser)
    if differing:
        raise ValueError(
            f"`peft_config` is not that of {NAME} {args.initial_lora}: {'; '.join(differing)}. Leave `peft_config` out to train with the "
            "LoRA's own settings, or correct it."
        )
    return weights, peft_config


def _differences(theirs: LoraConfig, ours: LoraConfig, denoiser: torch.nn.Module) -> list[str]:
    """What differs between two LoRAs in what their weights mean, a line each; how they name their modules does not matter."""
    modules = base_modules(denoiser)
    a, b = ({name: _strength(config, name) for name in targeted_modules(config, modules)} for config in (theirs, ours))
    lines = []
    for where, others, what in ((a, b, "adapts"), (b, a, "does not adapt")):
        if only := [name for name in where if name not in others]:
            lines.append(
                f"the LoRA {what} {len(only)} modules that `peft_config` {'does not' if where is a else 'does'}, such as {only[0]!r}"
            )
    both = [name for name in a if name in b]
    for place, setting in enumerate(
        ("the rank", "the scale (`lora_alpha / r`, or by the root of `r` with `use_rslora`)")
    ):
        if other := [name for name in both if a[name][place] != b[name][place]]:
            lines.append(
                f"{setting} of {other[0]!r} is {a[other[0]][place]:g} in the LoRA and {b[other[0]][place]:g} in `peft_config`"
            )
    for setting in ("use_dora", "lora_bias", "use_bdlora"):
        if getattr(theirs, setting) != getattr(ours, setting):
            lines.append(
                f"`{setting}` is {getattr(theirs, setting)} in the LoRA and {getattr(ours, setting)} in `peft_config`"
            )
    return lines


def _strength(config: LoraConfig, module: str) -> tuple[int, float]:
    """Rank and scale of a module."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks, module), config.r)
    alpha = alphas.get(get_pattern_key(alphas, module), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def add_reference_adapter(policy: PeftModel) -> str:
    """
    Keeps the policy's LoRA as it is now, as a second, frozen adapter on the same base.

    Args:
        policy ([`~peft.PeftModel`]):
            The policy, whose own adapter stays active.

    Returns:
        `str`: the adapter's name.
    """
    weights = get_peft_model_state_dict(policy)
    if REFERENCE_ADAPTER not in policy.peft_config:
        policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config["default"])
    load_lora_into(policy, weights, NAME, REFERENCE_ADAPTER)
    policy.set_adapter("default")
    for name, parameter in policy.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name:
            parameter.requires_grad_(False)
    return REFERENCE_ADAPTER
