# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Numbers and hashes by which models are told apart."""

import hashlib
import json
from collections.abc import Iterable

import torch
import xxhash
from accelerate.utils import extract_model_from_parallel
from datasets.fingerprint import Hasher
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from ..backbones.checks import plain_tokenizer
from ..backbones.quantization import dequantized, quantized_layers
from .sharding import whole


NO_MATTER = {"transformers_version", "architectures", "dtype", "torch_dtype"}  # in configurations
NUM_WEIGHTS = 64


def base_fingerprint(denoiser: torch.nn.Module) -> list[float]:
    """
    Some numbers by which to tell one set of base weights from another, whatever precision they are held in; quantised ones count as
    what a layer computes with.

    Args:
        denoiser (`torch.nn.Module`):
            The base, with or without adapters.

    Returns:
        `list[float]`: single weights from tensors spread over the model.
    """
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(denoiser).items()}
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): (name, weight)
        for name, weight in denoiser.named_parameters()
        if "lora_" not in name and weight.ndim > 1
    }
    names = sorted(weights)
    names = names[:: max(1, len(names) // NUM_WEIGHTS)]
    picked = []
    for name, weight in (weights[name] for name in names):
        weight = dequantized(layers[name]) if name in layers else weight.detach()
        picked.append(weight.flatten()[weight.numel() // 2].float())
    picked = torch.stack(picked)
    return [float(f"{value:.5g}") for value in picked.tolist()]


def same_base(before: Iterable[float], now: Iterable[float], tolerance: float = 0.01) -> bool:
    """
    Tells whether two fingerprints are of the same weights, perhaps in another precision.

    Args:
        before (`Iterable[float]`):
            [`trainer.fingerprints.base_fingerprint`] of the one.
        now (`Iterable[float]`):
            The same of the other.
        tolerance (`float`, *optional*, defaults to `0.01`):
            The largest relative difference of a weight. Half precision changes a weight by 0.4 % at most, a conversion
            between its kinds by as much again.

    Returns:
        `bool`: whether at most a tenth of the weights differ by more.
    """
    a, b = torch.tensor(list(before)), torch.tensor(list(now))
    return a.shape == b.shape and not ((a - b).abs() > tolerance * b.abs() + 1e-6).float().mean() > 0.1


def same_quantized_base(before: Iterable[float], now: Iterable[float]) -> bool:
    """
    Tells whether two fingerprints are of the same weights, of which at least one is quantised.

    Args:
        before (`Iterable[float]`):
            [`trainer.fingerprints.base_fingerprint`] of the one.
        now (`Iterable[float]`):
            The same of the other.

    Returns:
        `bool`: whether they differ by less than half of their size. 4 bits change weights by a tenth of it, other weights are at a
        distance of 1.4 times their size.
    """
    a, b = torch.tensor(list(before)), torch.tensor(list(now))
    return a.shape == b.shape and bool((a - b).norm() <= 0.5 * b.norm())


def module_fingerprint(module: torch.nn.Module) -> str:
    """
    A hash by which models are told apart: of their configuration, of the names, types, shapes and all elements of their tensors, and of
    the tiles of a VAE that encodes in tiles. Adapters of peft do not count, nor does where the model was loaded from.

    Args:
        module (`torch.nn.Module`):
            A model of diffusers or transformers, or of peft on top of one.

    Returns:
        `str`
    """
    module = extract_model_from_parallel(module, keep_torch_compile=False)
    config = module.get_base_model().config if isinstance(module, PeftModel) else module.config
    config = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    config = {name: value for name, value in config.items() if not name.startswith("_") and name not in NO_MATTER}
    if vars(module).get("use_tiling"):
        config["tiling"] = {name: value for name, value in vars(module).items() if name.startswith("tile_")}
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in module.state_dict().items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "lora_" not in name:
            digest.update(repr((name, str(weight.dtype), tuple(weight.shape))).encode())
            content = whole(weight.detach()).cpu().contiguous()
            digest.update(content.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """
    A hash of what a tokenizer makes of texts, whatever it was last asked for.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The tokenizer, or what has it.

    Returns:
        `str`
    """
    template, tokenizer = tokenizer.chat_template, plain_tokenizer(tokenizer)
    limits = tokenizer.model_max_length, tokenizer.pad_token_id
    if template is not None:
        limits = *limits, template, tokenizer.padding_side
    if not tokenizer.is_fast:
        return Hasher.hash((tokenizer, limits))
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("truncation"), rules.pop("padding")  # those of the last call
    return Hasher.hash((json.dumps(rules, sort_keys=True), limits))


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
