# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""An HTML page that shows the annotations of a few rows, to check before a run."""

import base64
import io
from collections import Counter
from dataclasses import asdict
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import PIL.Image
from datasets import Dataset, IterableDataset

from ..criteria import Criteria
from ..segmentation import decode_rle
from .attribute_expert import AttributeExpert
from .images import crop_around, limit_pixels
from .judge import Judge
from .records import ImageRecord, PairRecord, Record
from .run import Task
from .segmenter import Segmenter
from .tables import encode_row


SHOWN_PIXELS = 512 * 512
OUTLINE_SIDE = 256  # pixels of the longer side of a mask whose outline is drawn


def preview(task: Task, dataset: Dataset | IterableDataset) -> str:
    """
    Annotates rows and shows them: images with boxes, masks and crops with verdicts, or attributes, and every raw answer.

    Args:
        task ([`Task`]):
            The task.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            A few rows, with undecoded images.

    Returns:
        `str`: a self-contained HTML page.
    """
    records = [task.open(row) for row in dataset]
    for role in task.roles:
        role(records)
    roles = {type(role): role for role in task.roles}
    if Judge in roles:
        shown = [show_pair(record, roles[Judge]) for record in records]
    else:
        shown = [show_image(record, roles[AttributeExpert].criteria) for record in records]
    rows = [encode_row(record.to_row()) for record in records]
    models = [role.describe() for role in task.roles]
    template = resources.files("trl_diffusion").joinpath("templates", "preview.html").read_text(encoding="utf-8")
    return (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(
            dataset=task.description["dataset"]["name"],
            records=shown,
            counts=[*Counter(record.status for record in records).items(), *readable(task.count(rows))],
            models=" ".join(dict.fromkeys(model_name(role) for role in models)),
            pairs=Judge in roles,
            masks=any(isinstance(role, Segmenter) for role in task.roles),
        )
    )


def readable(counts: Counter) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), number) for name, number in counts.items()]


def model_name(description: dict[str, Any]) -> str:
    """The model of a role and its revision."""
    model = description["model"] if isinstance(description["model"], dict) else description
    return f"{model['model']} ({model['revision']})."


def show_pair(record: PairRecord, judge: Judge) -> dict[str, Any]:
    images = {"chosen": record.chosen, "rejected": record.rejected}
    readable_images = {name: image.upright for name, image in images.items() if image is not None and image.readable}
    instances = []
    for instance in record.instances:
        boxes = {"chosen": instance.chosen_box, "rejected": instance.rejected_box}
        crops = [crop_around(readable_images[name], boxes[name], judge.crop_size, judge.crop_margin) for name in boxes]
        outlines = {"chosen": instance.chosen_mask, "rejected": instance.rejected_mask}
        instances.append(
            asdict(instance)
            | {"crops": [inline(crop) for crop in crops]}
            | {f"{name}_outline": mask and outline(decode_rle(mask)) for name, mask in outlines.items()}
        )
    return {
        **heading(record),
        "images": {name: inline(image) for name, image in readable_images.items()},
        "instances": instances,
        "dropped": record.dropped,
        "without_mask": record.without_mask or [],
        "planner_answer": record.planner_answer,
    }


def show_image(record: ImageRecord, criteria: Criteria) -> dict[str, Any]:
    kinds = dict.fromkeys(record.positive_attributes, "positive") | dict.fromkeys(
        record.negative_attributes, "negative"
    )
    dimensions = {dimension: [] for dimension in criteria.dimensions}
    for attribute in criteria.attributes:
        if attribute.id in kinds:
            form = attribute.positive if kinds[attribute.id] == "positive" else attribute.negative
            dimensions[attribute.dimension].append((kinds[attribute.id], form))
    image = record.image if record.image is not None and record.image.readable else None
    return {
        **heading(record),
        "images": {"image": inline(image.upright)} if image else {},
        "dimensions": {name.replace("_", " "): forms for name, forms in dimensions.items()},
        "answers": record.answers,
    }


def heading(record: Record) -> dict[str, str]:
    return {"id": record.id, "prompt": record.prompt, "status": record.status, "reason": record.reason}


def inline(image: PIL.Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    # Without subsampling, because colors bleed visibly where a small image is enlarged
    limit_pixels(image, SHOWN_PIXELS).save(buffer, format="JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def outline(mask: np.ndarray) -> dict[str, Any]:
    """
    Traces the edges between the pixels inside and outside of a mask.

    Args:
        mask (`np.ndarray` of shape `(height, width)`):
            The mask: bool.

    Returns:
        `dict`: `path`, the edges as the data of an SVG path; `width` and `height`, of the picture in which they are.
    """
    image = PIL.Image.fromarray(mask)
    image.thumbnail((OUTLINE_SIDE, OUTLINE_SIDE), PIL.Image.Resampling.NEAREST)
    inside = np.array(image)
    framed = np.pad(inside, 1).astype(np.int8)
    level = [f"M{x} {y}H{end}" for y, x, end in edges(framed[:, 1:-1])]
    upright = [f"M{x} {y}V{end}" for x, y, end in edges(framed[1:-1].T)]
    return {"path": "".join(level + upright), "width": image.width, "height": image.height}


def edges(lines: np.ndarray) -> list[tuple[int, int, int]]:
    """
    Finds where lines of pixels differ from the ones before.

    Args:
        lines (`np.ndarray` of shape `(N, length)`):
            0 and 1; the first and the last line are 0.

    Returns:
        `list[tuple[int, int, int]]`: the number of a line less one, and the start and the end of each run of pixels that differ from the
        line before.
    """
    differ = np.pad(np.abs(np.diff(lines, axis=0)), ((0, 0), (1, 1)))
    turns = np.diff(differ, axis=1)
    starts, ends = np.argwhere(turns == 1), np.argwhere(turns == -1)
    return [(int(line), int(start), int(end)) for (line, start), (_, end) in zip(starts, ends, strict=True)]
