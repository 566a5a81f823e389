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
        **kwargs:
            Passed to [`~diffusers.DiffusionPipeline.from_pretrained`].
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype | dict[str, torch.dtype],
        unrounded_dtype: torch.dtype | dict[str, torch.dtype],
        **kwargs,
    ):
        self.name = name
        self.dtype, self.unrounded_dtype = dtype, unrounded_dtype
        self.kwargs = kwargs | components_left_out(name, kwargs)
        # Whatever changes on the Hub meanwhile, all components are of one commit
        self.folder = name if Path(name).is_dir() else str(DiffusionPipeline.download(name, **self.kwargs))

    @property
    def is_rounded(self) -> bool:
        """Whether some components have less precision than without mixed precision."""
        return self.dtype != self.unrounded_dtype

    def load_pipeline(self, **components: torch.nn.Module) -> DiffusionPipeline:
        """Loads the pipeline, but for some components that are given."""
        pipeline = DiffusionPipeline.from_pretrained(self.folder, dtype=self.dtype, **{**self.kwargs, **components})
        pipeline.register_to_config(_name_or_path=self.name)
        return pipeline

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
                Whether in the precision of the training, or in that without mixed precision.

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
        dtype = self.dtype if is_rounded else self.unrounded_dtype
        loaded = DiffusionPipeline.from_pretrained(self.folder, dtype=dtype, **{**self.kwargs, **others})
        return {name: getattr(loaded, name) for name in names}

    def empty(self, name: str) -> torch.nn.Module | None:
        """A component of diffusers that still has to get its weights, or `None` where its class is not one of diffusers."""
        _, class_name = read_index(self.folder, {}).get(name, (None, None))
        model_class = getattr(diffusers, class_name or "", None)
        if model_class is None:
            return None
        with init_empty_weights():
            module = model_class.from_config(model_class.load_config(self.folder, subfolder=name))
        module.awaits_weights = True  # `backbones.checks` refuses any other without weights
        return module


def read_index(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Reads which components a pipeline has.

    Args:
        name (`str`):
            A Hub id, or a folder that holds a pipeline.
        kwargs (`dict`):
            What is passed to `from_pretrained`, such as `revision`.

    Returns:
        `dict`: the content of `model_index.json`.
    """
    location = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    return DiffusionPipeline.load_config(name, **location)


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


def as_dtype(value: Any) -> torch.dtype | dict[str, torch.dtype]:
    """
    Reads a precision as a configuration file may give it.

    Args:
        value (`str`, `torch.dtype` or `dict`):
            Such as `"bfloat16"` or `{"default": "bfloat16", "vae": "float32"}`.

    Returns:
        `torch.dtype` or `dict[str, torch.dtype]`

    Raises:
        `ValueError`: If it names no type of PyTorch.
    """
    if isinstance(value, dict):
        return {name: as_dtype(one) for name, one in value.items()}
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"`dtype` in `model_init_kwargs` is {value!r}. Pass 'float32', 'bfloat16' or 'float16', or one of these for each "
            "component, by its name."
        )
    return dtype
