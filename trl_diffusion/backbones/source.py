# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Loading the components of a pipeline when they are needed, and in the precision that they are needed in."""

import logging
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline

from .dtypes import check_components, dtype_of
from .folder_checks import allowing_pickles, check_folder, read_index, read_json, stored_quantization
from .quantization import SETTINGS, check_environment, describe_settings, make_config
from .vae import load_vae
from .weights import check_finite_files, load_checked, naming_the_folder


logger = logging.getLogger(__name__)


class FreedComponent:
    """
    Stands in a pipeline for a component that was freed. Whatever is asked of it raises an error: in place of some components,
    pipelines would silently take `None` for zeros.

    Args:
        name (`str`):
            Name of the component.
    """

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        raise RuntimeError(
            f"`{self.name}` was freed after precomputing. Use it within `with trainer.backbone.encoders_on_device():`, which "
            "loads it again."
        )

    def __call__(self, *args, **kwargs) -> NoReturn:
        self.__getattr__("__call__")


class PipelineSource:
    """
    A pipeline on the disk, from which components are loaded as often as they are needed.

    Args:
        name (`str`):
            A Hub id, which is downloaded now, or a folder that holds a pipeline.
        dtype (`torch.dtype` or `dict[str, torch.dtype]`):
            Precision of all components, or of each by its name, with `"default"` for the others.
        unrounded_dtype (`torch.dtype` or `dict[str, torch.dtype]`):
            The same without mixed precision.
        quantization (`dict[str, dict[str, Any]]`, *optional*):
            How components are quantised, see [`backbones.quantization.read_quantization`].
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`]. A `vae` may be a name, see [`backbones.vae.load_vae`].

    Raises:
        `ValueError`: If a precision is given to a component that the pipeline does not have, or what is quantised cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype | dict[str, torch.dtype],
        unrounded_dtype: torch.dtype | dict[str, torch.dtype],
        quantization: dict[str, dict[str, Any]] | None = None,
        **kwargs,
    ):
        self.name = name
        self.dtype, self.unrounded_dtype = dtype, unrounded_dtype
        self.vae_name = kwargs.pop("vae") if isinstance(kwargs.get("vae"), str | Path) else None
        self.quantization = quantization or {}
        kwargs = allowing_pickles(kwargs)
        self.kwargs = kwargs | components_left_out(name, kwargs)
        check_components(dtype, read_index(name, kwargs))
        # Whatever changes on the Hub meanwhile, all components are of one commit
        not_needed = {} if self.vae_name is None else {"vae": None}
        self.folder = local_folder(name, self.kwargs | not_needed)
        parts = [part for part in read_index(self.folder, {}) if part not in self.kwargs]
        if quantized := [part for part in parts if self.planned_quantization(part)]:
            check_environment(f"A quantised {' and '.join(f'`{part}`' for part in quantized)}")

    @property
    def is_rounded(self) -> bool:
        """Whether some components have less precision than without mixed precision and quantisation."""
        return self.dtype != self.unrounded_dtype or bool(self.quantization)

    def planned_quantization(self, name: str) -> str | None:
        """How a component will be quantised, by the settings or as its files are; `None` where it is not."""
        if name in self.quantization:
            return describe_settings(self.quantization[name])
        file = Path(self.folder) / name / "config.json"
        stored = stored_quantization(read_json(file), file) if file.exists() else {}
        if stored.get("quant_method") != "bitsandbytes":
            return None
        return describe_settings(SETTINGS | stored)

    def load_pipeline(self, **components: torch.nn.Module) -> DiffusionPipeline:
        """Loads the pipeline, but for some components that are given."""
        pipeline = self._from_pretrained(self.dtype, components, self.quantization)
        pipeline.register_to_config(_name_or_path=self.name)
        return pipeline

    def _from_pretrained(
        self,
        dtype: torch.dtype | dict[str, torch.dtype],
        components: dict[str, Any],
        quantization: dict[str, dict[str, Any]],
    ) -> DiffusionPipeline:
        if self.vae_name is not None and "vae" not in components:
            components = components | {
                "vae": load_vae(self.vae_name, dtype_of("vae", dtype), self.folder, self.kwargs)
            }
        given = self.kwargs | components
        quantization = {name: settings for name, settings in quantization.items() if name not in given}
        if quantization:
            index = read_index(self.folder, {})
            libraries = {name: index[name][0] for name in quantization}
            dtypes = {name: dtype_of(name, dtype) for name in quantization}
            given["quantization_config"] = make_config(quantization, libraries, dtypes)
            for name in quantization:
                check_finite_files(name, Path(self.folder) / name, given.get("variant"))
        return load_checked(self.folder, dtype, given)

    def load(
        self, pipeline: DiffusionPipeline, names: tuple[str, ...], is_rounded: bool = True
    ) -> dict[str, torch.nn.Module]:
        """
        Loads components of a pipeline again.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                The pipeline, which is left as it is.
            names (`tuple[str, ...]`):
                Names of the components.
            is_rounded (`bool`, *optional*, defaults to `True`):
                Whether in the precision of the training, or in that without mixed precision and quantisation.

        Returns:
            `dict[str, torch.nn.Module]`: the components by name, on the CPU.
        """
        if not names:
            return {}
        others = {
            name: None if isinstance(component, torch.nn.Module | FreedComponent) else component
            for name, component in pipeline.components.items()
            if name not in names
        }
        dtype, quantization = (self.dtype, self.quantization) if is_rounded else (self.unrounded_dtype, {})
        loaded = self._from_pretrained(dtype, others, quantization)
        return {name: getattr(loaded, name) for name in names}

    def empty(self, name: str) -> torch.nn.Module | None:
        """A component of diffusers that still has to get its weights, or `None` where its class is not one of diffusers."""
        entry = read_index(self.folder, {}).get(name)
        class_name = entry[1] if isinstance(entry, list) else None
        model_class = getattr(diffusers, class_name or "", None)
        if model_class is None:
            return None
        with naming_the_folder(self.folder), init_empty_weights():
            module = model_class.from_config(model_class.load_config(self.folder, subfolder=name))
        module.awaits_weights = True  # `backbones.checks` refuses any other without weights
        return module


def local_folder(name: str, kwargs: dict[str, Any]) -> str:
    """
    Finds the folder of a pipeline, which is downloaded if it is on the Hub, and checks it, see [`backbones.folder_checks.check_folder`].

    Args:
        name (`str`):
            A Hub id, or a folder that holds a pipeline.
        kwargs (`dict`):
            What is passed to `from_pretrained`, see [`backbones.folder_checks.allowing_pickles`]. Components in it are neither
            downloaded nor checked.

    Returns:
        `str`: the folder.

    Raises:
        `ValueError`: If the folder asks for more than weights and settings.
    """
    folder = name if Path(name).is_dir() else str(DiffusionPipeline.download(name, **kwargs))
    check_folder(folder, read_index(folder, {}), kwargs, pickles=not kwargs["use_safetensors"])
    return folder


def components_left_out(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    What to pass to `from_pretrained` for components that are not loaded: those that the pipeline was saved without, such as the T5
    of Stable Diffusion 3, and a safety checker, which would turn some images black.

    Args:
        name (`str`):
            A Hub id, or a folder that holds a pipeline.
        kwargs (`dict`):
            What is passed besides, such as `revision`.

    Returns:
        `dict`
    """
    index = read_index(name, kwargs)
    left_out = {
        component: None for component, entry in index.items() if entry == [None, None] and component not in kwargs
    }
    if index.get("safety_checker", [None])[0] is not None:
        logger.warning(f"The safety checker of {name} is not loaded: it would turn some images black.")
        left_out |= {"safety_checker": None, "requires_safety_checker": False}
    return left_out
