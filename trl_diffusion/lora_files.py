# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
LoRA files: reading them, converting those of other libraries, and loading them into a pipeline whole or not at all.

diffusers itself loads what fits of a file and logs the rest. Here a file is refused by name where a tensor of it is not used, where a
layer lacks one, or where its strength is not known.
"""

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import Flux2LoraLoaderMixin, Krea2LoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key

from .backbones.folder_checks import check_name
from .backbones.names import LORA_WEIGHTS_NAME
from .lora_headers import check_finite, read_tensors
from .machine import without_secrets
from .messages import cut


logger = logging.getLogger(__name__)

CONVERTED = "converted"
# Names that other libraries, and older versions of diffusers, give to the halves of a LoRA
OTHER_NAMES = (".alpha", ".lora.down.weight", ".lora.up.weight", "_lora.down.weight", "_lora.up.weight")


# ----- reading -----


def find_lora(name_or_path: str | Path, revision: str | None = None) -> Path:
    """
    Finds a LoRA file.

    Args:
        name_or_path (`str` or `Path`):
            A folder with `pytorch_lora_weights.safetensors`, or the Hub id of a repository that has it.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: If there is none.
    """
    check_name(str(name_or_path))
    if Path(name_or_path).is_dir():
        if (Path(name_or_path) / LORA_WEIGHTS_NAME).is_file():
            return Path(name_or_path) / LORA_WEIGHTS_NAME
        raise ValueError(
            f"The folder {name_or_path} holds no LoRA ({LORA_WEIGHTS_NAME}). Pickles (.bin, .pt, .ckpt) are not read, because "
            "they can run code: save it with diffusers."
        )
    if Path(name_or_path).is_file():
        raise ValueError(f"{name_or_path} is a file: name its folder.")
    try:
        return Path(hf_hub_download(str(name_or_path), LORA_WEIGHTS_NAME, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            without_secrets(
                f"{name_or_path} is no folder, and the Hub gave no {LORA_WEIGHTS_NAME} of that name: {cut(str(error), 200)}"
            )
        ) from error


def read_lora(
    name_or_path: str | Path, pipeline: DiffusionPipeline | None = None, denoiser_name: str | None = None
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Reads a denoiser's LoRA and its configuration, which `save_lora_weights` of diffusers writes into the file's header.

    Args:
        name_or_path (`str` or `Path`):
            A folder or a Hub id, see [`lora_files.find_lora`]; with `pipeline`, also a file.
        pipeline ([`~diffusers.DiffusionPipeline`], *optional*):
            Converts the names of other libraries, where the file holds the strength of each layer as a tensor `.alpha`. Without
            a pipeline such files are refused.
        denoiser_name (`str`, *optional*):
            Name of the pipeline's denoiser.

    Returns:
        `tuple[dict[str, torch.Tensor], LoraConfig]`: the weights, by the names that a [`~peft.PeftModel`] gives them, and
        the configuration.

    Raises:
        `ValueError`: If the file adapts more than the denoiser, does not hold its configuration, or holds other weights than
            the configuration says: halves that are missing, other ranks, values that are not finite.
    """
    is_file = pipeline is not None and Path(name_or_path).is_file()
    path = Path(name_or_path) if is_file else find_lora(name_or_path)
    weights, header = read_tensors(path)
    if pipeline is not None and not header and any(key.endswith(".alpha") for key in weights):
        weights, config = _read_converted(path, weights, pipeline, denoiser_name)
    else:
        weights, config = _read_own(path, weights, header)
    _check_weights(weights, config, path)
    return {f"base_model.model.{key}": value for key, value in weights.items()}, config


def _read_own(
    path: Path, weights: dict[str, torch.Tensor], header: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """What `save_lora_weights` of diffusers wrote."""
    denoiser_name, *others = {key.split(".")[0] for key in weights}
    if any(name.startswith("lora_") for name in (denoiser_name, *others)) or any(
        key.endswith(OTHER_NAMES) for key in weights
    ):
        raise ValueError(
            f"The LoRA {path} has the names of another library. Load it into a pipeline and save it with diffusers."
        )
    if others or denoiser_name.startswith("text_encoder"):
        _refuse_text_encoders(path, [denoiser_name, *others])
    if not header:
        raise ValueError(
            f"The LoRA {path} does not hold its configuration, without which its strength is unknown. Save it again with "
            f"`pipeline.save_lora_weights(..., {denoiser_name}_lora_adapter_metadata=config.to_dict())`."
        )
    prefix = f"{denoiser_name}."
    if not header.get(f"{prefix}target_modules"):
        raise ValueError(
            f"The configuration of the LoRA {path} cannot be used: it names no `target_modules`. Save it again."
        )
    try:
        config = LoraConfig(**{key.removeprefix(prefix): value for key, value in header.items()})
    except TypeError as error:
        raise ValueError(
            f"The configuration of the LoRA {path} is of another version of peft: {error}. Update peft."
        ) from error
    except (ImportError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"The configuration of the LoRA {path} cannot be used: {cut(str(error), 200)}") from error
    return {key.removeprefix(prefix): value for key, value in weights.items()}, config


def _read_converted(
    path: Path, weights: dict[str, torch.Tensor], pipeline: DiffusionPipeline, denoiser_name: str
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """What another library wrote, with the configuration that diffusers gives a denoiser for it."""
    check_finite(weights, path)
    parts, alphas = convert_lora(weights, pipeline, path)
    if parts.keys() != {denoiser_name}:
        _refuse_text_encoders(path, parts)
    denoiser = empty_copy(getattr(pipeline, denoiser_name))
    layers = {f"{denoiser_name}.{key}": value for key, value in parts[denoiser_name].items()}
    settings = {"network_alphas": alphas, "adapter_name": CONVERTED, "low_cpu_mem_usage": True}
    with _naming_the_file(path, denoiser):
        denoiser.load_lora_adapter(layers, prefix=denoiser_name, **settings)
    converted = parts[denoiser_name]
    if not any(".lora_A." in key for key in converted):
        converted = convert_unet_state_dict_to_peft(converted)
    return converted, denoiser.peft_config[CONVERTED]


def _refuse_text_encoders(path: Path, components: Iterable[str]) -> NoReturn:
    raise ValueError(
        f"The LoRA {path} adapts more than a denoiser: {', '.join(sorted(components))}. Text encoders are not trained here, so that "
        "their part would be lost. Name a LoRA of the denoiser alone."
    )


def _check_weights(weights: dict[str, torch.Tensor], config: LoraConfig, path: Path) -> None:
    """The weights are whole, finite, and of the ranks that the configuration gives them."""
    extra = {"lora_B.bias"} if config.lora_bias else set()
    extra |= {"lora_magnitude_vector", "lora_magnitude_vector.weight"} if config.use_dora else set()
    halves: dict[str, set[str]] = {}
    for key in weights:
        module, _, half = key.rpartition(".lora_")
        half = f"lora_{half}"
        if not module or half not in {"lora_A.weight", "lora_B.weight", *extra}:
            raise ValueError(
                f"The LoRA {path} holds {key!r}, which a LoRA of its configuration has not. Load it into a pipeline and save "
                "it with diffusers, or train it as a plain LoRA."
            )
        halves.setdefault(module, set()).add(half)
    check_finite(weights, path)
    for module, found in halves.items():
        if missing := sorted({"lora_A.weight", "lora_B.weight"} - found):
            raise ValueError(f"The LoRA {path} is not whole: of {module!r} it lacks {missing[0]!r}. Save it again.")
        if any(weights[f"{module}.{half}"].ndim < 2 for half in ("lora_A.weight", "lora_B.weight")):
            raise ValueError(f"The LoRA {path} holds no matrices at {module!r}. Save it again.")
        r = (config.rank_pattern or {}).get(get_pattern_key(config.rank_pattern or {}, module), config.r)
        ranks = {weights[f"{module}.lora_A.weight"].shape[0]}
        if not config.use_bdlora:  # whose blocks have a share of the rank each
            ranks.add(weights[f"{module}.lora_B.weight"].shape[1])
        if ranks != {r}:
            raise ValueError(
                f"The LoRA {path} has the rank {', '.join(map(str, sorted(ranks)))} at {module!r}, and {r} in its "
                "configuration, so that its strength is unknown. Save it again with the configuration that it was trained "
                "with."
            )


# ----- converting and loading -----


def convert_lora(
    weights: dict[str, torch.Tensor], pipeline: DiffusionPipeline, path: Path
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """
    Converts the names of other libraries, by the converters of diffusers; diffusers' own names stay.

    Args:
        weights (`dict[str, torch.Tensor]`):
            The tensors of a LoRA file.
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline that the LoRA is for.
        path (`Path`):
            The file, for messages.

    Returns:
        `tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]`: the tensors of each component by their names in it, and
        the alphas by their names in diffusers, of the layers that have one.

    Raises:
        `ValueError`: If a tensor would not be used, or some layers have an alpha and others have none.
    """
    modules = {key.rpartition(".lora_")[0] for key in weights if key.endswith((".lora_down.weight", ".lora_A.weight"))}
    without = sorted(module for module in modules if f"{module}.alpha" not in weights)
    if without and len(without) < len(modules):
        raise ValueError(
            f"The LoRA {path} holds an `.alpha` for some of its layers and not for {without[0]!r}, whose strength is unknown."
        )
    if isinstance(pipeline, Krea2LoraLoaderMixin) and any(key.endswith(".alpha") for key in weights):
        raise ValueError(
            f"The LoRA {path} holds the strength of its layers as `.alpha`, which diffusers does not read for a "
            f"`{type(pipeline).__name__}`. Save it without, with `alpha / rank` multiplied into its `lora_B`."
        )
    # As `load_lora_weights` of each pipeline does
    settings = {"unet_config": pipeline.unet.config} if isinstance(pipeline, StableDiffusionXLPipeline) else {}
    try:
        converted, *alphas, _ = pipeline.lora_state_dict(
            dict(weights), return_alphas=True, return_lora_metadata=True, **settings
        )
    except Exception as error:  # the converters raise whatever comes where a name is another than they think
        raise ValueError(
            f"The LoRA {path} has names that diffusers does not convert for a `{type(pipeline).__name__}`: {cut(str(error), 200)}"
        ) from error
    tensors = [key for key in weights if not key.endswith(".alpha")]
    if (lost := sum(_num_parts(key, pipeline) for key in tensors) - len(converted)) > 0:
        odd = next((key for key in tensors if ".lora" not in key and "_lora" not in key), tensors[0])
        raise ValueError(
            f"The LoRA {path} holds {lost} tensors that diffusers leaves out for a `{type(pipeline).__name__}`, such as {odd!r}, so "
            "that only a part of it would be used. Name a plain LoRA."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in converted.items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = value
    loadable = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]
    if others := sorted(parts.keys() - set(loadable)):
        example = next(key for key in converted if key.partition(".")[0] == others[0])
        raise ValueError(
            f"The LoRA {path} is not for a `{type(pipeline).__name__}`, whose LoRAs adapt {', '.join(loadable)}: it holds {example!r}. "
            "Name the base that it was trained on."
        )
    found = (alphas[0] if alphas else None) or {}
    return parts, {_layer_of(key): float(alpha) for key, alpha in found.items()}


def _layer_of(key: str) -> str:
    """The layer that an alpha belongs to. diffusers leaves the name of a tensor in those of attention, and then applies them nowhere."""
    name = key.removesuffix(".alpha")
    if name.startswith("unet.") and name.endswith(".weight"):
        name = next(iter(convert_unet_state_dict_to_peft({name: None}))).removesuffix(".lora_A.weight")
    return f"{name}.alpha"


def _num_parts(key: str, pipeline: DiffusionPipeline) -> int:
    """How many tensors of diffusers one tensor of a file becomes: in the own layouts of FLUX, several projections are one."""
    if key.startswith(("unet.", "transformer.", "text_encoder")):
        return 1
    # Of FLUX.2 diffusers has `linear1` in one layer
    is_split = "linear1" in key and not isinstance(pipeline, Flux2LoraLoaderMixin)
    return 3 if "qkv" in key and "to_qkv" not in key else 4 if is_split else 1


def load_lora(pipeline: DiffusionPipeline, path: Path, adapter_name: str) -> None:
    """
    Loads a LoRA into a pipeline, as `load_lora_weights` does, and checks that all of it arrived.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, changed in place.
        path (`Path`):
            The file, of diffusers or of a library whose names diffusers converts.
        adapter_name (`str`):
            Name of the adapter.

    Raises:
        `ValueError`: If the LoRA is for another model, if a tensor of it is not used, or one that its layers need is missing, not
            finite, or of another rank.
    """
    weights, header = read_tensors(path)
    check_finite(weights, path)
    parts, alphas = convert_lora(weights, pipeline, path)
    if not header and not any(key.endswith(".alpha") for key in weights):
        logger.warning(
            f"The LoRA {path} says nothing of its strength, so that alpha is taken to be the rank, as diffusers does. If it was "
            "trained with another alpha, its images are not those of the training."
        )
    with _naming_the_file(path, pipeline):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter_name)
    for component, expected in parts.items():
        settings = {
            key.removeprefix(f"{component}."): value
            for key, value in header.items()
            if key.startswith(f"{component}.")
        }
        module = getattr(pipeline, component)
        # The new layers too, which diffusers leaves in training, where a LoRA's dropout acts
        module.train(module.training)
        _check_arrived(module, adapter_name, expected, settings, f"The LoRA {path}")
        if component in ("unet", "transformer"):
            _set_alphas(module, adapter_name, {k.removeprefix(f"{component}."): alpha for k, alpha in alphas.items()})


def _set_alphas(module: torch.nn.Module, adapter_name: str, alphas: dict[str, float]) -> None:
    """Gives each layer the strength that the file says, which diffusers loses where layers differ."""
    for name, layer in module.named_modules():
        alpha = alphas.get(f"{name}.alpha")
        if alpha is not None and layer.lora_alpha[adapter_name] != alpha:
            layer.lora_alpha[adapter_name] = alpha
            layer.set_scale(adapter_name, 1.0)


@contextmanager
def _naming_the_file(path: Path, model: DiffusionPipeline | torch.nn.Module) -> Iterator[None]:
    """Turns what diffusers and peft raise of a LoRA that does not fit into an error that names its file."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The LoRA {path} does not fit this `{type(model).__name__}`: {cut(str(error), 200)} Name the base that it was trained on."
        ) from error


def _check_arrived(
    module: torch.nn.Module, adapter_name: str, expected: dict[str, torch.Tensor], settings: dict[str, Any], name: str
) -> None:
    """Every tensor of a component is in its layers, each layer has all of its tensors, and their strength is a number."""
    kind = type(module).__name__
    arrived = get_peft_model_state_dict(module, adapter_name=adapter_name)
    missing = [key for key, value in arrived.items() if value.is_meta]
    shapes = [tuple(value.shape) for value in arrived.values() if not value.is_meta]
    unused = Counter(tuple(value.shape) for value in expected.values()) - Counter(shapes)
    problems = []
    if unused:
        example = next((key for key in expected if ".lora_" in key and key not in arrived), None)
        problems.append(
            f"{unused.total()} of its {len(expected)} tensors belong to no layer of the `{kind}`"
            + (f", such as {example!r}" if example else "")
        )
    if settings:
        targets = targeted_modules(LoraConfig(**settings), base_modules(module))
        missing += [f"{target}.lora_A.weight" for target in targets if f"{target}.lora_A.weight" not in arrived]
    if missing:
        problems.append(f"it lacks {len(missing)} tensors of the `{kind}`'s layers, such as {missing[0]!r}")
    for layer_name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A and not problems:
            scale, rank = float(layer.scaling[adapter_name]), layer.lora_A[adapter_name].weight.shape[0]
            if rank != layer.r[adapter_name]:
                problems.append(f"it has the rank {rank} at {layer_name!r}, and {layer.r[adapter_name]} in its header")
            elif not math.isfinite(scale) or scale == 0:
                problems.append(f"its strength at {layer_name!r} is {scale}")
    if problems:
        raise ValueError(
            f"{name} does not fit: {' and '.join(problems)}. Name the base that it was trained on, or save it again."
        )


# ----- modules -----


def empty_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A model of diffusers with the same configuration, without weights."""
    with init_empty_weights():
        return type(module).from_config(module.config)


def base_modules(denoiser: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of the base, by the names that they have without adapters."""
    base = denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser
    return {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in base.named_modules()
        if name and not any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))
    }


def targeted_modules(config: LoraConfig, modules: dict[str, torch.nn.Module], **changed) -> list[str]:
    """Names of the modules that peft would give an adapter under these settings, some of them changed."""
    config = copy.copy(config)
    for setting, value in changed.items():
        setattr(config, setting, value)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    return [name for name in modules if check_target_module_exists(config, name)] if config.target_modules else []
