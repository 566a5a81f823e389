# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRA: which settings can be trained rightly, and putting weights into an adapter; files are read by [`lora_files`]."""

import copy
import math
import re
from dataclasses import MISSING, fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key

from ..backbones.base import Backbone
from ..lora_files import LORA_WEIGHTS_NAME, base_modules, find_lora, read_lora, targeted_modules  # noqa: F401
from .sharding import cut_as


# Fields of a `LoraConfig` that may have any value that `check_lora_config` finds right
ACCEPTED_FIELDS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "lora_bias",
    "init_lora_weights",
    "use_dora",
    "use_bdlora",
    "inference_mode",
    # Bear on nothing here: peft fills them, or reads them elsewhere
    "runtime_config",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
}
# Fields that must keep their default: what another value would do
REFUSED_FIELDS = {
    "bias": "trains biases of the base, which stay changed while the adapter is off, and which no LoRA file holds",
    "modules_to_save": "trains whole modules of the base, which stay changed while the adapter is off, and which no LoRA "
    "file holds",
    "trainable_token_indices": "trains embeddings of the base, which no LoRA file holds",
    "target_parameters": "makes a LoRA whose file `pipeline.load_lora_weights` cannot read",
    "layer_replication": "changes the base itself, so that it is no longer the reference",
    "kasa_config": "takes a part out of the base's weights, so that the base is no longer the reference",
    "loftq_config": "replaces the base's weights by quantised ones, so that the base is no longer the reference",
    "corda_config": "takes a part out of the base's weights, so that the base is no longer the reference",
    "lora_ga_config": "needs gradients before the training, which nobody computes here",
    "eva_config": "needs activations before the training, which nobody computes here",
    "velora_config": "approximates the gradient, and puts more than a LoRA into the file",
    "monteclora_config": "adds random terms to the policy and a loss of its own, which nobody adds here",
    "arrow_config": "routes between several adapters, of which there is one here",
    "alora_invocation_tokens": "switches the adapter off wherever these tokens do not come before, which is everywhere in "
    "an image model: nothing would be trained",
    "use_qalora": "is for models quantised by GPTQ alone, and would change nothing here",
    "qalora_group_size": "is for models quantised by GPTQ alone, and would change nothing here",
    "megatron_config": "is for models of Megatron alone",
    "megatron_core": "is for models of Megatron alone",
    "fan_in_fan_out": "is for layers that hold their weights transposed, and denoisers have none",
    "ensure_weight_tying": "is for language models with tied embeddings, and would change nothing here",
    "task_type": "wraps the model as a language model, whose inputs no denoiser takes",
}
# Ways to initialise a LoRA after which it changes nothing, to the last digit, in half precision too
EXACT_INITS = (True, "gaussian", "mica")
# Further ways that leave the base as it is: right for a LoRA whose weights are then loaded
HARMLESS_INITS = (*EXACT_INITS, False, None, "eva", "orthogonal")


# ----- settings -----


def check_lora_config(
    config: LoraConfig, denoiser: torch.nn.Module, name: str = "`peft_config`", loaded: bool = False
) -> LoraConfig:
    """
    Checks that a LoRA can be trained rightly: switched off, it leaves the base as it was; before training it changes
    nothing; and what is saved is read by `pipeline.load_lora_weights`.

    Args:
        config ([`~peft.LoraConfig`]):
            The settings. Target modules and patterns are compared to the denoiser unless `target_modules` is `None`.
        denoiser (`torch.nn.Module`):
            The denoiser, in the precision that it is trained in, with or without adapters.
        name (`str`, *optional*, defaults to ``"`peft_config`"``):
            What the user calls these settings.
        loaded (`bool`, *optional*, defaults to `False`):
            Whether the weights are loaded afterwards, as an expert's are: how they would be initialised does not matter
            then, as long as that leaves the base alone.

    Returns:
        [`~peft.LoraConfig`]: a copy, whose `init_lora_weights` is `True` where `loaded` is set.

    Raises:
        `ValueError`: If a setting is refused. The message names it, the reason and the way out.
    """
    if type(config) is not LoraConfig:  # `AdaLoraConfig` derives from it
        raise ValueError(
            f"{name} must be a `peft.LoraConfig`, got a `{type(config).__name__}`: other adapters have no file format that "
            "`pipeline.load_lora_weights` reads."
        )
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in ACCEPTED_FIELDS or value == default or (value is None and not default):
            continue
        if loaded and field.name == "eva_config":  # of no effect on weights that are loaded
            continue
        reason = REFUSED_FIELDS.get(field.name, "is a setting that this library does not know")
        raise ValueError(f"{name} has `{field.name}={value!r}`, which {reason}. Leave it at {default!r}.")
    if getattr(config, "_custom_modules", None):
        raise ValueError(
            f"{name} has layers of its own, registered by `_register_custom_module`, which its file does not name."
        )
    _check_numbers(config, name)
    _check_init(config, denoiser, name, loaded)
    config = copy.deepcopy(config)
    if config.target_modules is not None:
        _check_targets(config, denoiser, name, loaded)
    if loaded:
        config.init_lora_weights, config.eva_config = True, None
    return config


def check_lora_on_quantized(config: LoraConfig, backbone: Backbone, name: str = "`peft_config`") -> None:
    """
    Checks that a LoRA can be trained on a base that may be quantised.

    Args:
        config ([`~peft.LoraConfig`]):
            Its settings.
        backbone ([`backbones.base.Backbone`]):
            The backbone, whose denoiser may still have no weights.
        name (`str`, *optional*, defaults to ``"`peft_config`"``):
            What the user calls these settings.

    Raises:
        `ValueError`: If a setting needs weights in full precision.
    """
    how = backbone.quantization.get(backbone.denoiser_name)
    is_mica = str(config.init_lora_weights).lower() == "mica"
    for setting, is_set in (
        ("init_lora_weights", is_mica),
        ("use_dora", config.use_dora),
        ("use_bdlora", config.use_bdlora),
    ):
        if how and is_set:
            raise ValueError(
                f"{name} has `{setting}={getattr(config, setting)!r}`, which needs the base's weights in full, and "
                f"`{backbone.denoiser_name}` is held in {how}. Use a plain LoRA, or load the model without `quantization_config`."
            )


def with_target_modules(config: LoraConfig, default_target_modules: tuple[str, ...]) -> LoraConfig:
    """A copy of the settings, with these target modules if they name none."""
    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig) and config.target_modules is None:
        config.target_modules = list(default_target_modules)
    return config


def check_mixes(config: LoraConfig, name: str) -> None:
    """
    Checks that a LoRA can share a batch with other adapters, as policy and expert of [`ComplexPOTrainer`] do.

    Args:
        config ([`~peft.LoraConfig`]):
            Its settings.
        name (`str`):
            What the user calls it, such as ``"`expert`"``.

    Raises:
        `ValueError`: If it cannot.
    """
    if config.use_dora:
        raise ValueError(
            f"{name} is a DoRA, which cannot share a batch with other adapters. Train it as a plain LoRA."
        )


def _check_numbers(config: LoraConfig, name: str) -> None:
    ranks = {"r": config.r} | {f"rank_pattern[{key!r}]": r for key, r in (config.rank_pattern or {}).items()}
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for setting, r in ranks.items():
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"`{setting}` of {name} must be a whole number of at least 1, got {r!r}.")
    for setting, alpha in alphas.items():
        if not _is_number(alpha) or not 0 < alpha < math.inf:
            raise ValueError(
                f"`{setting}` of {name} must be a positive number, got {alpha!r}: the update is scaled by `lora_alpha / r`, "
                "and without strength nothing is trained."
            )
    dropout = config.lora_dropout
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"`lora_dropout` of {name} must be at least 0 and less than 1, got {dropout!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_init(config: LoraConfig, denoiser: torch.nn.Module, name: str, loaded: bool) -> None:
    init = config.init_lora_weights
    init = init.lower() if isinstance(init, str) else init
    changes_base = isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    if changes_base:
        reason = (
            "which takes a part out of the base's weights: with the adapter off, the base is no longer the reference"
        )
    elif init is False or init is None:
        reason = "which starts from a random update: policy and reference differ before anything is trained"
    elif init == "eva":
        reason = "which needs activations before the training, and nobody computes them here"
    elif init == "orthogonal":
        reason = "whose two halves cancel only up to rounding: in half precision policy and reference differ before anything "
        reason += "is trained"
    else:
        reason = "which this library does not know"
    good = HARMLESS_INITS if loaded else EXACT_INITS
    if not (isinstance(init, str | bool | None) and init in good):
        way_out = (
            "Convert it to a plain LoRA, with `path_initial_model_for_weight_conversion` of peft's `save_pretrained`."
            if loaded and changes_base
            else "Use `True`, the default, or 'gaussian'."
        )
        raise ValueError(f"{name} has `init_lora_weights={init!r}`, {reason}. {way_out}")
    if loaded:
        return
    if config.inference_mode:
        raise ValueError(
            f"{name} has `inference_mode=True`, with which nothing is trained. Leave it at `False`, also for a "
            "configuration that was read from a saved LoRA."
        )
    if config.use_dora and next(denoiser.parameters()).dtype != torch.float32:
        raise ValueError(
            f"{name} has `use_dora=True`, whose magnitudes are computed again in every step, in half precision with so much "
            "rounding that policy and reference differ before anything is trained. Train in float32 (`bf16=False`, "
            "`fp16=False`), or a plain LoRA."
        )


def _check_targets(config: LoraConfig, denoiser: torch.nn.Module, name: str, loaded: bool) -> None:
    """Each name, index and pattern must do something, and each target must be a layer that a LoRA file can describe."""
    kind = type(denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser).__name__
    modules = base_modules(denoiser)
    try:
        targets = targeted_modules(config, modules)
        if not targets:
            raise ValueError(
                f"`target_modules={config.target_modules!r}` of {name} leaves no module of the `{kind}` to train (with "
                f"`exclude_modules={config.exclude_modules!r}`, `layers_to_transform={config.layers_to_transform!r}`, "
                f"`layers_pattern={config.layers_pattern!r}`). Its attention projections are 'to_q', 'to_k', 'to_v' and "
                "'to_out.0'; `named_modules()` lists all names."
            )
        # What a trained LoRA names beyond its modules does no harm: its weights say what it adapts
        idle = [] if loaded else _idle_settings(config, modules, targets)
    except re.error as error:
        raise ValueError(f"{name} has a pattern that is no regular expression: {error}.") from error
    if idle:
        raise ValueError(
            f"{name} has settings that fit no module of the `{kind}`, and would be ignored: {', '.join(idle)}. Correct them, "
            "or take them out; `named_modules()` lists the names."
        )
    for target in targets:
        if not isinstance(modules[target], torch.nn.Linear | torch.nn.Conv2d):
            raise ValueError(
                f"`target_modules` of {name} names {target!r}, a `{type(modules[target]).__name__}`. Only linear and "
                "two-dimensional convolution layers can carry a LoRA here: name such layers."
            )
        if not isinstance(modules[target], torch.nn.Linear):
            for setting, value in (("use_bdlora", config.use_bdlora), ("init_lora_weights", config.init_lora_weights)):
                if (setting == "use_bdlora" and value) or value == "mica":
                    raise ValueError(
                        f"{name} has `{setting}={value!r}`, which is for linear layers alone, and targets {target!r}, a "
                        f"`{type(modules[target]).__name__}`."
                    )


def _idle_settings(config: LoraConfig, modules: dict[str, torch.nn.Module], targets: list[str]) -> list[str]:
    """Entries of lists and patterns that change nothing."""
    idle = []
    unrestricted = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    if not isinstance(config.target_modules, str):
        idle += [
            f"`target_modules` {entry!r}"
            for entry in sorted(config.target_modules)
            if not targeted_modules(config, modules, target_modules=[entry], **unrestricted)
        ]
    excluded = config.exclude_modules
    for entry in [excluded] if isinstance(excluded, str) else sorted(excluded or ()):
        alone = entry if isinstance(excluded, str) else [entry]
        if len(targeted_modules(config, modules, exclude_modules=alone)) == len(
            targeted_modules(config, modules, exclude_modules=None)
        ):
            idle.append(f"`exclude_modules` {entry!r}")
    indices, patterns = config.layers_to_transform, config.layers_pattern
    indices = [indices] if isinstance(indices, int) else indices or []
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    idle += [
        f"`layers_to_transform` {index!r}"
        for index in indices
        if not targeted_modules(config, modules, layers_to_transform=index, exclude_modules=None)
    ]
    idle += [
        f"`layers_pattern` {pattern!r}"
        for pattern in patterns
        if not targeted_modules(config, modules, layers_pattern=pattern, exclude_modules=None)
    ]
    for setting in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, setting) or {}
        used = {get_pattern_key(keys, target) for target in targets}
        idle += [f"`{setting}` {key!r}" for key in keys if key not in used]
    return idle


# ----- what an adapter did to the model -----


def base_checksums(denoiser: torch.nn.Module) -> dict[str, int]:
    """
    A checksum of each weight and buffer of the base: the sum of its bits, read as whole numbers.

    Args:
        denoiser (`torch.nn.Module`):
            The denoiser, with or without adapters.

    Returns:
        `dict[str, int]`: by the names that they have without adapters.
    """
    device = next(denoiser.parameters()).device  # bitsandbytes keeps some of its numbers on the CPU
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {}
    for name, value in denoiser.state_dict().items():
        if not _is_lora_weight(name):
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            integer = value.contiguous().view(integers[value.element_size()])
            sums[name] = integer.sum(dtype=torch.int64).to(device)
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def check_adapters_off(model: PeftModel, before: dict[str, int]) -> None:
    """
    Checks that the base under an adapter is the base that it was added to, so that the reference can be had by switching
    the adapter off.

    Args:
        model ([`~peft.PeftModel`]):
            The model with its adapters.
        before (`dict[str, int]`):
            [`trainer.lora.base_checksums`] of the denoiser before the adapter was added.

    Raises:
        `ValueError`: If a weight of the base was changed, added or taken away.
    """
    after = base_checksums(model)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ValueError(
            f"The adapter changed {len(changed)} tensors of the base, such as {changed[0]!r}: with the adapter off, the model "
            "is no longer the reference. Use a plain LoRA, `LoraConfig(r=..., lora_alpha=...)`."
        )


def check_trainable(model: PeftModel) -> None:
    """
    Checks that what is trained is a LoRA and nothing else.

    Args:
        model ([`~peft.PeftModel`]):
            The model with its adapters.

    Raises:
        `ValueError`: If nothing is trained, or a weight of the base is.
    """
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained:
        raise ValueError("No weight of the LoRA is trained. Use a plain LoRA, `LoraConfig(r=..., lora_alpha=...)`.")
    others = [name.removeprefix("base_model.model.") for name in trained if not _is_lora_weight(name)]
    if others:
        raise ValueError(
            f"{len(others)} weights of the base would be trained beside the LoRA, such as {others[0]!r}: they stay changed "
            "while the adapter is off, and no LoRA file holds them. Use a plain LoRA, `LoraConfig(r=..., lora_alpha=...)`."
        )


def _is_lora_weight(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def load_lora_into(
    model: PeftModel, weights: dict[str, torch.Tensor], name: str, adapter_name: str = "default"
) -> None:
    """
    Puts a LoRA's weights into an adapter, all of them and nothing else.

    Args:
        model ([`~peft.PeftModel`]):
            The model with its adapters.
        weights (`dict[str, torch.Tensor]`):
            The weights, as [`trainer.lora.read_lora`] gives them.
        name (`str`):
            What the user calls the LoRA, such as ``"`expert`"`` or `"The checkpoint out/checkpoint-10"`.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter.

    Raises:
        `ValueError`: If the weights are not those of the adapter by name and shape. Nothing is changed then.
    """
    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    check_fits(own, weights, name)
    set_peft_model_state_dict(model, cut_as(own, weights), adapter_name=adapter_name)


def check_fits(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], name: str) -> None:
    """
    Checks that a LoRA's weights are those of an adapter by name and shape.

    Args:
        own (`dict[str, torch.Tensor]`):
            The adapter's weights.
        weights (`dict[str, torch.Tensor]`):
            The LoRA's weights.
        name (`str`):
            What the user calls the LoRA.

    Raises:
        `ValueError`: If they are not.
    """
    unexpected, missing = weights.keys() - own.keys(), own.keys() - weights.keys()
    reshaped = [key for key in weights.keys() & own.keys() if weights[key].shape != own[key].shape]
    problems = []
    for keys, problem in ((unexpected, "has {} that the model has not"), (missing, "lacks {} that the model has")):
        if keys:
            problems.append(problem.format(f"{len(keys)} tensors, such as {_short(min(keys))}"))
    if reshaped:
        key = min(reshaped)
        problems.append(f"has {_short(key)} of shape {tuple(weights[key].shape)} for {tuple(own[key].shape)}")
    if problems:
        raise ValueError(
            f"{name} does not fit the model: it {' and '.join(problems)}. A LoRA fits the base, the target modules and the "
            "ranks that it was trained with."
        )


def _short(key: str) -> str:
    return repr(key.removeprefix("base_model.model."))
