# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Whether the weights of a pipeline's folder are those of its models. diffusers and transformers only warn of weights that are missing,
which are then random, and of weights that belong to nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from ..messages import cut
from .quantization import quantized_layers


# Names that a text encoder has twice, with and without, as its version of transformers has it; of the last no prompt is encoded
PREFIX = "text_model."
NO_MATTER = ("position_ids", "encoder.embed_tokens.weight", "shared.weight", "lm_head.weight")
# Other parts of the models that text encoders are taken from
# What a layer of bitsandbytes saves beside its weight
SCALES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
QUANTIZED_PARTS = (*SCALES, ".weight_format", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
OTHER_TOWERS = ("vision_model.", "visual_projection.", "logit_scale", "decoder.", "lm_head.")


def load_checked(
    folder: str, dtype: torch.dtype | dict[str, torch.dtype], kwargs: dict[str, Any]
) -> DiffusionPipeline:
    """
    Loads a pipeline, and refuses weights that are not its own, see [`check_files`].

    Args:
        folder (`str`):
            The folder that holds it.
        dtype (`torch.dtype` or `dict[str, torch.dtype]`):
            Precision of all components, or of each by its name.
        kwargs (`dict`):
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`].

    Returns:
        [`~diffusers.DiffusionPipeline`]

    Raises:
        `ValueError`: If it cannot be loaded, or weights do not fit.
    """
    with naming_the_folder(folder):
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **kwargs)
    check_files(pipeline, folder, kwargs, pipeline.components.keys() - kwargs.keys())
    return pipeline


@contextmanager
def naming_the_folder(folder: str) -> Iterator[None]:
    """Turns whatever diffusers, transformers and tokenizers raise of a folder into an error that names it."""
    try:
        yield
    except Exception as error:
        variants = {file.name.split(".")[1] for file in Path(folder).glob("*/*.*.safetensors")}
        hint = (
            f" Its files are of the variant {', '.join(sorted(variants))}: pass it as `variant`." if variants else ""
        )
        raise ValueError(
            f"The pipeline in {folder} cannot be loaded: {reason_of(error).removesuffix('.')}.{hint}"
        ) from error


def reason_of(error: Exception) -> str:
    """Why diffusers could not load something, on one line, without its advice, which does not help here."""
    return cut(str(error).split(". If you")[0], 500) or type(error).__name__


def check_files(pipeline: DiffusionPipeline, folder: str, kwargs: dict[str, Any], names: Iterable[str]) -> None:
    """
    Refuses components with weights that their files do not have, and files with weights that are not the component's.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The loaded pipeline.
        folder (`str`):
            The folder that it was loaded from.
        kwargs (`dict`):
            What it was loaded with, such as `variant`.
        names (`Iterable[str]`):
            Names of the components that were loaded from there.

    Raises:
        `ValueError`: If some do not fit.
    """
    settings = {key: kwargs[key] for key in ("variant", "use_safetensors") if key in kwargs}
    for name in names:
        module, path = getattr(pipeline, name), Path(folder) / name
        if not isinstance(module, torch.nn.Module) or not path.is_dir():
            continue
        if _plain(module.state_dict()) != _names_in_files(path, settings.get("variant")):
            # Perhaps only older names, which the library knows: it is asked itself, by loading this component alone
            with naming_the_folder(folder):
                _, info = type(module).from_pretrained(path, output_loading_info=True, **settings)
            check_loading_info(info, f"`{name}` in {folder}")


def check_loading_info(info: dict[str, Any], what: str) -> None:
    """
    Refuses a model that was loaded from weights that are not its own.

    Args:
        info (`dict`):
            What `from_pretrained` returns with `output_loading_info=True`.
        what (`str`):
            The model, for the message.

    Raises:
        `ValueError`: If weights are missing, or others are there.
    """
    missing = sorted(info.get("missing_keys", ()))
    extra = sorted(key for key in info.get("unexpected_keys", ()) if not key.startswith(OTHER_TOWERS))
    problems = [
        f"{text}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for keys, text in ((missing, "missing, and otherwise random"), (extra, "of no part of the model"))
        if keys
    ]
    if problems:
        raise ValueError(
            f"{what} has other weights than its files hold ({'; '.join(problems)}). Save the model again, or download it again."
        )


def check_finite(name: str, module: torch.nn.Module) -> None:
    """
    Refuses weights that are no numbers.

    Args:
        name (`str`):
            What the user calls the model.
        module (`torch.nn.Module`):
            The model. Weights that are not loaded yet do not count.

    Raises:
        `ValueError`: If a weight is NaN or infinite, with its name.
    """
    for key, weight in module.named_parameters():
        _check_finite(name, key, weight.detach())
    if quantized_layers(module):
        for key, scales in module.state_dict().items():
            if key.endswith(SCALES):
                _check_finite(name, key, scales)


def check_finite_files(name: str, path: Path, variant: str | None) -> None:
    """
    Refuses files with weights that are no numbers, which quantising may turn into some.

    Args:
        name (`str`):
            What the user calls the model.
        path (`Path`):
            The folder of the component.
        variant (`str`, *optional*):
            The variant of the weight files.

    Raises:
        `ValueError`: If a weight is NaN or infinite, with its name.
    """
    for file in _weight_files(path, variant):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():
                _check_finite(name, key, weights.get_tensor(key))


def _check_finite(name: str, key: str, weight: torch.Tensor) -> None:
    if weight.is_floating_point() and weight.itemsize > 1 and weight.numel() and not weight.is_meta:
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(
                f"`{name}` has weights that are not finite, such as {key}. The model was saved after a training that diverged, or "
                "the file is damaged: take an earlier checkpoint, or download it again."
            )


def _plain(names: Iterable[str]) -> set[str]:
    return {name.removeprefix(PREFIX) for name in names if not name.endswith((*NO_MATTER, *QUANTIZED_PARTS))}


def _names_in_files(path: Path, variant: str | None) -> set[str]:
    """Names of the weights in a component's .safetensors files: of those of a variant, if there are any."""
    names: set[str] = set()
    for file in _weight_files(path, variant):
        with safe_open(file, "pt") as weights:
            names |= _plain(weights.keys())
    return names


def _weight_files(path: Path, variant: str | None) -> list[Path]:
    files = list(path.glob("*.safetensors"))
    of_variant = [file for file in files if f".{variant}" in file.name]
    return (variant and of_variant) or [file for file in files if file.name.count(".") == 1]
