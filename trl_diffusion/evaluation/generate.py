# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Samples the images of a comparison, with the same noise for every model. An interrupted run continues.

The noise of an image depends only on the seed, the id of its prompt and its index among the images of the prompt, not
on the batch size, the order, the other prompts or the number of processes. A run therefore samples only the missing
images.
"""

import gc
import hashlib
import inspect
import io
import json
import logging
import re
from collections import Counter
from contextlib import nullcontext
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..batching import batched, in_threads
from ..files import only_run, write_file
from ..nodes import is_shared
from ..safe_names import check_relative_path
from ..sampling import default_argument, family_of, sample_images
from .kept_images import keep_sampled_images, read_sums, write_images, write_sums
from .models import (
    ModelSpec,
    guidance_of,
    guidance_without,
    load_pipeline,
    pipeline_class_of,
    resolve_dtype,
)
from .names import METADATA_FILE, is_image
from .prompts import Prompt, PromptSet, read_jsonl
from .protocols import OF_SOME_PIPELINES, SETTINGS, Protocol


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PACKAGES = ("diffusers", "torch")
PATIENCE = timedelta(days=7)  # timeout for the slowest process; the default of a process group may be ten minutes
NUMBERED = re.compile(r"(.+)_(\d+)")  # id of the prompt, index of the image


class ImageRow(NamedTuple):
    """
    An image of a model.

    Args:
        prompt ([`Prompt`]):
            Prompt of the image.
        index (`int`):
            Index among the images of the prompt.
        path (`Path`):
            File of the image.
    """

    prompt: Prompt
    index: int
    path: Path


def generate(
    spec: ModelSpec,
    prompt_set: PromptSet,
    protocol: Protocol,
    output_dir: str | Path,
    batch_size: int = 8,
    dtype: str = "auto",
    use_cpu: bool = False,
    disable_tqdm: bool = False,
) -> list[ImageRow]:
    """
    Samples the missing images of a model, into `<output_dir>/images/<model>/<prompt id>_<index>.png`. Processes that
    `accelerate` or `torchrun` started share the work. For a folder of images, the images are looked up instead.

    Args:
        spec ([`ModelSpec`]):
            The model.
        prompt_set ([`PromptSet`]):
            The prompts. More prompts of the same set can be added to the same folder later.
        protocol ([`Protocol`]):
            Sampling settings. More images per prompt can be added later.
        output_dir (`str` or `Path`):
            Folder of the evaluation.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of images per batch and process.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights, see [`evaluation.models.resolve_dtype`].
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to sample on the CPU even if there is a GPU.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        `list[ImageRow]`: the images, sorted by prompt in the order of the set, then by index.

    Raises:
        `ValueError`: If the folder holds images that were sampled with other settings, another process is sampling
            into it, several machines do not see the same one, the scheduler does not fit the model, the model has a negative LoRA and no unconditional branch, the disk
            is full, or a folder of images is incomplete.
    """
    if spec.kind == "images":
        return match_images(Path(spec.path), prompt_set, protocol.images_per_prompt)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    state = process_state(use_cpu)
    folder = Path(output_dir) / "images" / spec.name
    pipeline_class = pipeline_class_of(spec)
    check_branches(spec, pipeline_class, protocol)
    dtype = resolve_dtype(dtype, state.device, pipeline_class)
    # What an image depends on
    settings = {
        key: value for key, value in protocol.describe().items() if key in SETTINGS and key != "images_per_prompt"
    }
    if protocol.guidance_scale is None:
        settings["guidance_scale"] = guidance_without(spec)
    manifest = {
        "prompts": {"name": prompt_set.name, "revision": prompt_set.revision, "digest": prompt_set.digest},
        "protocol": settings,
        "model": spec.describe(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in PACKAGES},
    }
    if not is_shared(folder):
        raise ValueError(
            f"The machines do not see the same {folder}, and the first one scores the images of all. Put `--output_dir` on a disk that "
            "all of them have, or evaluate on one machine."
        )
    content = (json.dumps(manifest, indent=2) + "\n").encode()
    check_manifest(folder, manifest, content)
    state.wait_for_everyone()  # no process writes before all have checked
    with only_run(folder, "sampling") if state.is_main_process else nullcontext():
        if state.is_main_process:
            write_sums(folder, keep_sampled_images(folder) | {MANIFEST: hashlib.sha256(content).hexdigest()})
            write_file(folder / MANIFEST, content)
        state.wait_for_everyone()  # only images that are kept are there
        rows = [
            ImageRow(prompt, index, folder / f"{prompt.id}_{index}.png")
            for prompt in prompt_set.prompts
            for index in range(protocol.images_per_prompt)
        ]
        missing = [row for row in rows if not row.path.exists()]
        state.wait_for_everyone()  # all processes see the same missing images
        share = missing[state.process_index :: state.num_processes]
        if share:
            pipeline = load_pipeline(spec, dtype, state.device)
            set_scheduler(pipeline, protocol.scheduler)
            with guidance_of(spec, pipeline):
                sample_rows(
                    pipeline, share, protocol, batch_size, disable_tqdm or not state.is_main_process, spec.name
                )
            del pipeline
            gc.collect()  # models contain reference cycles, and the next one needs the memory
            if state.device.type == "cuda":
                torch.cuda.empty_cache()
        state.wait_for_everyone()
        if state.is_main_process:
            write_sums(folder, read_sums(folder))
    return rows


def process_state(use_cpu: bool) -> PartialState:
    """The processes of this run. Without a GPU each must be told so, or it takes itself for the only one."""
    return PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=PATIENCE)


def check_manifest(folder: Path, manifest: dict[str, Any], content: bytes) -> None:
    """
    Checks that the existing images of a folder were sampled with the same settings. A manifest that is lost or damaged is one
    that can be written again, if its checksum is known and is that of these settings.

    Args:
        folder (`Path`):
            Folder of a model's images.
        manifest (`dict`):
            Everything that the images depend on.
        content (`bytes`):
            The manifest as it is written.

    Raises:
        `ValueError`: If a setting differs, or it is unknown whether one does.
    """
    path = folder / MANIFEST
    way_out = "Choose another `output_dir`, or delete that folder to sample all images again."
    if not any(folder.glob("*.png")):
        return
    found = path.read_bytes() if path.exists() else None
    if read_sums(folder).get(MANIFEST) == hashlib.sha256(content).hexdigest():
        if found != content:
            logger.warning(f"{path} is lost or damaged. It is written again: its checksum is that of these settings.")
        return
    try:
        earlier = flat(json.loads(found)) if found else None
    except (ValueError, AttributeError):
        earlier = None
    if earlier is None:
        what = f"no {MANIFEST}" if found is None else f"a damaged {MANIFEST}"
        raise ValueError(f"{folder} holds images but {what}: their sampling settings are unknown. {way_out}")
    if earlier.get("model.kind") == "lora" and earlier.get("model.negative_lora"):
        earlier.setdefault("model.negative_lora_on", "base")  # as it was before there was a choice
    now = flat(manifest)
    names = [*now, *(name for name in earlier if name not in now)]
    changes = [f"`{x}` {earlier.get(x)!r}, not {now.get(x)!r}" for x in names if earlier.get(x) != now.get(x)]
    if changes:
        raise ValueError(f"The images in {folder} were sampled with {'; '.join(changes)}. {way_out}")


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Turns `{"a": {"b": 1}}` into `{"a.b": 1}`."""
    parts = {}
    for name, value in settings.items():
        parts |= {f"{name}.{key}": x for key, x in flat(value).items()} if isinstance(value, dict) else {name: value}
    return parts


def set_scheduler(pipeline: DiffusionPipeline, name: str | None) -> None:
    """
    Replaces the scheduler of a pipeline by another one with the same noise schedule.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        name (`str`, *optional*):
            Class name of the scheduler in diffusers. By default, the pipeline keeps its own.

    Raises:
        `ValueError`: If the scheduler does not fit the model.
    """
    if name is None:
        return
    fitting = {scheduler.__name__: scheduler for scheduler in pipeline.scheduler.compatibles}
    if name not in fitting:
        raise ValueError(
            f"`scheduler` {name!r} does not fit a model with {type(pipeline.scheduler).__name__}; these fit: "
            f"{', '.join(sorted(fitting))}."
        )
    pipeline.scheduler = fitting[name].from_config(pipeline.scheduler.config)


def sample_rows(
    pipeline: DiffusionPipeline,
    rows: list[ImageRow],
    protocol: Protocol,
    batch_size: int,
    disable_tqdm: bool,
    name: str,
) -> None:
    """
    Samples images and writes them to their files.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, with the protocol's scheduler.
        rows (`list[ImageRow]`):
            The images.
        protocol ([`Protocol`]):
            Sampling settings.
        batch_size (`int`):
            Number of images per batch.
        disable_tqdm (`bool`):
            Whether to hide the progress bar.
        name (`str`):
            Name of the model, for the progress bar.
    """
    further = further_settings(pipeline, protocol, name)
    steps = family_of(type(pipeline)).sampling_defaults(pipeline.config).get("num_inference_steps")
    if steps not in (None, protocol.num_inference_steps):
        logger.warning(
            f"{name} is distilled to {steps} steps and sampled with {protocol.num_inference_steps}: pass "
            f"`num_inference_steps={steps}` (`--num_inference_steps {steps}`) to see it as it is meant to be used."
        )
    with tqdm(total=len(rows), desc=f"Sampling with {name}", unit="image", disable=disable_tqdm) as bar:
        for batch in batched(rows, batch_size):
            images = sample_images(
                pipeline,
                [row.prompt.text for row in batch],
                seed=protocol.seed,
                batch_size=batch_size,
                num_inference_steps=protocol.num_inference_steps,
                guidance_scale=protocol.guidance_scale,
                height=protocol.height,
                width=protocol.width,
                keys=[f"{row.prompt.id}/{row.index}" for row in batch],
                disable_tqdm=True,
                **further,
            )
            paths = [row.path for row in batch]
            write_images(dict(zip(paths, in_threads(png_of, images), strict=True)), PartialState().process_index)
            bar.update(len(batch))


def further_settings(pipeline: DiffusionPipeline, protocol: Protocol, name: str) -> dict[str, Any]:
    """
    The arguments of the pipeline's call for the settings that only some pipelines take. Warns of those that this one does not
    take: a protocol may be for models of several families. Where a pipeline would draw another size and resize the image, a size
    that the protocol sets is drawn.
    """
    given = {key: getattr(protocol, key) for key in OF_SOME_PIPELINES if getattr(protocol, key) is not None}
    taken = inspect.signature(pipeline.__call__).parameters
    if others := [key for key in given if key not in taken]:
        logger.warning(f"{name} is sampled without {' and '.join(others)}: a `{type(pipeline).__name__}` takes none.")
    settings = {key: value for key, value in given.items() if key in taken}
    if "use_resolution_binning" in taken and (protocol.height or protocol.width):
        settings["use_resolution_binning"] = False
    if "true_cfg_scale" not in settings:
        return settings
    guidance = family_of(type(pipeline)).guidance_arguments(settings["true_cfg_scale"])
    return {"negative_prompt": guidance.get("negative_prompt", "")} | settings


def check_branches(spec: ModelSpec, pipeline_class: type[DiffusionPipeline], protocol: Protocol) -> None:
    """Refuses a negative LoRA where the model would be sampled without the unconditional branch that it is for."""
    if spec.negative_lora is None:
        return
    family = family_of(pipeline_class)
    has_true = default_argument(pipeline_class, "true_cfg_scale") is not None
    is_other = has_true and "true_cfg_scale" not in family.guidance_arguments(
        1.0
    )  # than `guidance_scale`, as for FLUX.1
    flag = "true_cfg_scale" if is_other else "guidance_scale"
    scale = protocol.true_cfg_scale if has_true and protocol.true_cfg_scale is not None else getattr(protocol, flag)
    if scale is None:
        scale = guidance_without(spec) if flag == "guidance_scale" else default_argument(pipeline_class, flag)
    if scale is not None and scale <= family.unguided_scale:
        raise ValueError(
            f"{spec.name} has a negative LoRA, and without guidance it would have no effect: a `{pipeline_class.__name__}` has an "
            f"unconditional branch only with a `{flag}` above {family.unguided_scale:g}, and it is {scale}. Pass `--{flag}`, such as "
            "2.0, or set it in the protocol."
        )


def png_of(image: PIL.Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


# ----- folders of images -----


def match_images(folder: Path, prompt_set: PromptSet, images_per_prompt: int) -> list[ImageRow]:
    """
    Finds the images of prompts in a folder, either by their names `<prompt id>_<index>.png` (or `.jpg`, `.jpeg`,
    `.webp`), or by a `metadata.jsonl` in the format of `datasets`: one line per image, with `file_name` and either
    `prompt_id` or `prompt`. The first line of a prompt is its image 0.

    Args:
        folder (`Path`):
            The folder.
        prompt_set ([`PromptSet`]):
            The prompts.
        images_per_prompt (`int`):
            How many images each must have.

    Returns:
        `list[ImageRow]`: the images, by prompt in the order of the set, and by index.

    Raises:
        `ValueError`: If images are missing, with their number and the first few; if two are of one place.
    """
    by_metadata = (folder / METADATA_FILE).is_file()
    found = images_of_metadata(folder, prompt_set) if by_metadata else images_of_names(folder)
    rows, missing = [], []
    for prompt in prompt_set.prompts:
        for index in range(images_per_prompt):
            path = found.get((prompt.id, index))
            if path is None:
                missing.append(f"{prompt.id}_{index}")
            else:
                rows.append(ImageRow(prompt, index, path))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(missing) + len(rows)} images: {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}. Each image needs the name `<prompt id>_<index>.png`, or a line "
            f"in {METADATA_FILE} with its `file_name` and its `prompt_id` or `prompt`."
        )
    if extra := len(found) - len(rows):
        logger.warning(
            f"{folder} holds {extra} images that are not among the {len(rows)} of this comparison. They are ignored."
        )
    return rows


def images_of_names(folder: Path) -> dict[tuple[str, int], Path]:
    """Images by prompt id and index, or by file name and -1 if the name does not contain both."""
    found = {}
    for path in sorted(filter(is_image, folder.iterdir())):
        numbered = NUMBERED.fullmatch(path.stem)
        place = (numbered[1], int(numbered[2])) if numbered else (path.name, -1)
        if place in found:
            raise ValueError(
                f"{found[place]} and {path} are both image {place[1]} of the prompt {place[0]}: keep one of them."
            )
        found[place] = path
    return found


def images_of_metadata(folder: Path, prompt_set: PromptSet) -> dict[tuple[str, int], Path]:
    """Images by prompt id and index, or by text and index if no prompt has this text."""
    path, found, counts = folder / METADATA_FILE, {}, Counter()
    texts = Counter(prompt.text for prompt in prompt_set.prompts)
    ids = {prompt.text: prompt.id for prompt in prompt_set.prompts}
    for number, row in enumerate(read_jsonl(path)):
        where = f"Row {number} of {path}, counted from 0,"
        if "file_name" not in row or not {"prompt_id", "prompt"} & row.keys():
            raise ValueError(
                f"{where} must have `file_name` and either `prompt_id` or `prompt`; it has {', '.join(row)}."
            )
        check_relative_path(row["file_name"], f"`file_name` in row {number} of {path.name}")
        if not (folder / row["file_name"]).is_file():
            raise ValueError(f"{where} names {row['file_name']}, which does not exist.")
        if "prompt_id" not in row and texts[row["prompt"]] > 1:
            raise ValueError(f"{where} has a text that several prompts share: name the prompt with `prompt_id`.")
        prompt_id = str(row["prompt_id"]) if "prompt_id" in row else ids.get(row["prompt"], f"no id: {row['prompt']}")
        found[prompt_id, counts[prompt_id]] = folder / row["file_name"]
        counts[prompt_id] += 1
    return found
