# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Where the rows of a loaded dataset come from: the dataset of the Hub and its commit, as `datasets` keeps them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from datasets.iterable_dataset import _BaseExamplesIterable
from datasets.naming import camelcase_to_snakecase
from datasets.table import ConcatenationTable, MemoryMappedTable
from datasets.utils.track import TrackedIterableFromGenerator
from huggingface_hub import constants, metadata_load, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..data.sources import format_of
from ..hub import hub_id


HUB_FILE = re.compile(r"hf://datasets/([^@\s]+)@([0-9a-f]{40})/")
# <user>___<name>/<configuration>/<version>/<commit>/<file>, where `datasets` keeps what it has prepared
PREPARED = re.compile(r"(?:^|/)([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})/[^/]+\.arrow$")
SHARD = r"-(\w+(?:\.\w+)*?)(?:-\d{5}-of-\d{5})?\.arrow"


class Origin(NamedTuple):
    """Where rows come from: a dataset of the Hub and its commit; where they were prepared for reading, in which folder and split."""

    name: str
    commit: str
    folder: str | None = None
    split: str | None = None


def dataset_id(name: str | None) -> str | None:
    """The name, if it can be a dataset of the Hub and is nothing on this machine."""
    if name is None or hub_id(name) is None or format_of(Path(name)) is not None:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def origin_of(dataset: Dataset | IterableDataset | None) -> Origin | None:
    """The dataset of the Hub that all rows come from, if there is one."""
    if dataset is None:
        return None
    checksums = dataset.info.download_checksums
    if checksums:
        origins = {origin_of_address(address) for address in checksums}
    elif isinstance(dataset, Dataset):
        origins = set(origins_of_table(dataset))
    else:
        origins = set(origins_of_stream(dataset._ex_iterable))
    if None in origins or len({origin[:2] for origin in origins}) != 1:
        return None
    splits = {origin.split for origin in origins}
    origin = next(iter(origins))
    return origin if len(splits) == 1 else origin._replace(split=None)


def origin_of_address(address: str) -> Origin | None:
    """The origin that the address of a file tells."""
    found = HUB_FILE.search(address)
    return Origin(*found.groups()) if found else None


def origins_of_table(dataset: Dataset) -> Iterator[Origin | None]:
    """The origins of the files that hold the rows. Columns in memory beside them were added; rows in memory come from elsewhere."""
    table = dataset.data
    for row in table.blocks if isinstance(table, ConcatenationTable) else [[table]]:
        paths = [block.path for block in row if isinstance(block, MemoryMappedTable)]
        for origin in map(origin_of_file, paths) if paths else [None]:
            yield origin if None in (origin, dataset.split) else origin._replace(split=str(dataset.split))


def origin_of_file(path: str) -> Origin | None:
    """The origin of a file in the cache of `datasets`. The Hub's own cache has the name as it is spelled."""
    found = PREPARED.search(path.replace(os.sep, "/"))
    if found is None:
        return None
    prepared, commit = found.groups()
    user, _, name = prepared.rpartition("___")
    pattern = f"datasets--{user}--*" if user else "datasets--*"
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob(pattern)):
        repo_id = folder.name.removeprefix("datasets--").replace("--", "/")
        spelled = camelcase_to_snakecase(repo_id.split("/")[-1])
        if spelled == name and (folder / "snapshots" / commit).exists():
            shard = re.fullmatch(re.escape(name) + SHARD, os.path.basename(path))
            return Origin(repo_id, commit, os.path.dirname(path), shard and shard[1])
    return None


def origins_of_stream(iterable: _BaseExamplesIterable) -> Iterator[Origin | None]:
    """The origins of the sources of a stream."""
    held = vars(iterable)
    values = [value if isinstance(value, list | tuple) else [value] for value in held.values()]
    below = [item for value in values for item in value if isinstance(item, _BaseExamplesIterable)]
    for source in below:
        yield from origins_of_stream(source)
    if below:
        return
    found = [origin for value in leaves(held.get("kwargs")) for origin in origins_of_leaf(value)]
    yield from found or [None]


def origins_of_leaf(value: Any) -> Iterator[Origin | None]:
    if isinstance(value, Dataset):  # as `to_iterable_dataset` keeps it
        yield from origins_of_table(value)
    elif isinstance(value, str) and (origin := origin_of_address(value)) is not None:
        yield origin


def leaves(value: Any) -> Iterator[Any]:
    """All that is nested in lists, dictionaries and the iterables of `datasets`."""
    if isinstance(value, TrackedIterableFromGenerator):
        value = value.args
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def declared_license(name: str, commit: str | None) -> str | None:
    """The licence in the card of a dataset that was loaded, out of the Hub's cache."""
    card = try_to_load_from_cache(name, "README.md", revision=commit, repo_type="dataset")
    known = (metadata_load(card) or {}) if isinstance(card, str) else {}
    if known.get("license") == "other" and known.get("license_name"):
        return str(known["license_name"])
    license = known.get("license")
    return ", ".join(map(str, license)) if isinstance(license, list) else license
