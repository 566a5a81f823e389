# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a folder, a file or a repository holds that an evaluation can draw with, and in which version."""

import hashlib
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open

from ..backbones.folder_checks import check_name, read_index, read_json
from ..backbones.names import ENDINGS, INDEX, LORA_WEIGHTS_NAME, find_model
from ..lora_files import find_lora
from ..revisions import commit_of, digest_of_file, pinned, resolve_revision
from .names import HUB_FILE, METADATA_FILE, is_image


logger = logging.getLogger(__name__)

DENOISERS = ("unet", "transformer")
DENOISER_CLASS = re.compile(r"UNet2DConditionModel|\w*Transformer2DModel")


class Found(NamedTuple):
    """
    What a name stands for.

    Args:
        kind (`str`):
            `"pipeline"`, `"lora"`, `"denoiser"` or `"images"`.
        revision (`str`):
            Commit on the Hub, or hash of what is used of a folder or file.
        path (`str`):
            The name, completed by the name of the file where that is not the usual one.
    """

    kind: str
    revision: str
    path: str


def find_kind(where: str) -> Found:
    """
    Finds what a name stands for.

    Args:
        where (`str`):
            A folder, a file, a Hub id, or `user/name/file.safetensors` on the Hub.

    Returns:
        [`Found`]

    Raises:
        `ValueError`: If there is nothing to draw with, or more than one thing.
    """
    path = Path(check_name(where))
    if path.is_file():
        return _kind_of_file(where, path)
    if path.is_dir():
        return _kind_of_folder(where, path)
    if on_hub := HUB_FILE.fullmatch(where):
        return _lora_on_hub(*on_hub.groups())
    return _kind_on_hub(where)


def kind_and_revision(where: str) -> tuple[str, str]:
    """What a folder, a file or a repository holds, and its commit or hash, see [`find_kind`]."""
    found = find_kind(where)
    return found.kind, found.revision


def lora_file(path: str, revision: str) -> Path:
    """The file of a LoRA that was found, downloaded if needed."""
    if Path(path).is_file():
        return Path(path)
    if on_hub := HUB_FILE.fullmatch(path):
        return Path(hf_hub_download(*on_hub.groups(), **pinned(revision)))
    return find_lora(path, **pinned(revision))


def is_lora_file(path: Path) -> bool:
    """Whether a file holds a LoRA, of diffusers or another library, by the names of its tensors."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith("lora_") or ".lora" in key or "_lora." in key for key in file.keys())
    except (SafetensorError, OSError):
        return False


def denoiser_folder(names: Collection[str]) -> str | None:
    """Which folder among files holds a denoiser: `"unet"`, `"transformer"`, `""` for the top, `None` if none does."""
    for folder in DENOISERS:
        if f"{folder}/config.json" in names:
            return folder
    has_weights = any(name.startswith("diffusion_pytorch_model") for name in names)
    return "" if has_weights and "config.json" in names else None


# ----- on this machine -----


def _kind_of_file(where: str, path: Path) -> Found:
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{where} is a file: pass its folder.")
    find_model(where)
    return Found("lora" if is_lora_file(path) else "pipeline", digest_of_file(path), where)


def _kind_of_folder(where: str, folder: Path) -> Found:
    found = {name for name in (INDEX, LORA_WEIGHTS_NAME) if (folder / name).is_file()}
    if kind := _usual_kind(where, found):
        revision = _pipeline_digest(folder) if kind == "pipeline" else digest_of_file(folder / LORA_WEIGHTS_NAME)
        return Found(kind, revision, where)
    names = {
        path.relative_to(folder).as_posix() for pattern in ("*", "*/config.json") for path in folder.glob(pattern)
    }
    part = denoiser_folder(names)
    is_part = (folder.parent / INDEX).is_file()  # of a pipeline, which is meant then
    if part or (part == "" and not is_part and _is_denoiser(folder / "config.json")):
        return Found("denoiser", resolve_revision(str(folder / part)), where)
    loras = sorted(path.name for path in folder.glob("*.safetensors") if is_lora_file(path))
    if loras:
        path = str(folder / _only_one(where, loras))
        return Found("lora", digest_of_file(Path(path)), path)
    if any(is_image(path) or path.name == METADATA_FILE for path in folder.iterdir()):
        return Found("images", resolve_revision(where), where)
    missing = f"the folder has no {INDEX} (a pipeline), no {LORA_WEIGHTS_NAME} (a LoRA) and no images"
    return _refuse(where, missing)


def _is_denoiser(config: Path) -> bool:
    return bool(DENOISER_CLASS.fullmatch(str(read_json(config).get("_class_name"))))


def _usual_kind(where: str, found: Collection[str]) -> str | None:
    """The kind of what has the usual names."""
    if len(found) > 1:
        raise ValueError(
            f"{where} holds both a pipeline ({INDEX}) and a LoRA ({LORA_WEIGHTS_NAME}): keep only one of them there."
        )
    return "pipeline" if INDEX in found else "lora" if LORA_WEIGHTS_NAME in found else None


def _only_one(where: str, loras: list[str]) -> str:
    """The only LoRA of a folder or repository, which is named; several are refused."""
    if len(loras) > 1:
        raise ValueError(
            f"{where} holds several files that may be a LoRA: {', '.join(loras[:5])}{' and others' if len(loras) > 5 else ''}. Name "
            f"one of them: {where.rstrip('/')}/{loras[0]}."
        )
    logger.info(f"The LoRA of {where} is {loras[0]}.")
    return loras[0]


def _refuse(where: str, missing: str) -> Found:
    try:
        find_model(where)  # says what a folder holds in their place
    except ValueError as error:
        raise ValueError(f"{where!r} cannot be evaluated: {missing}. {error}") from error
    raise ValueError(f"{where!r} cannot be evaluated: {missing}.")


def _pipeline_digest(folder: Path) -> str:
    """Hash of the files of the pipeline only: the folder may also contain a training state or samples."""
    components = read_index(str(folder), {})
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name in components)
    parts = [digest_of_file(folder / INDEX), *(f"{path.name} {resolve_revision(path)}" for path in folders)]
    return f"sha256:{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"


# ----- on the Hub -----


def _kind_on_hub(repo_id: str) -> Found:
    found, missing = files_on_hub(repo_id, (INDEX, LORA_WEIGHTS_NAME))
    if kind := _usual_kind(repo_id, found):
        ((name, path),) = found.items()
        return Found(kind, commit_of(path, name), repo_id)
    commit, names = _names_on_hub(repo_id)
    part = denoiser_folder(names)
    if part or (part == "" and _is_denoiser(Path(hf_hub_download(repo_id, "config.json")))):
        return Found("denoiser", commit, repo_id)
    loras = sorted(name for name in names if name.endswith(".safetensors"))
    if loras:
        return _lora_on_hub(repo_id, _only_one(repo_id, loras))
    return _refuse(repo_id, missing)


def files_on_hub(repo_id: str, names: tuple[str, ...]) -> tuple[dict[str, Path], str]:
    """The existing files of a repository, and the reason if there are none."""
    found, missing = {}, ""
    for name in names:
        try:
            found[name] = Path(hf_hub_download(repo_id, name))
        except EntryNotFoundError as error:  # missing in the repository, or in the cache
            missing = str(error).splitlines()[0]
        except (OSError, HFValidationError) as error:
            missing = str(error).splitlines()[0]
            break
    return found, f"there is no such folder, and the Hub provides neither {' nor '.join(names)}: {missing}"


def _names_on_hub(repo_id: str) -> tuple[str, list[str]]:
    """The commit of a repository and the names of its files; without the Hub, of those in the cache."""
    try:
        info = HfApi().model_info(repo_id)
        return info.sha, [file.rfilename for file in info.siblings]
    except (OSError, HFValidationError, httpx2.HTTPError):
        pass
    try:
        folder = Path(snapshot_download(repo_id, local_files_only=True))
    except (OSError, HFValidationError):
        return "", []
    return folder.name, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _lora_on_hub(repo_id: str, name: str) -> Found:
    try:
        path = Path(hf_hub_download(repo_id, name))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{repo_id}/{name} is no file here, and {repo_id} on the Hub gave no {name}: {str(error).splitlines()[0]}"
        ) from error
    if not is_lora_file(path):
        raise ValueError(
            f"{repo_id}/{name} is no LoRA. If it is a whole model in one file, pass its link, "
            f"https://huggingface.co/{repo_id}/blob/main/{name}."
        )
    return Found("lora", commit_of(path, name), f"{repo_id}/{name}")
