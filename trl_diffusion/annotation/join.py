# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""From annotations and the dataset that they are about to the columns of the trainers.

Annotations hold no images, only their uids. Whoever has the dataset puts both together here, and may do so a row at a
time.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset

from ..data.formats import ATTRIBUTE_COLUMNS, attribute_features, instance_pair_features
from .records import Record, image_columns, pair_columns, prepare_rows, read_id, read_image
from .run import MANIFEST, Row


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 16
PROGRESS = ("complete", "counts", "versions")  # what a manifest says besides what the annotations depend on


# ----- from a run's folder -----


def load_annotations(folder: str | Path, split: str | None = None, allow_incomplete: bool = False) -> Dataset:
    """
    Loads what a run has written.

    Args:
        folder (`str` or `Path`):
            Folder of a run, or the `output_dir` of runs.
        split (`str`, *optional*):
            Which split's run, where the `output_dir` holds several.
        allow_incomplete (`bool`, *optional*, defaults to `False`):
            Load a run that is not finished, as far as it is.

    Returns:
        [`~datasets.Dataset`]: the annotations of all rows, in their order.

    Raises:
        `ValueError`: If there is no run, several that would do, or one that is not finished.
    """
    runs = find_runs(folder)
    if split is None and len(runs) > 1:
        raise ValueError(f"{folder} holds runs of the splits {', '.join(runs)}: name one of them as `split`.")
    split = split or next(iter(runs))
    if split not in runs:
        raise ValueError(f"{folder} holds no run of the split {split!r}; it has {', '.join(runs)}.")
    run = runs[split]
    manifest = read_manifest(run)
    if not manifest["complete"] and not allow_incomplete:
        raise ValueError(
            f"The run in {run} is not finished, {manifest['counts']['rows']:,} rows are done: give the command that "
            "started it once more, and it goes on. `allow_incomplete=True` loads what is there."
        )
    shards = sorted(str(path) for path in run.glob("annotations-*.parquet"))
    if not shards:
        raise ValueError(f"The run in {run} has no annotations: its dataset has no rows.")
    return Dataset.from_parquet(shards, split=split)


def find_runs(folder: str | Path) -> dict[str, Path]:
    """
    Finds runs.

    Args:
        folder (`str` or `Path`):
            Folder of a run, or the `output_dir` of runs.

    Returns:
        `dict[str, Path]`: the run of each split.

    Raises:
        `ValueError`: If there is none, or several of one split.
    """
    folder = Path(folder)
    runs: dict[str, Path] = {}
    candidates = (
        [folder] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    )
    for run in candidates:
        split = read_manifest(run)["dataset"]["split"]
        if split in runs:
            names = [path.name for path in candidates if read_manifest(path)["dataset"]["split"] == split]
            raise ValueError(
                f"{folder} holds several runs of the split {split!r}: {', '.join(names)}. Name the folder of one of "
                f"them. They differ in {listed(differences([read_manifest(folder / name) for name in names]))}."
            )
        runs[split] = run
    if not runs:
        raise ValueError(
            f"{folder} is no folder of annotations: neither it nor a folder in it has a {MANIFEST}. `trl-diffusion "
            "annotate-instances` and `annotate-attributes` write one into their `--output_dir`."
        )
    return runs


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest in the folder of a run."""
    return json.loads((run / MANIFEST).read_text(encoding="utf-8"))


def differences(manifests: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """
    Compares what runs describe.

    Args:
        manifests (`list[dict]`):
            Their manifests.

    Returns:
        `dict[str, list]`: the values of each entry that is not the same in all of them; a prompt's hash stands for
        its text.
    """
    flat = [dict(entries(manifest)) for manifest in manifests]
    keys = dict.fromkeys(key for entry in flat for key in entry)
    values = {key: [entry.get(key) for entry in flat] for key in keys if not key.endswith(".text")}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def entries(manifest: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What annotations depend on, by names such as `judge.model.revision`."""
    for name, value in manifest.items():
        if not prefix and name in PROGRESS:
            continue
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def listed(found: dict[str, list[Any]]) -> str:
    """Differences on one line."""
    lines = [f"{key} ({', '.join(str(value)[:60] for value in values)})" for key, values in found.items()]
    return "; ".join(lines) or "nothing that they describe"


# ----- with the dataset -----


def join_annotations(
    source: Dataset | IterableDataset,
    annotations: Dataset,
    columns: dict[str, str] | None = None,
    ties: bool = False,
    counts: Counter | None = None,
) -> Dataset | IterableDataset:
    """
    Joins annotations with the dataset that they are about: from both, the columns of the trainers.

    Rows meet by their ids, and every image must be the one that was annotated, by its uid. The images' bytes stay as
    they are. Rows that were rejected, could not be annotated or have no annotation are left out. How many are is
    logged; the rows of a stream that have no annotation are only known as they come, and logged at the first, the
    tenth, the hundredth and so on.

    ```python
    >>> from datasets import load_dataset
    >>> from trl_diffusion import join_annotations

    >>> annotations = load_dataset("user/pickapic-instance", "annotations", split="train")
    >>> source = load_dataset("user/pick-a-pic-v2", split="train", streaming=True)
    >>> train_dataset = join_annotations(source, annotations)
    ```

    Args:
        source ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset, in any order. A stream stays one: nothing is read before the first row is asked for. A
            dataset in memory is written once more, with its images, to the cache of `datasets`.
        annotations ([`~datasets.Dataset`]):
            Annotations of pairs or of single images, from [`annotation.join.load_annotations`] or published.
        columns (`dict[str, str]`, *optional*):
            Which columns of the source hold what, see [`annotation.records.pair_columns`]. Left out, the source has
            the trainers' columns or those of Pick-a-Pic v2.
        ties (`bool`, *optional*, defaults to `False`):
            Give the pairs of which neither image is better, and no others. They never train: which image is called
            chosen says nothing.
        counts (`Counter`, *optional*):
            Is told as rows are read how many were `joined`, `rejected`, an `error`, a `tie` (or `no tie`) and
            `missing`, which have no annotation. What another process reads, and what comes out of a cache, is not
            counted.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: of the source's kind and in its order, with the
        columns of [`data.formats.instance_pair_features`] or [`data.formats.attribute_features`] and no others.

    Raises:
        `ValueError`: If these are no annotations, if no row of a dataset in memory has one, and, when it is read, if a
            row has other images than were annotated.
    """
    if not isinstance(annotations, Dataset):
        raise ValueError(
            f"`annotations` must be a `datasets.Dataset`, got `{type(annotations).__name__}`: load one split, without "
            "streaming."
        )
    if not isinstance(source, Dataset | IterableDataset):
        raise ValueError(
            f"`source` must be a `datasets.Dataset` or `datasets.IterableDataset`, got `{type(source).__name__}`: "
            'pass one split, such as `source["train"]`.'
        )
    annotations = annotations.with_format(None)
    features = joined_features(annotations.features)
    is_pair = "instances" in features
    if ties and not is_pair:
        raise ValueError("`ties=True` is for annotations of pairs; a single image is no tie.")
    source, columns = prepare_rows(source, pair_columns if is_pair else image_columns, columns)
    join = Join(annotations, columns, features, ties, Counter() if counts is None else counts)
    join.log_left_out()
    if isinstance(source, IterableDataset):
        stream = source.map(join, batched=True, batch_size=ROWS_AT_ONCE, remove_columns=list(columns.values()))
        return stream.cast(features)  # given to `map`, the features would never decode an image of a stream
    return source.select(join.annotated([str(row_id) for row_id in source[columns["id"]][:]])).map(
        join,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=source.column_names,
        features=features,
        desc="Joining annotations",
    )


def joined_features(annotated: Features) -> Features:
    """
    The columns of annotations and source together.

    Args:
        annotated ([`~datasets.Features`]):
            Columns of the annotations.

    Returns:
        [`~datasets.Features`]: the trainers' columns; attributes have the type that the annotations give them.

    Raises:
        `ValueError`: If these are no annotations.
    """
    if {"id", "status", "chosen_uid", "rejected_uid", "tie", "instances"} <= set(annotated):
        return instance_pair_features()
    if {"id", "status", "image_uid", *ATTRIBUTE_COLUMNS} <= set(annotated):
        return Features({**attribute_features(), **{name: annotated[name] for name in ATTRIBUTE_COLUMNS}})
    raise ValueError(
        f"These are no annotations: they have the columns {', '.join(annotated)}. Load them with `load_annotations`, "
        "or the configuration `annotations` of a published dataset."
    )


@dataclass
class Join:
    """
    Rows of a source in, rows of the trainers out.

    Args:
        annotations ([`~datasets.Dataset`]):
            The annotations.
        columns (`dict[str, str]`):
            Which columns of the source hold what.
        features ([`~datasets.Features`]):
            Columns of what comes out.
        ties (`bool`):
            Whether ties are wanted, and nothing else.
        counts (`Counter`):
            What became of the rows.
    """

    annotations: Dataset
    columns: dict[str, str]
    features: Features
    ties: bool
    counts: Counter = field(default_factory=Counter)

    def __getstate__(self) -> dict:
        # Neither is part of what this does, by which `datasets` finds a result in its cache; the index would be large
        state = self.__dict__ | {"counts": Counter()}
        state.pop("index", None)
        return state

    @cached_property
    def index(self) -> tuple[dict[str, int], dict[str, str]]:
        """Numbers of the annotations that are used, and what the others are, each by the row's id."""
        statuses = self.annotations.features["status"].names
        ids, codes = self.annotations["id"][:], self.annotations["status"][:]
        ties = self.annotations["tie"][:] if "tie" in self.annotations.features else [False] * len(ids)
        used, others = {}, {}
        for number, (row_id, status, tie) in enumerate(zip(ids, codes, ties, strict=True)):
            if statuses[status] != "ok":
                others[row_id] = statuses[status]
            elif tie != self.ties:
                others[row_id] = "tie" if tie else "no tie"
            elif row_id in used:
                raise ValueError(
                    f"The row with id {row_id!r} is annotated twice: join the annotations of one run at a time."
                )
            else:
                used[row_id] = number
        return used, others

    def log_left_out(self) -> None:
        """Says how many annotations are not used."""
        used, _ = self.index
        names = self.annotations.features["status"].names
        statuses = Counter(names[status] for status in self.annotations["status"][:])
        left_out = {name: statuses[name] for name in names if name != "ok"} | {"ties": statuses["ok"] - len(used)}
        if self.ties:
            logger.warning(f"Of {len(self.annotations):,} annotations, {len(used):,} are ties, which do not train.")
        elif any(left_out.values()):
            figures = ", ".join(f"{name} {number:,}" for name, number in left_out.items() if number)
            logger.warning(
                f"Of {len(self.annotations):,} annotations, {len(used):,} become rows to train on. Left out: "
                f"{figures}."
            )

    def annotated(self, ids: list[str]) -> list[int]:
        """
        Finds the rows of a source that have an annotation, and says how many have none, and the other way round.

        Args:
            ids (`list[str]`):
                The ids of all rows.

        Returns:
            `list[int]`: numbers of rows.

        Raises:
            `ValueError`: If there are none.
        """
        used, others = self.index
        numbers = [number for number, row_id in enumerate(ids) if row_id in used or row_id in others]
        if ids and not numbers:
            raise ValueError(
                f"None of the {len(ids):,} rows of the source has an annotation. Their ids are such as {ids[0]!r}, "
                f"those of the annotations such as {self.annotations['id'][0]!r}: say with `columns` which column "
                "holds the ids, or take the dataset and the split that were annotated."
            )
        if missing := len(ids) - len(numbers):
            self.counts["missing"] += missing
            logger.warning(f"Of {len(ids):,} rows of the source, {missing:,} have no annotation, and are left out.")
        if absent := len(used) - len(used.keys() & set(ids)):
            logger.warning(f"Of {len(used):,} annotations that would be used, {absent:,} have no row in the source.")
        return numbers

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Joins a batch of rows; what comes out may be fewer."""
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        joined = [row for row in map(self.join, rows) if row is not None]
        return {name: [row[name] for row in joined] for name in self.features}

    def join(self, row: Row) -> Row | None:
        """Joins a row, or counts why it is left out."""
        used, others = self.index
        row_id = read_id(row, self.columns)
        if row_id not in used:
            self.leave_out(row_id, others.get(row_id, "missing"))
            return None
        annotation = self.annotations[used[row_id]]
        joined = (
            join_pair(row, self.columns, annotation) if self.is_pair else join_image(row, self.columns, annotation)
        )
        if joined is None and row_id in others:
            self.leave_out(row_id, others[row_id])  # the source has the id twice, and this row is the other one
            return None
        if joined is None:
            raise ValueError(
                f"The row with id {row_id!r} has other images than were annotated: by their uids, they are not those "
                "of the annotation. Take the dataset, and its revision, that the annotations were made from."
            )
        self.counts["joined"] += 1
        return joined

    @property
    def is_pair(self) -> bool:
        return "instances" in self.features

    def leave_out(self, row_id: str, why: str) -> None:
        self.counts[why] += 1
        number = self.counts["missing"]
        if why == "missing" and str(number).strip("0") == "1":  # 1, 10, 100 and so on
            logger.warning(
                f"The row with id {row_id!r} has no annotation, and is left out; so far there are {number:,} of these "
                f"and {self.counts.total() - number:,} others."
            )


def join_pair(row: Row, columns: dict[str, str], annotation: Row) -> Row | None:
    """
    Joins a pair with its annotation.

    Args:
        row (`dict`):
            A row of the source, with its images undecoded.
        columns (`dict[str, str]`):
            Which columns hold what.
        annotation (`dict`):
            Its annotation.

    Returns:
        `dict`: a row to train on, or `None` where the images are not those that were annotated.

    Raises:
        `ValueError`: If an image's file cannot be read.
    """
    names = ("image_0", "image_1") if "image_0" in columns else ("chosen", "rejected")
    images = dict(read_stored(row, columns, name) for name in names)
    chosen, rejected = annotation["chosen_uid"], annotation["rejected_uid"]
    if set(images) != {chosen, rejected}:
        return None
    instance = ("label", "chosen_box", "rejected_box", "preference")
    return {
        "id": annotation["id"],
        "prompt": row[columns["prompt"]] or "",
        "chosen": images[chosen],
        "rejected": images[rejected],
        "instances": [{name: found[name] for name in instance} for found in annotation["instances"]],
    }


def join_image(row: Row, columns: dict[str, str], annotation: Row) -> Row | None:
    """
    Joins an image with its annotation; like [`annotation.join.join_pair`].
    """
    uid, image = read_stored(row, columns, "image")
    if uid != annotation["image_uid"]:
        return None
    attributes = {name: annotation[name] for name in ATTRIBUTE_COLUMNS}
    return {"id": annotation["id"], "prompt": row[columns["prompt"]] or "", "image": image} | attributes


def read_stored(row: Row, columns: dict[str, str], name: str) -> tuple[str, dict[str, bytes | None]]:
    """An image's uid, and the image as a dataset stores it."""
    record = Record(read_id(row, columns), "")
    image, uid = read_image(record, row, columns, name)
    if image is None:
        raise ValueError(f"An image of the row with id {record.id!r} cannot be read: {record.reason}.")
    return uid, {"bytes": image.data, "path": None}
