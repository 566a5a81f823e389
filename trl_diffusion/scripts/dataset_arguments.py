# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The flags that name a dataset."""

import json
from dataclasses import dataclass, field

from trl import ScriptArguments


COLUMNS_HELP = (
    'JSON that maps the names used here to the dataset\'s columns, such as \'{"prompt": "json.caption"}\'. A dot names a field '
    "of a column of objects."
)


def read_mapping(columns: str | dict | None) -> dict[str, str] | None:
    """
    Reads `--columns`.

    Args:
        columns (`str` or `dict`, *optional*):
            JSON, or the dictionary of a YAML file.

    Returns:
        `dict[str, str]` or `None`: from our names to the dataset's columns.

    Raises:
        `ValueError`: If it is no JSON object of names.
    """
    mapping = columns
    if isinstance(columns, str):
        try:
            mapping = json.loads(columns)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--columns` is not valid JSON: {error}.") from error
    if mapping is None:
        return None
    if not isinstance(mapping, dict) or not all(isinstance(column, str) for column in mapping.values()):
        raise ValueError(f"`--columns` must be a JSON object whose values are names of columns, got {columns}.")
    return mapping


@dataclass
class DatasetArguments(ScriptArguments):
    """
    Arguments of the commands that read a dataset for a trainer, besides those of [`~trl.ScriptArguments`].

    Parameters:
        dataset_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        columns (`str`, *optional*):
            JSON that maps the trainers' columns to those of the dataset; in a YAML file, a mapping. A name with a dot is a
            field of a column of objects, such as `json.caption`.
    """

    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    columns: str | None = field(default=None, metadata={"help": COLUMNS_HELP})

    @property
    def mapping(self) -> dict[str, str] | None:
        """`columns` as a dictionary."""
        return read_mapping(self.columns)
