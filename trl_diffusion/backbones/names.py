# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Finding a model by what its user calls it: a Hub id, a folder, a file, or a link on the Hub."""

import re
from pathlib import Path
from typing import NoReturn

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from .folder_checks import INDEX, check_name, read_json


ENDINGS = (".safetensors", ".ckpt")
OTHER_ENDINGS = (".gguf", ".bin", ".pt", ".pth", ".onnx", ".zip", ".json", ".yaml", ".yml", ".txt")
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
LINK = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?#]+)")
HUB_PAGE = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)/?")
# Where a pipeline is when the folder above it was named, also in the Hub's cache
BELOW = (f"*/{INDEX}", f"*/*/{INDEX}", f"*/snapshots/*/{INDEX}")


def find_model(name: str | Path) -> str:
    """
    Finds a pipeline or a single file. A file that is linked on the Hub is downloaded.

    Args:
        name (`str` or `Path`):
            A Hub id, a folder that holds a pipeline, a single file, or the link of a file on the Hub; `~` is the home folder.

    Returns:
        `str`: the Hub id, or where the folder or the file is.

    Raises:
        `ValueError`: If there is none, with what is there in its place.
    """
    if not (name := str(name)):
        raise ValueError("The name of the model is empty: pass a Hub id, a folder or a file.")
    if name.startswith(("http://", "https://")):
        return _download(name)
    check_name(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            _refuse_folder(path)
    elif path.is_file():
        _check_ending(path)
    elif name.lower().endswith((*ENDINGS, *OTHER_ENDINGS)):
        raise ValueError(f"There is no file {path}.")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder or file {name!r}, and a Hub id is a name such as 'user/model'.")
    else:
        return name
    return str(path)


def _download(link: str) -> str:
    shown = re.sub("(?<=//)[^/]*@", "", link.split("?")[0])  # without a password
    if page := HUB_PAGE.fullmatch(link):
        raise ValueError(f"{link} is the page of a model: pass its Hub id, {page[1]}.")
    parts = LINK.fullmatch(link.split("?")[0])
    if parts is None:
        raise ValueError(
            f"{shown} is no file on the Hub, whose links are like https://huggingface.co/user/model/blob/main/file.safetensors. "
            "Download it first, and pass the file."
        )
    repo, revision, file = parts.groups()
    if not file.lower().endswith(ENDINGS):
        raise ValueError(f"{shown} is no {' or '.join(ENDINGS)} file.")
    try:
        return hf_hub_download(repo, file, revision=revision)
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"{shown} cannot be downloaded: {str(error).strip().splitlines()[0]}") from error


def _check_ending(path: Path) -> None:
    if path.suffix == ".SAFETENSORS" or (path.suffix not in ENDINGS and path.suffix.lower() in ENDINGS):
        raise ValueError(
            f"diffusers knows {path} only by an ending in small letters: rename it to {path.stem}{path.suffix.lower()}."
        )
    if path.name == INDEX:
        raise ValueError(f"{path} is a file out of a pipeline's folder: pass the folder, {path.parent}.")
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"{path} is no model that can be loaded: a single file is a {' or '.join(ENDINGS)} file in full or half precision."
        )


def _refuse_folder(path: Path) -> NoReturn:
    """Raises the error that says what a folder without a pipeline holds."""
    files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    below = sorted({str(index.parent) for pattern in BELOW for index in path.glob(pattern)})
    loras = sorted(str(file.parent) for file in path.glob(f"*/{LORA_WEIGHTS_NAME}"))
    if LORA_WEIGHTS_NAME in files:
        raise ValueError(
            f"{path} holds a LoRA ({LORA_WEIGHTS_NAME}) and no pipeline: pass the model that it was trained on."
        )
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kind = config.get("_class_name") or config.get("architectures") or "model"
        kind = ", ".join(map(str, kind)) if isinstance(kind, list) else str(kind)
        whole = (
            f"pass its pipeline, {path.parent}" if (path.parent / INDEX).is_file() else f"pass a folder with {INDEX}"
        )
        raise ValueError(f"{path} holds one component, a `{kind}`, and no pipeline: {whole}.")
    if below:
        raise ValueError(
            f"{path} holds no pipeline ({INDEX}), but {' and '.join(below[:3])} {'does' if len(below) == 1 else 'do'}: pass that folder."
        )
    if files:
        raise ValueError(
            f"{path} holds no pipeline ({INDEX}), but the file {files[0]}: pass {path / files[0]} itself."
        )
    if loras:
        raise ValueError(
            f"{path} holds no pipeline ({INDEX}), and a LoRA in {loras[-1]}: pass the model that it was trained on."
        )
    raise ValueError(f"{path} holds no pipeline: it has no {INDEX}, and no {' or '.join(ENDINGS)} file.")
