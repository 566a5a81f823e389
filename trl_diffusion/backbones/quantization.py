# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Frozen models whose linear layers are held in 4 or 8 bits by bitsandbytes (QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339).

diffusers and transformers quantise a component while they load it. This file reads what is asked of them, refuses what cannot be
trained on, and says what a loaded module is.
"""

from importlib.util import find_spec
from typing import Any

import diffusers
import torch
import transformers
from diffusers import PipelineQuantizationConfig

from .dtypes import as_dtype


SETTING = "`quantization_config` in `model_init_kwargs`"
BACKENDS = ("bitsandbytes_4bit", "bitsandbytes_8bit")
BITS = {"Params4bit": 4, "Int8Params": 8}  # by the class of a weight
LAYERS = {"Linear4bit": torch.uint8, "Linear8bitLt": torch.int8}  # what a quantised layer holds its weight in
# What a component is quantised with: each setting of bitsandbytes with its default
SETTINGS: dict[str, Any] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": None,  # that of the component
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
}
# What may stand beside these with this value alone, and what another one would do
FIXED = {
    "bnb_4bit_quant_storage": (
        ("uint8", torch.uint8, None),
        "stores packed weights as floating point numbers, which casts would change",
    ),
    "llm_int8_has_fp16_weight": ((False,), "holds the weights in float16, which saves no memory"),
    "llm_int8_enable_fp32_cpu_offload": ((False,), "spreads the model over devices, and training moves it itself"),
    "quant_method": (("bitsandbytes",), "is another backend"),
}


def read_quantization(value: Any, denoiser_name: str, encoder_names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """
    Reads which components are quantised, and how.

    Args:
        value ([`~diffusers.PipelineQuantizationConfig`] or `dict`):
            What the user gives: an object of diffusers, or its arguments by name, as YAML and JSON hold them. Components that are not
            named are the denoiser alone.
        denoiser_name (`str`):
            Name of the denoiser.
        encoder_names (`tuple[str, ...]`):
            Names of the text encoders.

    Returns:
        `dict[str, dict[str, Any]]`: settings of bitsandbytes by the name of the component.

    Raises:
        `ValueError`: If it is no such configuration, or asks for what cannot be trained on.
    """
    given = as_arguments(value)
    if unknown := given.keys() - {"quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping"}:
        raise ValueError(
            f"{SETTING} has {', '.join(map(repr, sorted(unknown)))}. It takes the arguments of diffusers' "
            "`PipelineQuantizationConfig`, such as `{'quant_backend': 'bitsandbytes_4bit', 'quant_kwargs': {'load_in_4bit': True}}`."
        )
    mapping, backend = given.get("quant_mapping"), given.get("quant_backend")
    if (mapping is None) == (backend is None):
        raise ValueError(f"{SETTING} needs `quant_backend`, or else `quant_mapping`.")
    if mapping is None:
        if backend not in BACKENDS:
            raise ValueError(
                f"{SETTING} has `quant_backend={backend!r}`. Frozen weights are quantised by bitsandbytes here: pass "
                f"{' or '.join(map(repr, BACKENDS))}."
            )
        settings = {f"load_in_{backend[-4:]}": True} | (given.get("quant_kwargs") or {})
        names = given.get("components_to_quantize") or [denoiser_name]
        mapping = dict.fromkeys([names] if isinstance(names, str) else names, settings)
    known = denoiser_name, *encoder_names
    for name in mapping:
        if name not in known:
            reason = "its latents are what is trained on, and it is small" if name == "vae" else "it is none of these"
            raise ValueError(
                f"{SETTING} names `{name}`. What can be quantised is {', '.join(f'`{each}`' for each in known)}; {reason}."
            )
    return {name: _read_settings(config, name) for name, config in mapping.items()}


def as_arguments(value: Any) -> dict[str, Any]:
    """
    A configuration as the arguments that it was made of.

    Args:
        value ([`~diffusers.PipelineQuantizationConfig`] or `dict`):
            The configuration.

    Returns:
        `dict[str, Any]`: what YAML and JSON can hold, where it was of bitsandbytes.

    Raises:
        `ValueError`: If it is neither.
    """
    if isinstance(value, PipelineQuantizationConfig):
        names = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
        value = {name: getattr(value, name) for name in names if getattr(value, name)}
    if not isinstance(value, dict):
        raise ValueError(
            f"{SETTING} is a `{type(value).__name__}`. Pass a `diffusers.PipelineQuantizationConfig` or its arguments as a `dict`; "
            "`quant_mapping` in it takes the configurations of single components."
        )
    if value.get("quant_mapping"):
        mapping = {name: _as_dict(config, name) for name, config in value["quant_mapping"].items()}
        value = value | {"quant_mapping": mapping}
    return value


def _as_dict(config: Any, name: str) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    if not isinstance(config, diffusers.BitsAndBytesConfig | transformers.BitsAndBytesConfig):
        raise ValueError(
            f"{SETTING} quantises `{name}` by a `{type(config).__name__}`. Frozen weights are quantised by bitsandbytes here: pass a "
            "`BitsAndBytesConfig`."
        )
    settings = config.to_dict()
    if settings["bnb_4bit_compute_dtype"] == "float32":  # its default, which is slow in half precision
        del settings["bnb_4bit_compute_dtype"]
    if not settings["load_in_4bit"]:
        settings = {key: value for key, value in settings.items() if not key.startswith("bnb_4bit")}
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def _read_settings(given: dict[str, Any], name: str) -> dict[str, Any]:
    where = f"{SETTING} for `{name}`"
    for key, (values, reason) in FIXED.items():
        if given.get(key, values[0]) not in values:
            raise ValueError(f"{where} has `{key}={given[key]!r}`, which {reason}. Leave it out.")
    if unknown := given.keys() - SETTINGS.keys() - FIXED.keys():
        raise ValueError(
            f"{where} has {', '.join(map(repr, sorted(unknown)))}, which bitsandbytes does not know. It takes "
            f"{', '.join(SETTINGS)}."
        )
    settings = SETTINGS | {key: value for key, value in given.items() if key in SETTINGS}
    if bool(settings["load_in_4bit"]) == bool(settings["load_in_8bit"]):
        both = "both `load_in_4bit` and `load_in_8bit`" if settings["load_in_4bit"] else "no `load_in_4bit=True`"
        raise ValueError(f"{where} has {both}: a weight has 4 bits or 8. Set one of the two.")
    if settings["bnb_4bit_quant_type"] not in ("nf4", "fp4"):
        raise ValueError(f"{where} has `bnb_4bit_quant_type={settings['bnb_4bit_quant_type']!r}`. Use 'nf4' or 'fp4'.")
    if settings["bnb_4bit_compute_dtype"] is not None:
        dtype = as_dtype(settings["bnb_4bit_compute_dtype"], f"`bnb_4bit_compute_dtype` of {where}")
        settings["bnb_4bit_compute_dtype"] = dtype
    return settings


def check_environment(what: str) -> None:
    """
    Refuses what diffusers could not load, before it does anything.

    Args:
        what (`str`):
            What is quantised, for the message.

    Raises:
        `ValueError`: If bitsandbytes is not installed, or there is no GPU.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{what} needs bitsandbytes: `pip install 'trl-diffusion[quantization]'`, or load it in full."
        )
    if not has_gpu():
        raise ValueError(f"{what} needs a GPU, on which diffusers quantises, and there is none. Load it in full.")


def has_gpu() -> bool:
    """Whether there is a device that diffusers quantises on."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def make_config(
    quantization: dict[str, dict[str, Any]], libraries: dict[str, str], dtypes: dict[str, torch.dtype]
) -> PipelineQuantizationConfig:
    """
    Makes what diffusers loads components by.

    Args:
        quantization (`dict[str, dict[str, Any]]`):
            Settings by component, at least one, see [`backbones.quantization.read_quantization`].
        libraries (`dict[str, str]`):
            The library of each component, `"diffusers"` or `"transformers"`, each of which has its own class.
        dtypes (`dict[str, torch.dtype]`):
            The precision of each component's other weights, which a layer of 4 bits computes in where the settings name none.

    Returns:
        [`~diffusers.PipelineQuantizationConfig`]: a new one, because diffusers writes into it.
    """
    configs = {}
    for name, settings in quantization.items():
        skipped = settings["llm_int8_skip_modules"]
        settings = settings | {
            "bnb_4bit_compute_dtype": settings["bnb_4bit_compute_dtype"] or dtypes[name],
            "llm_int8_skip_modules": None if skipped is None else list(skipped),
        }
        library = diffusers if libraries[name] == "diffusers" else transformers
        configs[name] = library.BitsAndBytesConfig(**settings)
    return PipelineQuantizationConfig(quant_mapping=configs)


def quantized_layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """
    The layers of bitsandbytes in a module, which hold quantised weights.

    Args:
        module (`torch.nn.Module`):
            A model, with or without adapters.

    Returns:
        `dict[str, torch.nn.Module]`: by name.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer).__name__ in LAYERS
        and "weight"
        in dict(layer.named_parameters(recurse=False))  # peft's own layers of these names hold a base layer
        and layer.weight.dtype == LAYERS[type(layer).__name__]
    }


def describe_quantization(module: torch.nn.Module) -> str | None:
    """
    Says how a module is quantised.

    Args:
        module (`torch.nn.Module`):
            A model, with or without adapters.

    Returns:
        `str` or `None`: such as `"4 bits (nf4, nested) in 504 layers"`; `None` where it is not.
    """
    kinds: dict[str, int] = {}
    for layer in quantized_layers(module).values():
        kind = "8 bits"
        if BITS[type(layer.weight).__name__] == 4:
            state = layer.weight.quant_state
            kind = f"4 bits ({state.quant_type}{', nested' if state.nested else ''})"
        kinds[kind] = kinds.get(kind, 0) + 1
    return " and ".join(f"{kind} in {number} layers" for kind, number in sorted(kinds.items())) or None


def describe_settings(settings: dict[str, Any]) -> str:
    """How a component will be quantised: what is known before it is loaded."""
    if settings["load_in_8bit"]:
        return "8 bits"
    return f"4 bits ({settings['bnb_4bit_quant_type']}{', nested' if settings['bnb_4bit_use_double_quant'] else ''})"


@torch.no_grad()
def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """
    The weight of a quantised layer as it computes with it.

    Args:
        layer (`torch.nn.Module`):
            A layer of [`backbones.quantization.quantized_layers`].

    Returns:
        `torch.Tensor` of shape `(out_features, in_features)`
    """
    import bitsandbytes.functional as functional

    weight = layer.weight
    if BITS[type(weight).__name__] == 4:
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB  # where the first forward puts them
    return functional.int8_vectorwise_dequant(weight.data, scales)


def compute_as_autocast(module: torch.nn.Module) -> None:
    """
    Has the quantised layers of a module take part in mixed precision. By themselves they give back the type that they are given, so that
    behind a normalisation, which autocast computes in float32, all activations would be float32.

    Args:
        module (`torch.nn.Module`):
            The module, with or without adapters.
    """
    for layer in quantized_layers(module).values():
        if _cast_input not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_cast_input)


def _cast_input(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    kind = args[0].device.type
    return (args[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else None
