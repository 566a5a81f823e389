# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Sampling settings of a comparison: those of a paper, with unknown ones marked, or the user's own."""

import math
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import yaml

from ..messages import cut, shown
from ..yaml_files import compose, construct


@dataclass(frozen=True)
class Protocol:
    """
    Sampling settings.

    Args:
        name (`str`, *optional*, defaults to `"own"`):
            Name of the protocol, followed by the changed settings, if any.
        num_inference_steps (`int`, *optional*, defaults to `50`):
            Sampling steps.
        guidance_scale (`float`, *optional*):
            Scale of classifier-free guidance; for FLUX.1 dev, the scale that the transformer is told. Defaults to the pipeline's.
        scheduler (`str`, *optional*):
            Class name of a scheduler in diffusers, such as `"DDIMScheduler"`. Defaults to the pipeline's own.
        height (`int`, *optional*):
            Height in pixels. Defaults to the pipeline's.
        width (`int`, *optional*):
            Width in pixels. Defaults to the pipeline's.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Number of images per prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.
        max_sequence_length (`int`, *optional*):
            Number of tokens that are read of a prompt. Defaults to the pipeline's. Pipelines with CLIP alone take none.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance of FLUX.1 and Qwen-Image, with an empty negative prompt. Defaults to none for
            FLUX.1, and to the pipeline's for Qwen-Image. Other pipelines take
            `guidance_scale` for it.
        unknown (`tuple[str, ...]`, *optional*):
            Settings that no public source of the paper confirms. Their values are this project's choice.
        source (`str`, *optional*):
            Source of the settings.

    Raises:
        `ValueError`: If a setting is not valid.
    """

    name: str = "own"
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    seed: int = 0
    max_sequence_length: int | None = None
    true_cfg_scale: float | None = None
    unknown: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self):
        for name in ("num_inference_steps", "height", "width", "images_per_prompt", "max_sequence_length"):
            value = getattr(self, name)
            if value is None and name in ("height", "width", "max_sequence_length"):
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` of the protocol must be a whole number of at least 1, got {shown(value)}.")
        if type(self.seed) is not int:
            raise ValueError(f"`seed` of the protocol must be a whole number, got {shown(self.seed)}.")
        for name in ("guidance_scale", "true_cfg_scale"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
                raise ValueError(f"`{name}` of the protocol must be a number, got {shown(value)}.")
        if self.scheduler is not None and not is_scheduler(self.scheduler):
            raise ValueError(
                "`scheduler` of the protocol must be a scheduler of diffusers, such as 'DDIMScheduler', got "
                f"{shown(self.scheduler)}."
            )
        for name in ("name", "source"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` of the protocol must be a text, got {shown(getattr(self, name))}.")
        if not isinstance(self.unknown, tuple | list):
            raise ValueError(f"`unknown` of the protocol must be a list of settings, got {shown(self.unknown)}.")
        if strange := [name for name in self.unknown if name not in SETTINGS]:
            raise ValueError(
                f"`unknown` of the protocol lists {', '.join(cut(str(name), 100) for name in strange[:5])}; the settings are "
                f"{', '.join(SETTINGS)}."
            )

    def describe(self) -> dict[str, Any]:
        """All fields by name; settings that only some pipelines take are left out where they are not set."""
        return {
            name: value for name, value in asdict(self).items() if value is not None or name not in OF_SOME_PIPELINES
        }


OF_SOME_PIPELINES = ("max_sequence_length", "true_cfg_scale")
SETTINGS = tuple(field.name for field in fields(Protocol) if field.name not in ("name", "unknown", "source"))


def is_scheduler(name: str) -> bool:
    scheduler = getattr(diffusers, str(name), None)
    return isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)


def load_protocol(
    name_or_path: str | Path | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    height: int | None = None,
    width: int | None = None,
    images_per_prompt: int | None = None,
    seed: int | None = None,
    max_sequence_length: int | None = None,
    true_cfg_scale: float | None = None,
) -> Protocol:
    """
    Loads a protocol. Settings that are passed here replace those of the protocol, and are added to its name.

    Args:
        name_or_path (`str` or `Path`, *optional*):
            A protocol of this package, see [`evaluation.protocols.shipped_protocols`], or a YAML file. By default, the
            defaults of [`evaluation.protocols.Protocol`] are used.
        num_inference_steps (`int`, *optional*):
            Sampling steps.
        guidance_scale (`float`, *optional*):
            Scale of guidance, see [`evaluation.protocols.Protocol`].
        scheduler (`str`, *optional*):
            Class name of a scheduler in diffusers.
        height (`int`, *optional*):
            Height in pixels.
        width (`int`, *optional*):
            Width in pixels.
        images_per_prompt (`int`, *optional*):
            Number of images per prompt.
        seed (`int`, *optional*):
            Seed of the noise.
        max_sequence_length (`int`, *optional*):
            Number of tokens that are read of a prompt.
        true_cfg_scale (`float`, *optional*):
            Scale of classifier-free guidance of FLUX.1 and Qwen-Image.

    Returns:
        [`Protocol`]

    Raises:
        `ValueError`: If there is no such protocol, it has an unknown key, or a setting is not valid.
    """
    given = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "height": height,
        "width": width,
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "max_sequence_length": max_sequence_length,
        "true_cfg_scale": true_cfg_scale,
    }
    protocol = Protocol() if name_or_path is None else read_protocol(name_or_path)
    given = {name: value for name, value in given.items() if value is not None}
    changed = [f"{name}={value}" for name, value in given.items() if value != getattr(protocol, name)]
    return replace(
        protocol,
        name=", ".join([protocol.name, *changed]) if name_or_path is not None else protocol.name,
        unknown=tuple(name for name in protocol.unknown if name not in given),
        **given,
    )


def read_protocol(name_or_path: str | Path) -> Protocol:
    """
    Reads a protocol.

    Args:
        name_or_path (`str` or `Path`):
            A protocol of this package, or a YAML file.

    Returns:
        [`Protocol`]

    Raises:
        `ValueError`: If there is no such protocol, or it cannot be read.
    """
    shipped = shipped_protocols()
    if str(name_or_path) in shipped:
        path = resources.files("trl_diffusion").joinpath("protocols", f"{name_or_path}.yaml")
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(
                f"There is no protocol {str(name_or_path)!r}. Choose one of {', '.join(shipped)}, or a YAML file."
            )
    try:
        content = construct(compose(path.read_text(encoding="utf-8")), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The protocol {path} is not valid YAML: {cut(str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(f"The protocol {path} must be a mapping of settings, such as `seed: 0`.")
    known = [field.name for field in fields(Protocol)]
    if strange := [cut(str(key), 100) for key in content if key not in known]:
        raise ValueError(
            f"The protocol {path} has the unknown key {', '.join(strange)}; the keys are {', '.join(known)}."
        )
    settings: dict[str, Any] = {"name": Path(path.name).stem} | content
    unknown = settings.get("unknown") or ()
    settings["unknown"] = tuple(unknown) if isinstance(unknown, list) else unknown
    try:
        return Protocol(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shipped_protocols() -> list[str]:
    """Names of the protocols of this package."""
    folder = resources.files("trl_diffusion").joinpath("protocols")
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
