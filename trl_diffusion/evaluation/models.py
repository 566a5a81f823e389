# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The models to evaluate: pipelines, LoRAs, training checkpoints, and folders of existing images."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from .. import backbones
from ..backbones.dtypes import as_dtype
from ..backbones.folder_checks import pipeline_class, read_index
from ..backbones.names import INDEX, LORA_WEIGHTS_NAME, find_model
from ..backbones.single_file import family_of_file
from ..cards.arms import training_record
from ..cards.facts import FACTS_NAME, read_model_facts
from ..guidance import negative_preference_guidance
from ..lora_files import load_lora
from ..revisions import digest_of_file, pinned, resolve_revision
from ..safe_names import SAFE_NAME, WHAT_IT_IS, check_safe_name
from ..sampling import default_guidance
from .denoisers import load_denoiser
from .kinds import files_on_hub, find_kind, kind_and_revision, lora_file
from .names import ON_A_BASE, repository_of


logger = logging.getLogger(__name__)

ADAPTER, NEGATIVE_ADAPTER = "evaluated", "negative"
NEGATIVE_ON = ("aligned", "base")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class ModelSpec:
    """
    A model to evaluate, see [`evaluation.models.resolve_model`].

    Args:
        name (`str`):
            Name of the model in tables and folders.
        path (`str`):
            Folder or Hub id.
        kind (`str`):
            `"pipeline"`, `"lora"`, `"denoiser"` or `"images"`.
        revision (`str`):
            Commit on the Hub, or hash of the folder.
        base (`str`, *optional*):
            Folder or Hub id of the base pipeline of a LoRA or a denoiser, or of the pipeline whose configuration a single file takes.
        base_revision (`str`, *optional*):
            Commit or hash of the base.
        negative_lora (`str`, *optional*):
            Folder or Hub id of the LoRA for the unconditional branch of guidance.
        negative_lora_revision (`str`, *optional*):
            Commit or hash of this LoRA.
        negative_lora_on (`str`, *optional*):
            Where a LoRA has a negative one, what the latter is added to: `"aligned"` or `"base"`.
        vae (`str`, *optional*):
            The VAE in place of the pipeline's.
        vae_revision (`str`, *optional*):
            Commit or hash of this VAE.
        trained_on (`str`, *optional*):
            What a LoRA was trained on, as far as it is known, where another model draws with it and is its `base`.
        training (`dict[str, Any]`, *optional*):
            [`cards.arms.training_record`], if a trainer of this library has written what the training was.
    """

    name: str
    path: str
    kind: str
    revision: str
    base: str | None = None
    base_revision: str | None = None
    negative_lora: str | None = None
    negative_lora_revision: str | None = None
    negative_lora_on: str | None = None
    vae: str | None = None
    vae_revision: str | None = None
    trained_on: str | None = None
    training: dict[str, Any] | None = field(default=None, compare=False)

    def __post_init__(self):
        check_safe_name(self.name, "model's name")

    def describe(self) -> dict[str, str | None]:
        """What the images depend on. Of folders, only the last part of the path is given, because they may be moved."""
        return {
            "kind": self.kind,
            "path": _label(self.path),
            "revision": self.revision,
            "base": self.base and _label(self.base),
            "base_revision": self.base_revision,
            "negative_lora": self.negative_lora and _label(self.negative_lora),
            "negative_lora_revision": self.negative_lora_revision,
            **({"negative_lora_on": self.negative_lora_on} if self.negative_lora_on else {}),
            "vae": self.vae and _label(self.vae),
            "vae_revision": self.vae_revision,
        }

    def record(self) -> dict[str, Any]:
        """What a report says of the model: what its images depend on, what a LoRA was trained on if another model draws, and how."""
        trained_on = {"trained_on": _label(self.trained_on)} if self.trained_on else {}
        return self.describe() | trained_on | ({"training": self.training} if self.training else {})


def parse_model(text: str) -> tuple[str, str]:
    """
    Parses `NAME=WHERE`.

    Args:
        text (`str`):
            A name and a folder or Hub id; or only the latter, whose last part is then the name.

    Returns:
        `tuple[str, str]`: name, and folder or Hub id.

    Raises:
        `ValueError`: If the name is not valid for a folder, or a part is missing.
    """
    name, separator, where = text.partition("=")
    if not separator:
        name, where = Path(text).absolute().name, text
    if not where:
        raise ValueError(f"{text!r} has no model: write NAME=WHERE, with a folder or a Hub id after the '='.")
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} in {text!r} is not a valid model name, because a folder gets this name. Write NAME=WHERE, with a name of "
            f"{WHAT_IT_IS}."
        )
    return name, where


def resolve_model(
    name: str,
    where: str,
    base: str | None = None,
    negative_lora: str | None = None,
    vae: str | None = None,
    sample_model: str | None = None,
    negative_lora_on: Literal["aligned", "base"] = "aligned",
) -> ModelSpec:
    """
    Determines the kind and the revision of a model.

    Args:
        name (`str`):
            Name of the model in tables and folders.
        where (`str`):
            - a pipeline: a folder or Hub id with `model_index.json`, such as a checkpoint of full fine-tuning, or a single
              file, see [`backbones.single_file.load_single_file`];
            - a LoRA: a folder or Hub id with `pytorch_lora_weights.safetensors`, such as a checkpoint of LoRA training, or with
              one LoRA file of another name; or the file itself, as a path or as `user/name/file.safetensors`;
            - a denoiser: a folder or Hub id with a folder `unet` or `transformer` and no pipeline, or such a folder itself;
            - a folder of images, see [`evaluation.generate.match_images`].
        base (`str`, *optional*):
            Folder or Hub id of the base pipeline of a LoRA or a denoiser. Defaults to the `base_model` in its card. For a single
            file, the pipeline that gives its configuration, and whatever the file is without.
        negative_lora (`str`, *optional*):
            A LoRA for the unconditional branch of guidance, see [`negative_preference_guidance`].
        vae (`str`, *optional*):
            The VAE in place of the pipeline's, see [`backbones.vae.load_vae`].
        sample_model (`str`, *optional*):
            Folder or Hub id of the pipeline that draws with a LoRA in place of its base, such as a distilled sibling of it. Other
            models draw by themselves.
        negative_lora_on (`str`, *optional*, defaults to `"aligned"`):
            What the negative LoRA of a LoRA is added to: `"aligned"`, the base with the LoRA, as in the code of Diffusion-NPO
            (arXiv:2505.11245), or `"base"`, the base alone. Where all weights were trained, it is added to these.

    Returns:
        [`ModelSpec`]

    Raises:
        `ValueError`: If `where` is none of these, the base is unknown, `negative_lora` is not a LoRA, or it is to be added to the base
            of a model whose weights are not apart from its base's.
    """
    where, base, negative_lora, vae, sample_model = map(_located, (where, base, negative_lora, vae, sample_model))
    found = find_kind(where)
    kind, revision = found.kind, found.revision
    if kind == "images":
        if negative_lora is not None:
            raise ValueError(
                f"{where} is a folder of existing images: `negative_lora` cannot change them. Leave it out for this model."
            )
        return ModelSpec(name, where, kind, revision)
    origin = repository_of(where)
    base_revision = trained_on = None
    if kind in ON_A_BASE:
        base = base or _base_of(origin)
        what = "LoRA" if kind == "lora" else "denoiser"
        draws = sample_model if kind == "lora" else None
        if base is None and draws is None:
            raise ValueError(
                f"The base of the {what} {where} is unknown: it has no README.md that names one `base_model`. Pass the folder or "
                "Hub id of its base as `base_model`."
            )
        if draws is not None:
            base, trained_on = draws, base
        base_kind, base_revision = kind_and_revision(base)
        if base_kind != "pipeline":
            role = "base of" if draws is None else "sample model for"
            raise ValueError(f"The {role} the {what} {where} must be a pipeline, but {base} has no {INDEX}.")
        if kind == "denoiser" and Path(base).is_file():
            raise ValueError(
                f"The base of the denoiser {where} must be a folder or Hub id with {INDEX}, not the file {base}."
            )
    elif base is not None and Path(where).is_file():
        base_revision = kind_and_revision(base)[1]
    else:
        base = None
    negative = _find_negative(negative_lora, negative_lora_on, kind, where)
    vae_revision = vae and _vae_revision(vae)
    return ModelSpec(
        *(name, found.path, kind, revision, base, base_revision, *negative, vae, vae_revision),
        trained_on=trained_on,
        training=_training_of(origin),
    )


def _find_negative(
    negative_lora: str | None, negative_lora_on: str, kind: str, where: str
) -> tuple[str | None, str | None, str | None]:
    """The negative LoRA of a model: the LoRA, its revision, and what it is added to."""
    if negative_lora_on not in NEGATIVE_ON:
        raise ValueError(f"`negative_lora_on` is {negative_lora_on!r}, and must be one of {', '.join(NEGATIVE_ON)}.")
    if negative_lora is None:
        return None, None, None
    found = find_kind(negative_lora)
    if found.kind != "lora":
        raise ValueError(f"`negative_lora` must be a LoRA, but {negative_lora} has no {LORA_WEIGHTS_NAME}.")
    if kind == "lora":
        return found.path, found.revision, negative_lora_on
    if negative_lora_on == "base":
        raise ValueError(
            f"{where} is no LoRA: its weights are not apart from its base's, so its negative LoRA cannot be added to the base alone. "
            f"It is added to the weights that {where} has: leave `negative_lora_on` out for this model."
        )
    return found.path, found.revision, None


def load_pipeline(spec: ModelSpec, dtype: torch.dtype, device: torch.device | str) -> DiffusionPipeline:
    """
    Loads a model, without its safety checker, which would replace some images by black ones.

    Args:
        spec ([`ModelSpec`]):
            The model, of any kind but `"images"`.
        dtype (`torch.dtype`):
            Data type of the weights.
        device (`torch.device` or `str`):
            Device of the model.

    Returns:
        [`~diffusers.DiffusionPipeline`]: the pipeline, with its denoiser or its LoRA if there is one.

    Raises:
        `ValueError`: If not all of a LoRA can be used with this base, see [`lora_files.load_lora`], or a denoiser is for another base,
            or a text encoder has a LoRA that would act in both branches of guidance.
    """
    source, revision = _source(spec)
    is_lora = spec.kind == "lora"
    given = {} if spec.kind in ON_A_BASE or spec.base is None else {"config": spec.base}
    given |= {} if spec.vae is None else {"vae": spec.vae}
    if spec.kind == "denoiser":
        given |= load_denoiser(spec.path, spec.revision, source, revision, dtype)
    pipeline = backbones.load_pipeline(source, dtype=dtype, **given, **pinned(revision)).to(device)
    if is_lora:
        load_lora(pipeline, lora_file(spec.path, spec.revision), ADAPTER)
        _check_text_encoders(pipeline, spec)
    if spec.negative_lora is not None:
        load_lora(pipeline, lora_file(spec.negative_lora, spec.negative_lora_revision), NEGATIVE_ADAPTER)
        _check_text_encoders(pipeline, spec)
    return pipeline


def _check_text_encoders(pipeline: DiffusionPipeline, spec: ModelSpec) -> None:
    """Refuses what would act in the wrong branch of guidance: a text encoder encodes the prompts of both."""
    adapted = {name for part, names in pipeline.get_list_adapters().items() if part in ENCODERS for name in names}
    if NEGATIVE_ADAPTER in adapted:
        raise ValueError(
            f"The LoRA {spec.negative_lora} adapts a text encoder, which encodes the prompts of both branches of guidance. As "
            "`negative_lora`, name a LoRA of the denoiser alone."
        )
    if ADAPTER in adapted and spec.negative_lora_on == "base":
        raise ValueError(
            f"The LoRA {spec.path} adapts a text encoder, which encodes the prompts of both branches of guidance, so that the "
            "unconditional one cannot be that of the base. Leave `negative_lora_on` out for this model."
        )


def guidance_of(spec: ModelSpec, pipeline: DiffusionPipeline) -> AbstractContextManager:
    """The context for sampling with a model: that of its negative LoRA, if it has one."""
    if spec.negative_lora is None:
        return nullcontext()
    on = {ADAPTER: 1.0} if spec.negative_lora_on == "aligned" else {}
    return negative_preference_guidance(
        pipeline, ADAPTER if spec.kind == "lora" else None, on | {NEGATIVE_ADAPTER: 1.0}
    )


def pipeline_class_of(spec: ModelSpec) -> type[DiffusionPipeline]:
    """
    The class of a model's pipeline, before the pipeline is loaded.

    Args:
        spec ([`ModelSpec`]):
            The model, of any kind but `"images"`.

    Returns:
        `type`: [`~diffusers.DiffusionPipeline`] itself for a class that is not one of diffusers.
    """
    source, revision = _source(spec)
    if Path(source).is_file():
        return family_of_file(source)
    return pipeline_class(read_index(source, pinned(revision))) or DiffusionPipeline


def guidance_without(spec: ModelSpec) -> float | None:
    """The guidance scale that a model is sampled with where none is asked for, before its pipeline is loaded."""
    source, revision = _source(spec)
    config = {} if Path(source).is_file() else read_index(source, pinned(revision))
    return default_guidance(pipeline_class_of(spec), config)


def resolve_dtype(dtype: str, device: torch.device, pipeline_class: type[DiffusionPipeline]) -> torch.dtype:
    """
    Determines the data type for sampling.

    Args:
        dtype (`str`):
            `"float32"`, `"float16"`, `"bfloat16"` (or `"fp32"`, `"fp16"`, `"bf16"`), or `"auto"`: on a CUDA device `float16`, as in Diffusion-DPO's notebook,
            but `bfloat16` for pipelines with a transformer, of which T5 and others overflow in `float16`; elsewhere `float32`.
        device (`torch.device`):
            Device of the model.
        pipeline_class (`type`):
            Class of its pipeline.

    Returns:
        `torch.dtype`

    Raises:
        `ValueError`: If the type is unknown.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if "transformer" in pipeline_class.__init__.__annotations__ else torch.float16
    return as_dtype(dtype, "`dtype`", or_auto=True)


# ----- what is written beside models -----


def _located(where: str | None) -> str | None:
    """A path or Hub id, with `~` for the home folder, a linked file downloaded, and a LoRA of the usual name as its folder."""
    if where is None or where.startswith(("http://", "https://")):
        return where and find_model(where)
    where = str(Path(where).expanduser()) if where.startswith("~") else where
    return str(Path(where).parent) if Path(where).name == LORA_WEIGHTS_NAME and Path(where).is_file() else where


def _vae_revision(where: str) -> str:
    path = Path(where)
    if path.is_file():
        return digest_of_file(path)
    return resolve_revision(str(path / "vae") if (path / INDEX).is_file() else where)


def _written_by_training(where: str, name: str) -> Path | None:
    """A file that a training wrote beside a model. A checkpoint uses that of its training, one folder up."""
    folder = Path(where).absolute()
    if folder.is_file():
        return None
    if not folder.is_dir():
        return files_on_hub(where, (name,))[0].get(name)
    folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((path / name for path in folders if (path / name).is_file()), None)


def _training_of(where: str) -> dict[str, Any] | None:
    """How a model was trained, if a trainer of this library has written it."""
    try:
        path = Path(hf_hub_download(where, FACTS_NAME)) if not Path(where).exists() else None
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not is_missing and not constants.HF_HUB_OFFLINE:  # there nobody can tell
            logger.warning(
                f"The Hub does not say whether {where} has a {FACTS_NAME}, so an evaluation cannot tell how it was trained: "
                f"{str(error).splitlines()[0]}"
            )
        return None
    path = path or _written_by_training(where, FACTS_NAME)
    if path is None:
        return None
    try:
        record = training_record(read_model_facts(path))
    except (KeyError, TypeError, ValueError):
        logger.warning(
            f"The {FACTS_NAME} of {where} is not one that this version of trl_diffusion writes: an evaluation cannot tell which "
            "of the other models was trained alike."
        )
        return None
    folder = Path(where).absolute()
    if path.parent == folder.parent:  # of the training that goes on after this checkpoint
        record["settings"]["checkpoint"] = folder.name
    return record


def _base_of(lora: str) -> str | None:
    """The base model that the LoRA's card names, if it names one."""
    card = _written_by_training(lora, "README.md")
    named = card and ModelCard.load(card).data.get("base_model")
    names = named if isinstance(named, list) else [named]
    # The card of a LoRA that started at another one names that one too
    if len(names) > 1 and (training := _training_of(lora)):
        names = [name for name in names if name == training["base"]]
    return names[0] if len(names) == 1 and names[0] else None


def _source(spec: ModelSpec) -> tuple[str, str]:
    """Where the pipeline of a model is loaded from, and its revision."""
    return (spec.base, spec.base_revision) if spec.kind in ON_A_BASE else (spec.path, spec.revision)


def _label(where: str) -> str:
    """A Hub id, or the last part of a path."""
    return Path(where).absolute().name if Path(where).exists() else where
