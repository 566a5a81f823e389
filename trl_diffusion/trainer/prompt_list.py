# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Every prompt that a training may ask for, each once: of a million rows in Arrow, and kept where they take long to make."""

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset

from ..backbones.base import Backbone
from ..data.content import damage_of, read_sealed
from ..data.row_contents import write_kept


logger = get_logger(__name__)


PromptsOf = Callable[[dict[str, Any]], list[str | None]]

ROWS_AT_ONCE = 10_000
NUM_CHECKED_ROWS = 64


def text_rows(
    dataset: Dataset, rows: np.ndarray | None, columns: list[str], texts: Callable[[dict[str, Any]], dict[str, Any]]
) -> Dataset:
    """
    The columns that prompts follow from, of some rows of a dataset whose images are not encoded.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        rows (`np.ndarray` or `None`):
            The numbers of the rows; `None` for all.
        columns (`list[str]`):
            The columns.
        texts (`Callable`):
            From a row to these columns, where a transform of the user makes the rows.

    Returns:
        [`~datasets.Dataset`]
    """
    if dataset.format["type"] == "custom":
        return Dataset.from_list(
            [texts(dataset[row]) for row in (range(len(dataset)) if rows is None else rows.tolist())]
        )
    dataset = dataset.select_columns(columns)
    return dataset if rows is None else dataset.select(rows)


def list_prompts(datasets: list[Dataset], columns: list[str], prompts_of: PromptsOf) -> pa.ChunkedArray:
    """
    The different prompts of some datasets.

    Args:
        datasets (`list[~datasets.Dataset]`):
            The rows.
        columns (`list[str]`):
            The columns that prompts follow from. Of one column of texts, each text is asked for once.
        prompts_of (`Callable`):
            From a row to its prompts; `None` is the unconditional branch.

    Returns:
        `pa.ChunkedArray`: in order, null last.
    """
    parts = []
    for dataset in datasets:
        table = dataset.data.table.select(columns)
        if dataset._indices is not None:
            table = table.take(dataset._indices.column(0))
        if columns == ["prompt"]:
            table = pa.table({"prompt": table["prompt"].unique()})
        for batch in table.to_batches(ROWS_AT_ONCE):
            found = {prompt for row in batch.to_pylist() for prompt in prompts_of(row)}
            parts.append(pa.array(found, pa.large_string()))
    prompts = pa.chunked_array(parts, pa.large_string()).unique()
    return pa.chunked_array([prompts.take(pc.sort_indices(prompts))])


def kept_prompts(path: Path, datasets: list[Dataset], columns: list[str], prompts_of: PromptsOf) -> pa.ChunkedArray:
    """
    Like [`trainer.prompt_list.list_prompts`], from a file where it exists and has the prompts of some rows.

    Args:
        path (`Path`):
            The file, whose name holds a hash of what the prompts follow from.
        datasets, columns, prompts_of:
            As there.

    Returns:
        `pa.ChunkedArray`
    """
    kept = read_sealed(path)
    if kept is None and path.exists():
        logger.warning(f"{path} is damaged: {damage_of(path)}. The prompts are listed anew.")
    if kept is not None:
        prompts = kept["prompt"]
        rows = (
            row
            for dataset in datasets
            for row in dataset.select_columns(columns).select(
                range(0, len(dataset), max(1, len(dataset) // NUM_CHECKED_ROWS))
            )
        )
        if all(_holds(prompts, prompt) for row in rows for prompt in prompts_of(row)):
            return prompts
    prompts = list_prompts(datasets, columns, prompts_of)
    write_kept(path, pa.table({"prompt": prompts}))
    return prompts


def _holds(prompts: pa.ChunkedArray, prompt: str | None) -> bool:
    if prompt is None:
        return prompts.null_count > 0
    known = range(len(prompts) - prompts.null_count)
    place = bisect_left(known, prompt, key=lambda place: prompts[place].as_py())
    return place in known and prompts[place].as_py() == prompt


def mean_tokens(backbone: Backbone, prompts: list[str | None]) -> float:
    """The mean number of tokens of prompts, each by the tokenizer that makes most of it and as far as it is read."""
    limits = [(getattr(backbone.pipeline, name), limit) for name, limit in backbone.prompt_limits.items()]
    counts = [
        max(min(limit, backbone.num_tokens(tokenizer, prompt or "")) for tokenizer, limit in limits)
        for prompt in prompts
    ]
    return sum(counts) / len(counts)
