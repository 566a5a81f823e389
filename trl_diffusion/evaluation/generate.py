# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The images of a comparison: the same noise for every model, and after a stop the same command again.

The noise of an image follows from the seed, its prompt's id and its number among the prompt's images. Neither the batch size
nor the order nor the other prompts nor the number of processes bears on it, so what is there stays as it is, and a run draws
what is missing.
"""

import gc
import io
import json
import logging
import re
from collections import Counter
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..batching import batched, in_threads
from ..files import write_file
from ..sampling import sample_images
from .models import METADATA_FILE, ModelSpec, guidance_of, is_image, load_pipeline, resolve_dtype
from .prompts import Prompt, PromptSet, read_jsonl
from .protocols import SETTINGS, Protocol


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PACKAGES = ("diffusers", "torch")
PATIENCE = timedelta(days=7)  # for the slowest process; a process group's default may be ten minutes
NUMBERED = re.compile(r"(.+)_(\d+)")  # a prompt's id, and the image's index


class ImageRow(NamedTuple):
    """
    An image of a model.

    Args:
        prompt ([`Prompt`]):
            Its prompt.
        index (`int`):
            Its number among the images of the prompt.
        path (`Path`):
            Its file.
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
    Draws a model's images, or what is left of them, into `<output_dir>/images/<model>/<prompt id>_<index>.png`. Processes
    that `accelerate` or `torchrun` started share the work. The images of a folder of images are found and not drawn.

    Args:
        spec ([`ModelSpec`]):
            The model.
        prompt_set ([`PromptSet`]):
            The prompts. More of the same set may be drawn into the same folder later.
        protocol ([`Protocol`]):
            How to draw. More images a prompt may be drawn later too.
        output_dir (`str` or `Path`):
            The folder of the evaluation.
        batch_size (`int`, *optional*, defaults to `8`):
            Images that a process draws at a time.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights, see [`evaluation.models.resolve_dtype`].
        use_cpu (`bool`, *optional*, defaults to `False`):
            Draw on the CPU where there is a GPU as well.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress.

    Returns:
        `list[ImageRow]`: the images, by prompt in the order of the set, and by index.

    Raises:
        `ValueError`: If the folder holds images that were drawn with other settings; says which. If another process is
            drawing into it, the scheduler does not fit the model, or the disk is full. If a folder of images lacks some.
    """
    if spec.kind == "images":
        return match_images(Path(spec.path), prompt_set, protocol.images_per_prompt)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    state = PartialState(cpu=use_cpu, timeout=PATIENCE)
    folder = Path(output_dir) / "images" / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    dtype = resolve_dtype(dtype, state.device)
    manifest = {
        "prompts": {"name": prompt_set.name, "revision": prompt_set.revision, "digest": prompt_set.digest},
        "protocol": {name: getattr(protocol, name) for name in SETTINGS if name != "images_per_prompt"},
        "model": spec.describe(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in PACKAGES},
    }
    check_manifest(folder, manifest)
    state.wait_for_everyone()  # nobody writes before all have looked
    lock = FileLock(folder / ".lock")
    if state.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"Another process is drawing into {folder}. Wait for it, or stop it.") from error
        write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    try:
        rows = [
            ImageRow(prompt, index, folder / f"{prompt.id}_{index}.png")
            for prompt in prompt_set.prompts
            for index in range(protocol.images_per_prompt)
        ]
        missing = [row for row in rows if not row.path.exists()]
        state.wait_for_everyone()  # all deal out the same images
        share = missing[state.process_index :: state.num_processes]
        if share:
            pipeline = load_pipeline(spec, dtype, state.device)
            set_scheduler(pipeline, protocol.scheduler)
            with guidance_of(spec, pipeline):
                draw(pipeline, share, protocol, batch_size, disable_tqdm or not state.is_main_process, spec.name)
            del pipeline
            gc.collect()  # models refer to themselves in circles, and the next one needs the room
            if state.device.type == "cuda":
                torch.cuda.empty_cache()
        state.wait_for_everyone()
    finally:
        lock.release()
    return rows


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """
    Checks that what a folder holds was drawn as the rest will be.

    Args:
        folder (`Path`):
            The folder of a model's images.
        manifest (`dict`):
            What these depend on.

    Raises:
        `ValueError`: If they depend on something else; says on what.
    """
    path = folder / MANIFEST
    way_out = "Choose another `output_dir`, or delete that folder to draw all images again."
    if not path.exists():
        if any(folder.glob("*.png")):
            raise ValueError(f"{folder} holds images and no {MANIFEST}: how they were drawn is not known. {way_out}")
        return
    earlier, now = flat(json.loads(path.read_text(encoding="utf-8"))), flat(manifest)
    changes = [f"`{name}` {earlier.get(name)!r}, not {now[name]!r}" for name in now if earlier.get(name) != now[name]]
    if changes:
        raise ValueError(f"The images in {folder} were drawn with {'; '.join(changes)}. {way_out}")


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    parts = {}
    for name, value in settings.items():
        parts |= {f"{name}.{key}": x for key, x in flat(value).items()} if isinstance(value, dict) else {name: value}
    return parts


def set_scheduler(pipeline: DiffusionPipeline, name: str | None) -> None:
    """
    Gives a pipeline another scheduler of the same noise schedule.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        name (`str`, *optional*):
            The scheduler's class in diffusers. The pipeline keeps its own if left out.

    Raises:
        `ValueError`: If it does not fit; names those that do.
    """
    if name is None:
        return
    fitting = {scheduler.__name__: scheduler for scheduler in pipeline.scheduler.compatibles}
    if name not in fitting:
        raise ValueError(
            f"`scheduler` {name!r} does not fit a model made for {type(pipeline.scheduler).__name__}; these do: "
            f"{', '.join(sorted(fitting))}."
        )
    pipeline.scheduler = fitting[name].from_config(pipeline.scheduler.config)


def draw(
    pipeline: DiffusionPipeline,
    rows: list[ImageRow],
    protocol: Protocol,
    batch_size: int,
    disable_tqdm: bool,
    name: str,
) -> None:
    """
    Draws images into their files.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, with the protocol's scheduler.
        rows (`list[ImageRow]`):
            The images.
        protocol ([`Protocol`]):
            How to draw them.
        batch_size (`int`):
            Images drawn at a time.
        disable_tqdm (`bool`):
            Show no progress.
        name (`str`):
            Name of the model, for the progress bar.
    """
    with tqdm(total=len(rows), desc=f"Drawing with {name}", unit="image", disable=disable_tqdm) as bar:
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
            )
            in_threads(write_image, zip(batch, images, strict=True))
            bar.update(len(batch))


def write_image(drawn: tuple[ImageRow, PIL.Image.Image]) -> None:
    """Writes an image whole or not at all, so that a file that is there is one that is done."""
    row, image = drawn
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_file(row.path, buffer.getvalue())


# ----- folders of images -----


def match_images(folder: Path, prompt_set: PromptSet, images_per_prompt: int) -> list[ImageRow]:
    """
    Finds the images of prompts in a folder: by their names, `<prompt id>_<index>.png` (or `.jpg`, `.jpeg`, `.webp`), or by a
    `metadata.jsonl` beside them, as `datasets` reads it: a line for each image, with `file_name` and either `prompt_id` or
    `prompt`, where the first line of a prompt is its image 0.

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
            f"{' and others' if len(missing) > 5 else ''}. It must hold an image `<prompt id>_<index>.png` for each, or "
            f"a line in {METADATA_FILE} with its `file_name` and its `prompt_id` or `prompt`."
        )
    if extra := len(found) - len(rows):
        logger.warning(f"{folder} holds {extra} images beside the {len(rows)} of this comparison, which are left out.")
    return rows


def images_of_names(folder: Path) -> dict[tuple[str, int], Path]:
    """Images by prompt id and index, or by their names where these say neither."""
    found = {}
    for path in sorted(filter(is_image, folder.iterdir())):
        numbered = NUMBERED.fullmatch(path.stem)
        place = (numbered[1], int(numbered[2])) if numbered else (path.name, -1)
        if place in found:
            raise ValueError(
                f"{found[place]} and {path} are both image {place[1]} of the prompt {place[0]}: keep one."
            )
        found[place] = path
    return found


def images_of_metadata(folder: Path, prompt_set: PromptSet) -> dict[tuple[str, int], Path]:
    """Images by prompt id and index, or by their text where no prompt has it."""
    path, found, counts = folder / METADATA_FILE, {}, Counter()
    texts = Counter(prompt.text for prompt in prompt_set.prompts)
    ids = {prompt.text: prompt.id for prompt in prompt_set.prompts}
    for number, row in enumerate(read_jsonl(path)):
        where = f"Row {number} of {path}, counted from 0,"
        if "file_name" not in row or not {"prompt_id", "prompt"} & row.keys():
            raise ValueError(
                f"{where} must have `file_name` and either `prompt_id` or `prompt`; it has {', '.join(row)}."
            )
        if not (folder / row["file_name"]).is_file():
            raise ValueError(f"{where} names {row['file_name']}, which is not there.")
        if "prompt_id" not in row and texts[row["prompt"]] > 1:
            raise ValueError(f"{where} has a prompt that stands twice among the prompts: tell which by `prompt_id`.")
        prompt_id = str(row["prompt_id"]) if "prompt_id" in row else ids.get(row["prompt"], f"no id: {row['prompt']}")
        found[prompt_id, counts[prompt_id]] = folder / row["file_name"]
        counts[prompt_id] += 1
    return found
