# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is evaluated: pipelines, LoRAs, checkpoints of a training, and folders of images that are drawn already."""

import hashlib
import json
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from ..guidance import negative_preference_guidance
from ..revisions import commit_of, digest_of_file, pinned, resolve_revision
from .prompts import SAFE_NAME


logger = logging.getLogger(__name__)

PIPELINE_FILE = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA_FILE = "metadata.jsonl"
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
ADAPTER, NEGATIVE_ADAPTER = "evaluated", "negative"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSpec:
    """
    A model that is evaluated, see [`evaluation.models.resolve_model`].

    Args:
        name (`str`):
            Its name in tables and folders.
        path (`str`):
            Folder or Hub id.
        kind (`str`):
            `"pipeline"`, `"lora"` or `"images"`.
        revision (`str`):
            The commit, or a digest of the folder.
        base (`str`, *optional*):
            Folder or Hub id of the pipeline that a LoRA is put on.
        base_revision (`str`, *optional*):
            Its commit or digest.
        negative_lora (`str`, *optional*):
            Folder or Hub id of the LoRA for the unconditional branch of guidance.
        negative_lora_revision (`str`, *optional*):
            Its commit or digest.
    """

    name: str
    path: str
    kind: str
    revision: str
    base: str | None = None
    base_revision: str | None = None
    negative_lora: str | None = None
    negative_lora_revision: str | None = None

    def describe(self) -> dict[str, str | None]:
        """What its images depend on. Folders go by their last name: they may be moved."""
        return {
            "kind": self.kind,
            "path": _label(self.path),
            "revision": self.revision,
            "base": self.base and _label(self.base),
            "base_revision": self.base_revision,
            "negative_lora": self.negative_lora and _label(self.negative_lora),
            "negative_lora_revision": self.negative_lora_revision,
        }


def parse_model(text: str) -> tuple[str, str]:
    """
    Takes `NAME=WHERE` apart.

    Args:
        text (`str`):
            A name, and a folder or Hub id; or the latter alone, whose last part is the name then.

    Returns:
        `tuple[str, str]`: name, and folder or Hub id.

    Raises:
        `ValueError`: If the name cannot be a folder's, or either is missing.
    """
    name, separator, where = text.partition("=")
    if not separator:
        name, where = Path(text).absolute().name, text
    if not where:
        raise ValueError(f"{text!r} names no model: write NAME=WHERE, with a folder or a Hub id after the '='.")
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} in {text!r} cannot be the name of a model: it names a folder. Write NAME=WHERE, with a name of at "
            "most 200 letters from a to z, digits, '.', '_' and '-' that begins with a letter or digit."
        )
    return name, where


def resolve_model(name: str, where: str, base: str | None = None, negative_lora: str | None = None) -> ModelSpec:
    """
    Finds out what a model is, and pins it.

    Args:
        name (`str`):
            Its name in tables and folders.
        where (`str`):
            - a pipeline: a folder or Hub id with `model_index.json`, such as a checkpoint of a training of all weights;
            - a LoRA: a folder or Hub id with `pytorch_lora_weights.safetensors`, such as a checkpoint of a LoRA's training;
            - a folder of images, see [`evaluation.generate.match_images`].
        base (`str`, *optional*):
            Folder or Hub id of the pipeline that a LoRA is put on. Defaults to the `base_model` that the LoRA's card names.
        negative_lora (`str`, *optional*):
            Folder or Hub id of a LoRA for the unconditional branch of guidance, see [`negative_preference_guidance`].

    Returns:
        [`ModelSpec`]

    Raises:
        `ValueError`: If it is none of these, its base is not known, or `negative_lora` is no LoRA.
    """
    kind, revision = _kind_and_revision(where)
    if kind == "images":
        if negative_lora is not None:
            raise ValueError(
                f"{where} is a folder of images, which are drawn already: `negative_lora` cannot change them."
            )
        return ModelSpec(name, where, kind, revision)
    base_revision = negative_lora_revision = None
    if kind == "lora":
        base = base or _base_of(where)
        base_kind, base_revision = _kind_and_revision(base)
        if base_kind != "pipeline":
            raise ValueError(f"The base of the LoRA {where} must be a pipeline, and {base} has no {PIPELINE_FILE}.")
    else:
        base = None
    if negative_lora is not None:
        negative_kind, negative_lora_revision = _kind_and_revision(negative_lora)
        if negative_kind != "lora":
            raise ValueError(f"`negative_lora` must be a LoRA, and {negative_lora} has no {LORA_FILE}.")
    return ModelSpec(name, where, kind, revision, base, base_revision, negative_lora, negative_lora_revision)


def load_pipeline(spec: ModelSpec, dtype: torch.dtype, device: torch.device | str) -> DiffusionPipeline:
    """
    Loads a model. A safety checker is left out: it would put black images into the comparison.

    Args:
        spec ([`ModelSpec`]):
            The model, of kind `"pipeline"` or `"lora"`.
        dtype (`torch.dtype`):
            Type of the weights.
        device (`torch.device` or `str`):
            Where it goes.

    Returns:
        [`~diffusers.DiffusionPipeline`]: with the LoRA, as diffusers loads it.
    """
    is_lora = spec.kind == "lora"
    source, revision = (spec.base, spec.base_revision) if is_lora else (spec.path, spec.revision)
    checker = {}
    if DiffusionPipeline.load_config(source, **pinned(revision)).get("safety_checker", [None])[0] is not None:
        logger.warning(f"The safety checker of {source} is left out, which would paint some images black.")
        checker = {"safety_checker": None, "requires_safety_checker": False}
    pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, **pinned(revision), **checker).to(device)
    if is_lora:
        pipeline.load_lora_weights(spec.path, weight_name=LORA_FILE, adapter_name=ADAPTER, **pinned(spec.revision))
    if spec.negative_lora is not None:
        pipeline.load_lora_weights(
            spec.negative_lora,
            weight_name=LORA_FILE,
            adapter_name=NEGATIVE_ADAPTER,
            **pinned(spec.negative_lora_revision),
        )
    return pipeline


def guidance_of(spec: ModelSpec, pipeline: DiffusionPipeline) -> AbstractContextManager:
    """The context that a model draws in: that of its negative LoRA, or none."""
    if spec.negative_lora is None:
        return nullcontext()
    return negative_preference_guidance(pipeline, ADAPTER if spec.kind == "lora" else None, NEGATIVE_ADAPTER)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """
    The type that a model draws in.

    Args:
        dtype (`str`):
            `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: `float16` on a CUDA device, as Diffusion-DPO's notebook draws,
            and `float32` elsewhere.
        device (`torch.device`):
            Where the model is.

    Returns:
        `torch.dtype`

    Raises:
        `ValueError`: If there is no such type.
    """
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be 'auto', {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    return DTYPES[dtype]


# ----- what is where -----


def _kind_and_revision(where: str) -> tuple[str, str]:
    folder = Path(where)
    if folder.is_file():
        raise ValueError(f"{where} is a file: name its folder.")
    if folder.is_dir():
        found = {name: folder / name for name in (PIPELINE_FILE, LORA_FILE) if (folder / name).is_file()}
        missing = f"the folder has no {PIPELINE_FILE} (a pipeline), no {LORA_FILE} (a LoRA) and no images"
    else:
        found, missing = _files_on_hub(where, (PIPELINE_FILE, LORA_FILE))
    if len(found) > 1:
        raise ValueError(
            f"{where} holds a pipeline ({PIPELINE_FILE}) and a LoRA ({LORA_FILE}): keep one of them there."
        )
    if PIPELINE_FILE in found:
        return "pipeline", _pipeline_digest(folder) if folder.is_dir() else commit_of(
            found[PIPELINE_FILE], PIPELINE_FILE
        )
    if LORA_FILE in found:
        return "lora", digest_of_file(found[LORA_FILE]) if folder.is_dir() else commit_of(found[LORA_FILE], LORA_FILE)
    if folder.is_dir() and any(is_image(path) or path.name == METADATA_FILE for path in folder.iterdir()):
        return "images", resolve_revision(where)
    raise ValueError(f"{where!r} is nothing that can be evaluated: {missing}.")


def _files_on_hub(repo_id: str, names: tuple[str, ...]) -> tuple[dict[str, Path], str]:
    """The files that a repository has, and why there is none."""
    found, missing = {}, ""
    for name in names:
        try:
            found[name] = Path(hf_hub_download(repo_id, name))
        except EntryNotFoundError as error:  # that the repository has not, or that the cache has not
            missing = str(error).splitlines()[0]
        except (OSError, HFValidationError) as error:
            missing = str(error).splitlines()[0]
            break
    return found, f"there is no such folder, and the Hub gave neither {' nor '.join(names)}: {missing}"


def _pipeline_digest(folder: Path) -> str:
    """Over what belongs to the pipeline: beside it may lie the state of a training, or images that it drew."""
    components = json.loads((folder / PIPELINE_FILE).read_text(encoding="utf-8"))
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name in components)
    parts = [digest_of_file(folder / PIPELINE_FILE), *(f"{path.name} {resolve_revision(path)}" for path in folders)]
    return f"sha256:{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"


def _base_of(lora: str) -> str:
    """What the LoRA's card names as its base."""
    folder = Path(lora).absolute()
    if not folder.is_dir():
        card = _files_on_hub(lora, ("README.md",))[0].get("README.md")
    else:  # a checkpoint's card is that of its training, one folder up
        folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
        card = next((path / "README.md" for path in folders if (path / "README.md").is_file()), None)
    named = card and ModelCard.load(card).data.get("base_model")
    names = named if isinstance(named, list) else [named]
    if len(names) != 1 or not names[0]:
        raise ValueError(
            f"The LoRA {lora} does not say what it belongs on: it has no README.md that names one `base_model`. Pass the "
            "folder or Hub id of that model as `base_model`."
        )
    return names[0]


def is_image(path: Path) -> bool:
    """Whether a file's name is that of an image."""
    return path.suffix.lower() in IMAGE_TYPES


def _label(where: str) -> str:
    """A Hub id, or the last name of a folder."""
    return Path(where).absolute().name if Path(where).is_dir() else where
