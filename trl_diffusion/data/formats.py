# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The columns of datasets, and readable errors for invalid data."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value

from ..criteria import Criteria
from ..messages import cut, quoted, shortened, shown
from .column_checks import (
    ATTRIBUTE_COLUMNS,
    PREFERENCES,  # noqa: F401 also a name of this module, as what follows of instances
    UNKNOWN,
    attribute_codes,
    bad_instances,
    bad_rows,
    missing_files,
    nulls,
    repeated,
    selected,
    type_faults,
    without_image,
)
from .columns import numbered, without_decoding
from .images import open_image
from .instances import (  # noqa: F401
    check_box,
    check_instances,
    check_preference,
    instance_faults,
    instance_pair_features,
    is_finite,
)


logger = logging.getLogger(__name__)

SURROGATES = re.compile("[\ud800-\udfff]")
ID_FITS = 'store ids as strings or integers, or remove the column with `dataset.remove_columns("id")`, and rows are numbered.'


def attribute_features(criteria: Criteria | None = None) -> Features:
    """
    The columns of [`AttributeSFTTrainer`] and [`ComplexPOTrainer`]: an image, and its attributes in positive and in negative
    form. Both columns of attributes contain their ids.

    Args:
        criteria ([`Criteria`], *optional*):
            The criteria tree. If given, the ids are [`~datasets.ClassLabel`]s of the tree; otherwise they are strings.

    Returns:
        [`~datasets.Features`]
    """
    attribute = ClassLabel(names=[leaf.id for leaf in criteria.attributes]) if criteria else Value("string")
    return Features(
        {
            "id": Value("string"),
            "prompt": Value("string"),
            "image": Image(),
            "positive_attributes": List(attribute),
            "negative_attributes": List(attribute),
        }
    )


Datasets = Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None


def each_dataset(
    datasets: Datasets, name: str, function: Callable[[Dataset | IterableDataset, str], Dataset | IterableDataset]
) -> Datasets:
    """
    Applies a function to a dataset, or to each of several named datasets. `None` stays `None`.

    Args:
        datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`], `dict` or `None`):
            The datasets.
        name (`str`):
            Name of the parameter, for messages.
        function (`Callable`):
            From a dataset and its name to a dataset.

    Returns:
        The same structure with the results of the function.
    """
    if isinstance(datasets, dict):
        return {split: function(dataset, f"{name}[{split!r}]") for split, dataset in datasets.items()}
    return None if datasets is None else function(datasets, name)


def all_datasets(*datasets: Datasets) -> list[Dataset | IterableDataset]:
    """All datasets among some arguments, each of which is a dataset, several by name, or `None`."""
    several = [split.values() if isinstance(split, dict) else [split] for split in datasets]
    return [dataset for splits in several for dataset in splits if dataset is not None]


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    columns: tuple[str, ...],
    image_columns: tuple[str, ...],
    faults: list[tuple[str, str]] | None = None,
) -> Dataset | IterableDataset:
    """
    Checks the columns of a dataset: their types, and in memory also nulls, ids, boxes and preferences of all rows. Adds an `id`
    column to a dataset in memory that has none, and turns off the decoding of images, so that errors can name the row and EXIF
    orientations are kept, and so that a broken image which nobody reads does no harm.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            Name of the parameter, for messages: `"train_dataset"` or `"eval_dataset"`.
        columns (`tuple[str, ...]`):
            The required columns.
        image_columns (`tuple[str, ...]`):
            Those of them that contain images.
        faults (`list[tuple[str, str]]`, *optional*):
            Columns and messages of wrong types and values are appended to it instead of raised.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]

    Raises:
        `ValueError`: If a column is missing (in a stream also `id`), if the dataset is empty, or if a column has a wrong type,
            wrong labels, a null or an id twice. The message names the dataset, the column, the row and the way out.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"`{name}` must be a `datasets.Dataset` or `datasets.IterableDataset`, got `{type(dataset).__name__}`. If it "
            'is a `DatasetDict`, pass one of its splits, such as `dataset["train"]`.'
        )
    if isinstance(dataset, IterableDataset) or dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # rows as Python objects; keeps a transform of the user
    present = dataset.column_names
    if present is None:  # a stream with unknown columns
        present = list(next(iter(dataset), {}))
    if not present or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"`{name}` has no rows.")
    if missing := [column for column in columns if column not in present]:
        raise ValueError(
            f"`{name}` lacks the column{'s' if len(missing) > 1 else ''} {quoted(missing)}; it has {quoted(present)}. "
            f"The required columns are {quoted(columns)}: rename columns with `dataset.rename_columns`, or create them as "
            "described in docs/source/dataset_formats.md."
        )
    is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    # A transform of the user may read further columns
    dataset = without_decoding(dataset, (*image_columns, "instances") if is_transformed else None)
    if "id" not in present and isinstance(dataset, Dataset):
        dataset = numbered(dataset)
    if not is_transformed:
        for column, fault in _faults(dataset, name, columns, image_columns):
            if faults is None:
                raise ValueError(fault)
            faults.append((column, fault))
        if faults is None and isinstance(dataset, Dataset):
            warn_of_repeated_ids(dataset, name)
    if isinstance(dataset, Dataset):
        return dataset
    if "id" not in present:
        raise ValueError(
            f"`{name}` is a stream without the column `id`. Noise, crops and flips depend on the id of a row, and the rows of a "
            "stream cannot be numbered because its shards are read in parallel: add an `id` column with `dataset.map`."
        )
    if dataset.features is None and "chosen" in columns:
        dataset = dataset.map(_refuse_bare_numbers)
    return dataset


def _faults(
    dataset: Dataset | IterableDataset, name: str, columns: tuple[str, ...], image_columns: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Types first; values only where the types are right, and no transform of the user makes the rows."""
    wanted = {"id", *columns} | ({"instances"} if "chosen" in columns else set())
    features = {column: feature for column, feature in (dataset.features or {}).items() if column in wanted}
    mistyped = list(type_faults(features, name, image_columns))
    yield from mistyped
    if isinstance(dataset, IterableDataset):
        return
    wrong = {column.split(".")[0] for column, _ in mistyped}
    checks: dict[str, tuple[Callable, Callable]] = {
        "id": (nulls, row_id),
        "prompt": (nulls, row_prompt),
        **{column: (without_image, partial(read_image, column=column)) for column in image_columns},
        "instances": (lambda values: bad_instances(values.combine_chunks()), check_instances),
    }
    for column, (is_bad, check) in checks.items():
        if column not in features or column in wrong or column == "instances" and features[column] in UNKNOWN:
            continue
        rows = bad_rows(dataset, column, is_bad)
        if not len(rows) and column in image_columns:
            rows = missing_files(dataset, column)
        if len(rows):
            try:
                check(dataset[int(rows[0])])
            except ValueError as error:
                yield column, f"{error} {_where(rows, name)}"


def warn_of_repeated_ids(dataset: Dataset, name: str) -> None:
    """Says how many rows have the id of an earlier row, and so its noise. Only `precompute` refuses them."""
    number, rows = repeated(dataset, "id")
    if number:
        logger.warning(
            f"The column `id` of `{name}` repeats itself: {number} row{'s have' if number > 1 else ' has'} the id of an earlier row, "
            f"first {shown(dataset[int(rows[0])]['id'])} in the rows {shortened(rows.tolist())}. In a step, they have the same noise, crop "
            'and flip. If this is not meant, give each row its own id, or remove the column with `dataset.remove_columns("id")`.'
        )


def _where(rows: np.ndarray, name: str) -> str:
    if len(rows) == 1:
        return f"It is row {rows[0]} of `{name}`."
    return f"It is the first of {len(rows)} such rows of `{name}`: {shortened(rows.tolist())}."


def _refuse_bare_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """For streams without types, in which labels cannot have names."""
    instances = row.get("instances")
    for index, instance in enumerate(instances if isinstance(instances, list) else []):
        if isinstance(instance, dict) and isinstance(instance.get("preference"), int):
            raise ValueError(
                f"`instances[{index}].preference` of the row with id {shown(row.get('id'))} is a number without a name, "
                f"{shown(instance['preference'])}, which could mean anything: store `chosen`, `rejected` or `tie` as strings."
            )
    return row


def row_id(row: dict[str, Any]) -> str:
    """The id of a row as a string. Raises a `ValueError` if it is null."""
    if row.get("id") is None:
        raise ValueError(
            "A row has no `id`. Every row needs its own, or none: without the column, rows are numbered. Remove the column with "
            '`dataset.remove_columns("id")`, or fill it.'
        )
    if not isinstance(row["id"], str | Integral) or isinstance(row["id"], str) and not is_text(row["id"]):
        raise ValueError(f"The id {shown(row['id'])} of a row is no text and no integer: {ID_FITS}")
    return str(row["id"])


def row_prompt(row: dict[str, Any]) -> str:
    """The prompt of a row. Raises a `ValueError` if it is no string."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(
            f"`prompt` of the row with id {shown(row.get('id'))} must be a string, got {shown(prompt)}. Correct it, or remove the row "
            "with `dataset.filter`."
        )
    if not is_text(prompt):
        raise ValueError(
            f"`prompt` of the row with id {shown(row.get('id'))} holds single surrogates, which are parts of characters and no text: "
            f"{shown(prompt)}. Correct it, or remove the row with `dataset.filter`."
        )
    return prompt


def is_text(value: str) -> bool:
    """Whether a string can be written: single surrogates cannot."""
    return not SURROGATES.search(value)


def read_image(row: dict[str, Any], column: str, read: Callable | None = None) -> Any:
    """
    Reads an image of a row.

    Args:
        row (`dict`):
            The row.
        column (`str`):
            The column.
        read (`Callable`, *optional*):
            From a value of the column to the result; [`data.formats.open_image`] if left out.

    Returns:
        What `read` returns.

    Raises:
        `ValueError`: If the image cannot be read. The message names the row and the column.
    """
    try:
        return (read or open_image)(row.get(column))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The image in column `{column}` of the row with id {shown(row.get('id'))} cannot be read: {cut(str(error))}. Replace it, or "
            "remove the row with `dataset.filter`."
        ) from error


def check_attribute_columns(
    dataset: Dataset | IterableDataset, name: str, criteria: Criteria, allow_none: bool
) -> None:
    """
    Checks that the attributes of a dataset are those of the criteria: the types of the columns, and all rows. The rows of a
    stream, or of a dataset with a transform, are checked when they are read instead.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        name (`str`):
            Name of the parameter, for messages.
        criteria ([`Criteria`]):
            The criteria tree.
        allow_none (`bool`):
            Whether rows without attributes are allowed.

    Raises:
        `ValueError`: If the labels of a column are not the attributes of the tree, or if a row is invalid, see
            [`data.formats.check_attributes`]. Rows without attributes are listed in one message.
    """
    ids = [attribute.id for attribute in criteria.attributes]
    for column in ATTRIBUTE_COLUMNS:
        feature = (dataset.features or {}).get(column)
        label = getattr(feature, "feature", None)
        if isinstance(label, ClassLabel) and label.names != ids:
            raise ValueError(
                f"The labels of `{column}` of `{name}` are not the attributes of the criteria {criteria.name!r} in their "
                "order. Pass the tree of the annotation as `criteria`, or store ids as strings."
            )
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":
        return
    table = dataset.select_columns(["id", *ATTRIBUTE_COLUMNS])
    columns = [column for column in ATTRIBUTE_COLUMNS if _are_attributes(dataset.features[column])]
    for column in [
        column for column in ATTRIBUTE_COLUMNS if column not in columns
    ]:  # what it holds instead is said of the first row that has some
        for row in bad_rows(dataset, column, lambda values: ~nulls(values)):
            check_attributes(table[int(row)], criteria)
    places_of = {attribute: place for place, attribute in enumerate(ids)} | {place: place for place in range(len(ids))}
    bad, has = np.zeros((2, len(dataset.data)), dtype=bool)
    both = []  # row * number of attributes + attribute, for each column
    for column in columns:
        names, rows, codes = attribute_codes(dataset.data.column(column))
        places = np.array([places_of.get(name, -1) for name in names], dtype=int)[codes]
        has[rows] = True
        bad[rows[places < 0]] = True
        both.append((rows * len(ids) + places)[places >= 0])
    once = np.sort(np.concatenate([np.zeros(0, dtype=int), *both]))
    bad[once[1:][once[1:] == once[:-1]] // len(ids)] = True  # twice in a column, or in both
    bad = selected(dataset, bad).nonzero()[0]
    if len(bad):
        try:
            check_attributes(table[int(bad[0])], criteria)
        except ValueError as error:
            raise ValueError(f"{error} {_where(bad, name)}") from error
    without = [] if allow_none else table[selected(dataset, ~has).nonzero()[0]]["id"]
    if without:
        raise ValueError(
            f"{len(without)} of the {len(dataset)} rows of `{name}` have neither positive nor negative attributes, so "
            f"nothing can be learned from them: the rows with id {shortened(without)}. Remove them with "
            '`dataset.filter(lambda row: row["positive_attributes"] or row["negative_attributes"])`.'
        )


def _are_attributes(feature: Any) -> bool:
    """Whether a column has lists of single values."""
    return isinstance(feature, List | LargeList) and isinstance(feature.feature, Value | ClassLabel)


def check_attributes(row: dict[str, Any], criteria: Criteria) -> tuple[list[str], list[str]]:
    """
    Reads the attributes of a row.

    Args:
        row (`dict`):
            A row with `id`, `positive_attributes` and `negative_attributes`, which contain ids of attributes or their indices
            in a [`~datasets.ClassLabel`].
        criteria ([`Criteria`]):
            The criteria tree.

    Returns:
        `tuple[list[str], list[str]]`: the ids of the positive and the negative attributes.

    Raises:
        `ValueError`: If an attribute is not in the tree (the message names the nearest one), or occurs twice, in one column or
            in both.
    """
    ids = []
    for column in ATTRIBUTE_COLUMNS:
        attributes = row.get(column) if row.get(column) is not None else []
        if not isinstance(attributes, list | tuple):
            raise ValueError(
                f"`{column}` of the row with id {shown(row.get('id'))} must be a list of ids, got {shown(attributes)}."
            )
        try:
            ids.append([criteria.find(attribute).id for attribute in attributes])
        except ValueError as error:
            raise ValueError(f"`{column}` of the row with id {shown(row.get('id'))}: {error}.") from error
        if twice := [attribute for attribute, times in Counter(ids[-1]).items() if times > 1]:
            raise ValueError(
                f"`{column}` of the row with id {shown(row.get('id'))} has {quoted(sorted(twice))} twice."
            )
    if both := sorted(set(ids[0]) & set(ids[1])):
        raise ValueError(
            f"The row with id {shown(row.get('id'))} has {quoted(both)} as positive and as negative at once. An attribute is in one of "
            "the two columns, or in neither."
        )
    return ids[0], ids[1]
