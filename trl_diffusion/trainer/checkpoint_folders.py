# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
The folders of checkpoints and of a saved model, on the disk: each is there whole or not at all.

All that is being written, replaced or deleted lies in the folder `.saving` of the output directory, and is renamed into it or out
of it. What a killed run has left there is put back or deleted by [`clear_left_overs`].
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..backbones.names import INDEX
from ..cards.facts import EVALUATION_NAME, FACTS_NAME, PICTURES, RECIPE_NAME
from ..files import TEMPORARY, describe_write_error, sha256_of, sync, write_file


SAVING = ".saving"
REPLACED, DELETED, MODEL = "replaced", "deleted", "model"  # in it
LIST_NAME = "checkpoint_files.json"
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
STATE_SUFFIXES = (".pt", ".pth")
RNG_FILE = re.compile(r"rng_state(?:_(\d+))?\.pth")
# What FSDP and DeepSpeed save an optimizer in
OTHER_OPTIMIZERS = ("optimizer.bin", "optimizer_*", "global_step*")
# Files of a run that are written by `write_file`, by their folder
WRITTEN = {
    "": re.compile("|".join(map(re.escape, ("README.md", FACTS_NAME, RECIPE_NAME, EVALUATION_NAME)))),
    PICTURES: re.compile(r"(sample-\d+(-base)?|teaser|curves|masks)\.(png|webp)|samples\.json"),
    "samples": re.compile(r"step-\d+\.png"),
}


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of an output directory by their steps, the first one first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps of a checkpoint, from its name."""
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])


# ----- whole or not at all -----


def put_in_place(written: Path, place: Path) -> None:
    """
    Renames a folder or file that is complete to where it belongs. What was there before is kept until then, and comes back by
    [`clear_left_overs`] where the run is killed in between.

    Args:
        written (`Path`):
            What is complete, in the folder `.saving` beside the place.
        place (`Path`):
            Its place.
    """
    replaced = place.parent / SAVING / REPLACED / place.name
    if place.is_dir():
        replaced.parent.mkdir(parents=True, exist_ok=True)
        os.replace(place, replaced)
    os.replace(written, place)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(folder: Path) -> None:
    """Deletes a folder: under its name it is there whole or not at all."""
    saving = folder.parent / SAVING
    (saving / DELETED).mkdir(parents=True, exist_ok=True)
    os.replace(folder, saving / DELETED / folder.name)
    shutil.rmtree(saving, ignore_errors=True)


def clear_left_overs(folder: Path) -> None:
    """Puts back or deletes what a killed run has left in a folder: nothing but what this library has written."""
    saving = folder / SAVING
    for replaced in (saving / REPLACED).glob("*"):
        if not (folder / replaced.name).exists():
            os.replace(replaced, folder / replaced.name)
    shutil.rmtree(saving, ignore_errors=True)
    for name, own in WRITTEN.items():
        for path in (folder / name).glob(f"*{TEMPORARY}"):
            if own.fullmatch(path.name.removesuffix(TEMPORARY)):
                path.unlink(missing_ok=True)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """
    Yields a new folder. What is written there replaces what has its names in `folder`, all at the end or nothing.

    Args:
        folder (`Path`):
            The folder, such as an output directory. It may not exist.

    Raises:
        `ValueError`: If it cannot be written, for example because the disk is full.
    """
    aside = folder / SAVING / MODEL
    clear_left_overs(folder)
    try:
        aside.mkdir(parents=True)
        yield aside
        sync(*aside.rglob("*"), aside)
        (folder / LIST_NAME).unlink(missing_ok=True)  # of a checkpoint that is not what was saved any more
        for written in sorted(aside.iterdir()):
            put_in_place(written, folder / written.name)
        sync(folder)
    except Exception as error:
        if not (described := describe_write_error(error)):
            raise
        reason, way_out = described
        raise ValueError(
            f"The model cannot be saved in {folder}: {reason}. What was there before is safe. {way_out} and save it again; a "
            "training that is resumed from its last checkpoint saves it too."
        ) from error
    finally:
        clear_left_overs(folder)


def finish_checkpoint(written: Path, place: Path, denoiser_name: str) -> None:
    """
    Makes a checkpoint of a folder that all processes have written to: lists its files, waits for the disk, and renames it.

    Args:
        written (`Path`):
            The folder, in `.saving` beside the place.
        place (`Path`):
            Its place.
        denoiser_name (`str`):
            The folder of the denoiser, where all of its weights are trained.
    """
    write_list(written, denoiser_name, next(reversed(checkpoints_in(place.parent)), None))
    sync(*written.rglob("*"), written)
    put_in_place(written, place)
    sync(place.parent)
    shutil.rmtree(place.parent / SAVING, ignore_errors=True)


def rotate(output_dir: Path, step: int, limit: int | None, best_step: int | None, kept: Iterable[Path]) -> None:
    """
    Deletes the first checkpoints of a run, so that `limit` are left. The last and the best one stay, and so does what is not the
    run's: checkpoints of later steps, which an earlier run has left, and those that were passed over because they are not whole.

    Args:
        output_dir (`Path`):
            The output directory.
        step (`int`):
            The optimizer step of the checkpoint that was saved last.
        limit (`int`, *optional*):
            How many are kept, `save_total_limit`. `None` or 0 keeps all.
        best_step (`int`, *optional*):
            The optimizer step of the best one.
        kept (`Iterable[Path]`):
            Those that were passed over.
    """
    if not limit or limit < 0:
        return
    passed_over = {path.name for path in kept}
    own = [path for path in checkpoints_in(output_dir) if step_of(path) <= step and path.name not in passed_over]
    protected = {step, best_step}
    free = [path for path in own if step_of(path) not in protected]
    surplus = len(own) - max(limit, len(own) - len(free))
    for path in free[: max(surplus, 0)]:
        discard(path)


# ----- whether one is whole -----


def write_list(folder: Path, denoiser_name: str, earlier: Path | None = None) -> None:
    """
    Lists the files of a checkpoint with their sizes and checksums: those that a training is resumed from, and the frozen ones.

    Args:
        folder (`Path`):
            The folder of the checkpoint.
        denoiser_name (`str`):
            The folder of the denoiser, where all of its weights are trained.
        earlier (`Path`, *optional*):
            An earlier checkpoint, whose list tells of the files that both share by a link.
    """
    frozen = _components(folder) - {denoiser_name}
    known = _frozen_files(earlier) if earlier else {}
    entries: dict[str, dict[str, Any]] = {"needed": {}, "frozen": {}}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entry = known.get(name) if name in known and _is_one_file(path, earlier / name) else None
        entry = entry or {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        entries["frozen" if name.split("/")[0] in frozen else "needed"][name] = entry
    write_file(folder / LIST_NAME, (json.dumps(entries, indent=2) + "\n").encode())


def what_is_wrong(checkpoint: Path) -> str | None:
    """
    Looks whether a training can be resumed from a checkpoint: whether all files are there and are what was saved. One without a
    list of them, of an older version or from the Hub, is looked at as far as the files tell.

    Args:
        checkpoint (`Path`):
            The folder.

    Returns:
        `str` or `None`: the first thing that is wrong, which names a file; `None` if it is whole.
    """
    try:
        return _what_is_wrong(checkpoint)
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read: {error.strerror}"


def spoiled_components(checkpoint: Path) -> list[str]:
    """What is wrong with the frozen components of a checkpoint, which no training is resumed from."""
    found = (_difference(checkpoint, name, entry) for name, entry in _frozen_files(checkpoint).items())
    return [wrong for wrong in found if wrong]


def _what_is_wrong(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        return "there is no such folder"
    is_listed = (checkpoint / LIST_NAME).exists()
    if is_listed:
        try:
            needed = _read_json(checkpoint / LIST_NAME)["needed"]
            found = (_difference(checkpoint, name, entry) for name, entry in needed.items())
            if wrong := next((wrong for wrong in found if wrong), None):
                return wrong
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{LIST_NAME} cannot be read"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    has_optimizer = any(any(checkpoint.glob(name)) for name in (OPTIMIZER_NAME, *OTHER_OPTIMIZERS))
    if not has_optimizer and is_listed:
        return f"it holds the model alone, and no {OPTIMIZER_NAME}, as `save_only_model` saves it"
    if not has_optimizer or not (checkpoint / SCHEDULER_NAME).is_file() and not any(checkpoint.glob("global_step*")):
        return f"{SCHEDULER_NAME if has_optimizer else OPTIMIZER_NAME} is missing"
    if wrong := _missing_rng(checkpoint, is_listed):
        return wrong
    for path in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        if wrong := _unreadable(path, is_listed):
            return wrong
    return None if is_listed else _unreadable_weights(checkpoint)


def _missing_rng(checkpoint: Path, is_listed: bool) -> str | None:
    """What is missing of the generators' states; a machine with a disk of its own lists those of its processes alone."""
    found = [match[1] for path in checkpoint.iterdir() if (match := RNG_FILE.fullmatch(path.name))]
    if not found:
        return "rng_state.pth is missing"
    if is_listed:
        return None
    numbers = {int(number) for number in found if number is not None}
    missing = sorted(set(range(max(numbers, default=0))) - numbers) if numbers else []
    return f"rng_state_{missing[0]}.pth is missing" if missing else None


def _unreadable(path: Path, is_listed: bool) -> str | None:
    """What is wrong with a file of a checkpoint; the bytes of listed ones are known to be right."""
    if path.suffix == ".json":
        try:
            if not isinstance(_read_json(path), dict):
                raise ValueError("no object")
        except ValueError:
            return f"{path.name} is no JSON"
    if path.suffix in STATE_SUFFIXES:
        try:
            with zipfile.ZipFile(path) as archive:
                if not is_listed and (damaged := archive.testzip()):
                    return f"{path.name} is damaged, in {damaged}"
            with safe_globals():
                torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except zipfile.BadZipFile:
            return f"{path.name} is damaged or cut off"
        except Exception as error:  # whatever unpickling raises
            if isinstance(error, OSError):
                raise
            return f"{path.name} holds something else than tensors and numbers, and is not loaded"
    return None


def _unreadable_weights(checkpoint: Path) -> str | None:
    """What is wrong with the weights of a checkpoint whose files are not listed. A changed value is not seen."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    if not files:
        return "there are no weights, files that end in .safetensors"
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"{path.relative_to(checkpoint)} is damaged or cut off"
    for path in sorted(checkpoint.rglob("*.json")):
        name = path.relative_to(checkpoint)
        try:
            content = _read_json(path)
        except ValueError:
            return f"{name} is no JSON"
        shards = set(content["weight_map"].values()) if path.name.endswith(".safetensors.index.json") else ()
        if missing := sorted(shard for shard in shards if not (path.parent / shard).is_file()):
            return f"{name.parent / missing[0]} is missing"
    return None


def _difference(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = checkpoint / name
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{name} has {size} bytes in place of {entry['bytes']}"
    return (
        None if sha256_of(path) == entry["sha256"] else f"{name} is damaged: its bytes are not those that were saved"
    )


def _frozen_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The frozen files that a checkpoint lists; none where its list is missing or damaged."""
    try:
        return dict(_read_json(checkpoint / LIST_NAME)["frozen"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _is_one_file(path: Path, other: Path) -> bool:
    return other.is_file() and path.samefile(other)


def _components(folder: Path) -> set[str]:
    return set(_read_json(folder / INDEX)) if (folder / INDEX).exists() else set()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
