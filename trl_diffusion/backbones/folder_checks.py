# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a model's folder may ask for, before diffusers and transformers read it: anybody may have written it. No code of its own, no
pickle, no file outside, no sizes that no model has.
"""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import diffusers
from diffusers import DiffusionPipeline, pipelines


INDEX = "model_index.json"
MAX_LETTERS = 4_000  # of a path
LIBRARIES = ("diffusers", "transformers")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NAME = re.compile(r"[A-Za-z_]\w{0,99}")
CONFIGS = ("config.json", "scheduler_config.json")
# Of a setting with one of these words in its name, and of any: the largest whole number
MANY, MAX_MANY, MAX_SIZE = ("layer", "block", "timesteps", "depth"), 10_000, 10**9


def check_name(name: str) -> str:
    """Refuses what no system takes as the name of a file, so that nobody could say whether there is one."""
    if (
        "\0" in name
        or len(name) > MAX_LETTERS
        or any(len(part.encode(errors="replace")) > 255 for part in name.split("/"))
    ):
        raise ValueError(
            f"{name[:80]!r} is too long for a name, or holds characters that none has. Pass a Hub id, a folder or a file."
        )
    return name


def read_json(path: Path) -> dict[str, Any]:
    """
    Reads a file of settings.

    Args:
        path (`Path`):
            The file.

    Returns:
        `dict[str, Any]`

    Raises:
        `ValueError`: If it cannot be read, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, or no file that can be read. Download it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} cannot be read: {reason}. Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings by name. Download it again.")
    return content


def allowing_pickles(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of `from_pretrained`, changed so that `use_safetensors=False` allows pickles where there are no safetensors, and that
    without it none is loaded: diffusers and transformers would fall back to them.
    """
    return kwargs | {"use_safetensors": None if kwargs.get("use_safetensors") is False else True}


def check_index(index: Any, name: str) -> dict[str, Any]:
    """
    Refuses a pipeline of classes that are not those of diffusers and transformers.

    Args:
        index (`dict[str, Any]`):
            The content of its `model_index.json`.
        name (`str`):
            The pipeline, for messages.

    Returns:
        `dict[str, Any]`: the content.

    Raises:
        `ValueError`: If the pipeline, or a component, needs code that is not installed, or the content is no index.
    """
    class_name = index.get("_class_name") if isinstance(index, dict) else None
    if isinstance(class_name, list):
        _refuse_code(name, f"`_class_name` {str(class_name)[:100]}")
    if not isinstance(class_name, str) or not NAME.fullmatch(class_name):
        raise ValueError(f"{name} is no pipeline: its `_class_name` is {str(class_name)[:100]!r}. Download it again.")
    for setting in ("_diffusers_version", "_name_or_path"):
        if not isinstance(index.get(setting), str | None):
            raise ValueError(f"{name} has {str(index[setting])[:100]} as `{setting}`. Download it again.")
    settings = settings_of(class_name)
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list):
            continue
        if not NAME.fullmatch(component):
            raise ValueError(f"{name} has the component {component[:100]!r}, which is no name. Download it again.")
        if entry == [None, None] or component in settings and all(isinstance(part, int) for part in entry):
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ValueError(
                f"{name} has {str(entry)[:100]} as `{component}`, which is no library and class. Download it again."
            )
        library, kind = entry
        is_known = library in LIBRARIES or library in sys.modules or library in vars(pipelines)
        if not NAME.fullmatch(kind) or not (is_known or NAME.fullmatch(library) and hasattr(pipelines, library)):
            _refuse_code(name, f"`{component}` {str(entry)[:100]}")
        if library in sys.modules and not isinstance(vars(sys.modules[library]).get(kind, type), type):
            raise ValueError(f"{name} has {entry} as `{component}`, which is no class. Download it again.")
    return index


def settings_of(class_name: str) -> set[str]:
    """What a pipeline of diffusers may be given besides its components, such as the numbers of layers."""
    kind = getattr(diffusers, class_name, None)
    parameters = inspect.signature(kind).parameters.values() if isinstance(kind, type) else ()
    return {parameter.name for parameter in parameters if parameter.default is not parameter.empty}


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

    Raises:
        `ValueError`: If there is none, it is no index, or names classes that are not installed, see [`backbones.folder_checks.check_index`].
    """
    location = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    if Path(name).is_dir():
        return check_index(read_json(Path(name) / INDEX), name)
    try:
        index = DiffusionPipeline.load_config(name, **location)
    except RecursionError as error:
        raise ValueError(f"The {INDEX} of {name} is nested too deeply to be one. Download it again.") from error
    except OSError as error:
        raise ValueError(
            f"{name} is no folder, and neither the Hub nor its cache gives a pipeline of this name: {str(error).splitlines()[0][:500]}"
        ) from error
    return check_index(index, name)


def pipeline_class(index: dict[str, Any]) -> type[DiffusionPipeline] | None:
    """The class of a pipeline, `None` if it is none of diffusers."""
    found = getattr(diffusers, index["_class_name"], None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def check_folder(folder: str | Path, index: dict[str, Any], without: Any = (), pickles: bool = False) -> None:
    """
    Refuses a pipeline's folder whose files ask for more than weights and settings.

    Args:
        folder (`str` or `Path`):
            The folder.
        index (`dict[str, Any]`):
            The content of its `model_index.json`.
        without (`Collection[str]`, *optional*):
            Components that are not loaded from there.
        pickles (`bool`, *optional*, defaults to `False`):
            Whether the user asked for weights out of pickles.

    Raises:
        `ValueError`: If a component needs code, pickles, other folders or sizes that no model has.
    """
    for component, entry in index.items():
        is_component = isinstance(entry, list) and all(isinstance(part, str) for part in entry) and len(entry) == 2
        if is_component and component not in without and not component.startswith("_"):
            check_component(Path(folder) / component, pickles, is_auto=entry[1].startswith("Auto"))


def check_component(folder: Path, pickles: bool = False, is_auto: bool = False) -> None:
    """
    The same for the folder of one component. `is_auto` says that its class is one of those that read another class's name.
    """
    if not folder.is_dir():
        return
    files = sorted(folder.iterdir())
    for file in files:
        if not file.is_file() and not file.is_dir():
            raise ValueError(f"{file} is no file that can be read (a pipe, a device or a link to nothing). Remove it.")
        if file.is_file() and file.suffix == ".json":
            _check_settings(file, pickles, is_auto)
    names = {file.name for file in files}
    if not pickles and names & {"config.json"} and not any(name.endswith(".safetensors") for name in names):
        if found := sorted(name for name in names if name.endswith(PICKLES)):
            raise ValueError(
                f"{folder} holds its weights as a pickle alone, {found[0]}, which can hold code and is not loaded. Take the "
                "files with safetensors, convert them (`save_pretrained` writes safetensors), or, if you trust where they come "
                "from, pass `use_safetensors=False` in `model_init_kwargs`."
            )


def _check_settings(file: Path, pickles: bool, is_auto: bool) -> None:
    if file.name.endswith(".index.json"):
        weight_map = read_json(file).get("weight_map")
        shards = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or not shard.isprintable():
                raise ValueError(
                    f"{file} names the file {str(shard)[:100]!r}, which is none of its folder. Download the model again."
                )
            if not pickles and not shard.endswith(".safetensors") and file.name.endswith(".safetensors.index.json"):
                raise ValueError(
                    f"{file} names {shard[:100]!r}, which is no .safetensors file. Download the model again."
                )
        return
    if not file.name.endswith("config.json"):
        return
    settings = read_json(file)
    stored_quantization(settings, file)
    length = settings.get("model_max_length")
    if not isinstance(length, int | float | None):
        raise ValueError(
            f"{file} has {str(length)[:100]!r} as `model_max_length`, which is no number. Download it again."
        )
    if is_auto and settings.get("auto_map"):
        _refuse_code(str(file.parent), "`auto_map`")
    for key, value in _flat(settings):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            _refuse_code(str(file.parent), f"`{key}` {value[:100]!r}")
        if file.name in CONFIGS and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > (MAX_MANY if any(word in key for word in MANY) else MAX_SIZE):
                shown = f"{value:,}" if abs(value) < 10**30 else "a number of more than 30 digits"
                raise ValueError(f"{file} has `{key}` = {shown}, which no model has. Download it again.")


def stored_quantization(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """How the weights beside a `config.json` are quantised, by its settings. Raises a `ValueError` if these are none."""
    stored = settings.get("quantization_config") or {}
    if not isinstance(stored, dict):
        raise ValueError(
            f"{file} has {str(stored)[:100]!r} as `quantization_config`, which holds no settings. Download it again."
        )
    return stored


def _flat(settings: Any) -> list[tuple[str, Any]]:
    """All values with the name of their setting, however deep."""
    found, waiting = [], [("", settings)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((key, each) for each in value)
        else:
            found.append((key, value))
    return found


def _refuse_code(name: str, what: str) -> NoReturn:
    raise ValueError(
        f"{name} needs code that is neither in diffusers nor in transformers ({what}). It is not run. If you trust it, load the "
        "pipeline yourself and pass it as `model`."
    )
