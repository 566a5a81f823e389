# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The pictures of a model card, in the folder `images` of the output directory. They are below 2 MB together."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
from datasets import Dataset, IterableDataset

from ..cards.facts import PICTURES, Sample
from ..cards.pictures import WIDTH, draw_curves, draw_teaser, encoded
from ..data.formats import check_preference
from ..files import write_file
from ..visualization import image_grid, instance_pictures


SAMPLES_NAME, CURVES_NAME, MASKS_NAME = "samples.json", "curves.png", "masks.png"
OF_SAMPLES = re.compile(r"(sample-\d+(-base)?|teaser)\.(png|webp)|samples\.json")
MOST_SAMPLES, TEASER_PROMPTS = 8, 3
SAMPLES_BYTES, TEASER_BYTES, MASKS_BYTES = 1_000_000, 300_000, 400_000
MOST_READ, MOST_STREAMED = 10_000, 500  # rows, in the search for those that have a mask


class CardPictures(NamedTuple):
    """
    The pictures of a card, by their paths relative to it.

    Attributes:
        samples (`list[cards.facts.Sample]`):
            What was sampled last.
        teaser (`str` or `None`), curves (`str` or `None`), masks (`str` or `None`):
            Base and policy side by side; what was logged; masks over training images.
    """

    samples: list[Sample]
    teaser: str | None
    curves: str | None
    masks: str | None


def write_card_pictures(
    output_dir: str | Path, log_history: list[dict[str, Any]], global_step: int | None = None
) -> CardPictures:
    """
    Draws the curves, and finds the pictures that the training has left. Nothing is sampled.

    Args:
        output_dir (`str` or `Path`):
            The output directory.
        log_history (`list[dict]`):
            What was logged.
        global_step (`int`, *optional*):
            Optimizer steps of the model that the card is of. What was sampled later, by another run, is not of it. Defaults to the
            last step that was logged.

    Returns:
        [`trainer.card_pictures.CardPictures`]
    """
    folder = Path(output_dir) / PICTURES
    if global_step is None:
        global_step = log_history[-1]["step"] if log_history else 0
    curves = draw_curves(log_history)
    if curves is None:
        (folder / CURVES_NAME).unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CURVES_NAME, curves)
    known = read_samples(folder)
    if known is None or known["step"] > global_step or not are_there(folder, known):
        samples, teaser = [], None
    else:
        pairs = zip(known["prompts"], known["images"], strict=True)
        samples = [Sample(prompt, *(f"{PICTURES}/{name}" for name in names)) for prompt, names in pairs]
        teaser = f"{PICTURES}/{known['teaser']}"
    has_masks = global_step > 0 and (folder / MASKS_NAME).exists()
    return CardPictures(
        samples, teaser, curves and f"{PICTURES}/{CURVES_NAME}", f"{PICTURES}/{MASKS_NAME}" if has_masks else None
    )


# ----- samples -----


def save_samples(
    output_dir: str | Path,
    prompts: list[str],
    base_images: list[PIL.Image.Image],
    images: list[PIL.Image.Image],
    step: int,
    sample_model: str | None = None,
) -> None:
    """
    Saves what was sampled for the first 8 prompts, in place of what was sampled before.

    Args:
        output_dir (`str` or `Path`):
            The output directory.
        prompts (`list[str]` of length `n`):
            The prompts.
        base_images (`list[PIL.Image.Image]` of length `n`), images (`list[PIL.Image.Image]` of length `n`):
            Images of the base and of the policy.
        step (`int`):
            The optimizer step.
        sample_model (`str`, *optional*):
            The model that has drawn them, where it is another one than the base.
    """
    folder = Path(output_dir) / PICTURES
    prompts, base_images, images = prompts[:MOST_SAMPLES], base_images[:MOST_SAMPLES], images[:MOST_SAMPLES]
    clear_samples(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    max_bytes = SAMPLES_BYTES // (2 * len(prompts))
    names = []
    for number, pair in enumerate(zip(images, base_images, strict=True)):
        of_pair = []
        for image, end in zip(pair, ("", "-base"), strict=True):
            content, suffix = encoded(image, max_bytes)
            of_pair.append(f"sample-{number}{end}{suffix}")
            write_file(folder / of_pair[-1], content)
        names.append(of_pair)
    name = Path(sample_model).name if sample_model else None
    after = f"after {step} steps" if step != 1 else "after 1 step"
    labels = (name, f"{name} with the LoRA, {after}") if name else ("base", after)
    some = slice(TEASER_PROMPTS)
    teaser = draw_teaser(base_images[some], images[some], prompts[some], labels)
    if suffix == ".png":  # of tiny images, without loss like these
        content = small_png(teaser, TEASER_BYTES)
    else:
        content, suffix = encoded(teaser, TEASER_BYTES)
    write_file(folder / f"teaser{suffix}", content)
    known = {"step": step, "model": name, "prompts": prompts, "images": names, "teaser": f"teaser{suffix}"}
    write_file(folder / SAMPLES_NAME, (json.dumps(known, indent=2, ensure_ascii=False) + "\n").encode())


def read_samples(folder: Path) -> dict[str, Any] | None:
    """What [`trainer.card_pictures.save_samples`] says of the pictures in a folder."""
    path = folder / SAMPLES_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def are_there(folder: Path, known: dict[str, Any]) -> bool:
    """Whether nobody has deleted one of the pictures."""
    return all(
        (folder / name).exists() for name in [known["teaser"], *(name for pair in known["images"] for name in pair)]
    )


def clear_samples(output_dir: str | Path) -> None:
    """Deletes what was sampled before."""
    for path in (Path(output_dir) / PICTURES).glob("*"):
        if OF_SAMPLES.fullmatch(path.name):
            path.unlink()


def clear_masks(output_dir: str | Path) -> None:
    """Deletes the picture of the masks."""
    (Path(output_dir) / PICTURES / MASKS_NAME).unlink(missing_ok=True)


# ----- masks -----


def save_masks(
    output_dir: str | Path,
    rows: Dataset | IterableDataset,
    number: int,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    **settings: Any,
) -> None:
    """
    Draws the first rows that have an instance which contradicts the label, as they are trained on.

    Args:
        output_dir (`str` or `Path`):
            The output directory.
        rows ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training rows, with images. The first 10,000 are looked at, of a stream 500.
        number (`int`):
            How many to draw.
        collate (`Callable`):
            The collator.
        settings:
            Those of [`visualization.instance_pictures`].
    """
    found = list(rows_with_conflict(rows, number))
    if not found:
        return
    pictures = [instance_pictures(collate([row]), row, **settings) for row in found]
    grid = image_grid(pictures, ["chosen", "rejected"], [row["prompt"] for row in found], size=WIDTH // 2 - 12)
    folder = Path(output_dir) / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / MASKS_NAME, small_png(grid, MASKS_BYTES))


def rows_with_conflict(rows: Dataset | IterableDataset, number: int) -> Iterator[dict[str, Any]]:
    """The first rows with an instance that contradicts the label."""
    if "instances" not in (rows.column_names or ["instances"]):
        return
    if isinstance(rows, Dataset):  # without their images
        some = rows.select_columns(["instances"]).take(min(MOST_READ, len(rows)))
        places = (place for place, row in enumerate(some) if has_conflict(row["instances"]))
        candidates: Iterable[dict[str, Any]] = (rows[place] for place in places)
    else:
        candidates = (row for row in rows.take(MOST_STREAMED) if has_conflict(row.get("instances")))
    for _, row in zip(range(number), candidates):
        yield row


def has_conflict(instances: list[dict[str, Any]] | None) -> bool:
    return any(check_preference(instance["preference"]) == "rejected" for instance in instances or [])


def small_png(picture: PIL.Image.Image, max_bytes: int) -> bytes:
    """A picture as PNG: where that is too large with 256 colours, and then smaller."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    while len(buffer.getvalue()) > max_bytes and min(picture.size) > 1:
        buffer = io.BytesIO()
        picture.quantize(256).save(buffer, "PNG", optimize=True)
        picture = picture.resize([max(1, side * 3 // 4) for side in picture.size], PIL.Image.Resampling.LANCZOS)
    return buffer.getvalue()
