# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Single images with a label: columns, readable errors, pairs as labelled images."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets

from ..messages import cut, quoted, shown
from .column_checks import INTEGERS, bad_rows, nulls
from .columns import beside, column_names, for_table, numbered, with_column, without_decoding


logger = logging.getLogger(__name__)

PAIR = {"chosen": True, "rejected": False}


def labelled_image_features() -> Features:
    """
    The columns of [`DiffusionKTOTrainer`]: an image, and whether it is desirable.

    Returns:
        [`~datasets.Features`]
    """
    return Features({"id": Value("string"), "prompt": Value("string"), "image": Image(), "label": Value("bool")})


def row_label(row: dict[str, Any]) -> bool:
    """The label of a row. Raises a `ValueError` if it is neither true nor false, and neither 1 nor 0."""
    label = row.get("label")
    if not isinstance(label, int) or label not in (0, 1):
        raise ValueError(
            f"`label` of the row with id {shown(row.get('id'))} must be true (desirable) or false (undesirable), or 1 or 0, got "
            f"{shown(label)}. Correct it, or remove the row with `dataset.filter`."
        )
    return bool(label)


def label_faults(dataset: Dataset | IterableDataset, name: str) -> Iterator[str]:
    """
    What is wrong with the column `label`. The rows of a stream, or of a dataset with a transform, are checked when they are read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            Name of the parameter, for messages.

    Yields:
        `str`: what is wrong, and what to do.
    """
    feature = (dataset.features or {}).get("label")
    if feature is not None and feature not in [Value(kind) for kind in ("bool", "null", *INTEGERS)]:
        yield (
            f"The column `label` of `{name}` must contain true (desirable) or false (undesirable), or 1 or 0, got {cut(str(feature))}. "
            "Store it so; names or other numbers could mean anything."
        )
        return
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":
        return
    rows = bad_rows(dataset, "label", _are_no_labels)
    if len(rows):
        value = shown(dataset[int(rows[0])]["label"])
        yield (
            f"`label` is neither true nor false, and neither 1 nor 0, in {len(rows)} of the {len(dataset)} rows of `{name}`: it is {value} "
            f'in row {rows[0]}. Correct them, or remove them with `dataset.filter(lambda row: row["label"] in (0, 1))`.'
        )


def _are_no_labels(column: pa.ChunkedArray) -> np.ndarray:
    """Which values are null, or numbers but 0 and 1."""
    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        return nulls(column)
    return ~pc.is_in(column, pa.array([0, 1], column.type)).to_numpy(zero_copy_only=False)


def refuse_pairs(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises a `ValueError` that names [`unpair_pairs`] if a dataset has pairs in the place of single images."""
    if isinstance(dataset, Dataset | IterableDataset):
        present = column_names(dataset)
        if set(PAIR) <= set(present) and "image" not in present:
            raise ValueError(
                f"`{name}` has image pairs, in the columns {quoted(PAIR)}, and Diffusion-KTO learns from single images: "
                "`trl_diffusion.unpair_pairs` makes the columns `image` and `label` of them."
            )


def warn_of_one_label(dataset: Dataset | IterableDataset, name: str) -> None:
    """
    Says if all rows in memory have the same label. That is no error: the loss is defined for one label, and the images of that label
    are still compared with their mean.
    """
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":
        return
    labels = pc.unique(dataset.with_format("arrow").select_columns(["label"])[:]["label"]).to_pylist()
    if len(labels) == 1:
        logger.warning(
            f"Every row of `{name}` is {'desirable' if labels[0] else 'undesirable'}, so the model is not told what is "
            f"{'worse' if labels[0] else 'better'}. If this is not meant, look at the column `label`."
        )


def unpair_pairs(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Turns image pairs into labelled images for [`DiffusionKTOTrainer`]: the chosen image is desirable, the rejected one is not.

    A pair becomes two rows, one after the other. Their ids are the pair's followed by `/chosen` and `/rejected`. Other columns, such as
    `instances`, are left out. An image that is in several pairs is in as many rows, whose labels may differ.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs with the columns `prompt`, `chosen`, `rejected`, and `id`, which only a dataset in memory may lack.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: with the columns of [`labelled_image_features`]. No image of a dataset in
        memory is copied.

    Raises:
        `ValueError`: If a column is missing.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion import unpair_pairs

    dataset = unpair_pairs(load_dataset("user/pickapic-instance", split="train"))
    ```
    """
    present = column_names(dataset)
    if "id" not in present and isinstance(dataset, Dataset):
        dataset, present = numbered(dataset), [*present, "id"]
    wanted = ["id", "prompt", *PAIR]
    if missing := [column for column in wanted if column not in present]:
        raise ValueError(
            f"The dataset of pairs lacks {quoted(missing)}; it has {quoted(present)}. Rename columns with `dataset.rename_columns`, or add "
            "an `id` to a stream with `dataset.map`."
        )
    dataset = dataset.select_columns(wanted)
    if isinstance(dataset, IterableDataset):
        features = dataset.features
        stream = without_decoding(dataset).map(_unpair, batched=True, batch_size=16, remove_columns=wanted)
        if features is None:
            return stream
        types = {"id": Value("string"), "prompt": features["prompt"], "image": features["chosen"]}
        return stream.cast(Features({**types, "label": Value("bool")}))
    parts = []
    for column, label in PAIR.items():
        part = dataset.select_columns(["id", "prompt", column]).rename_column(column, "image")
        part = with_column(part, "id", lambda ids, column=column: [f"{row_id}/{column}" for row_id in ids])
        parts.append(_with_label(part, label))
    pairs = len(dataset)
    return concatenate_datasets(parts).select([row for pair in range(pairs) for row in (pair, pairs + pair)])


def _with_label(dataset: Dataset, label: bool) -> Dataset:
    labels = pa.array([label] * len(dataset))
    return beside(dataset, {"label": for_table(dataset, labels)}, Features({"label": Value("bool")}), label)


def _unpair(batch: dict[str, list]) -> dict[str, list]:
    """Turns a batch of pairs into labelled images."""
    rows = [
        (f"{row_id}/{column}", prompt, image, PAIR[column])
        for row_id, prompt, *images in zip(*(batch[name] for name in ("id", "prompt", *PAIR)), strict=True)
        for column, image in zip(PAIR, images, strict=True)
    ]
    return dict(zip(("id", "prompt", "image", "label"), map(list, zip(*rows, strict=True)), strict=True))
