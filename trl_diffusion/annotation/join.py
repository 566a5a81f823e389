# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Joins annotations with their source dataset, which gives the columns of the trainers.

Annotations hold the uids of the images, not the images. A source can be streamed: rows are joined one at a time.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset

from ..batching import in_threads
from ..checksums import DamagedFile
from ..data.columns import without_decoding
from ..data.formats import PREFERENCES, shortened
from ..data.presets import training_columns
from ..data.sources import cache_of, load_source
from ..data.tables import with_lists
from ..messages import cut, shown
from .files import name_reader, read_bool
from .joined_columns import image_uids, joined_columns, orientation
from .joined_rows import join_image, join_pair, joined_features
from .records import STATUSES, id_text, image_columns, pair_columns, prepare_rows, read_id
from .run import Row
from .shards import MANIFEST, PROGRESS, read_shard, rows_and_run


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 16


# ----- loading a run -----


def load_annotations(folder: str | Path, split: str | None = None, allow_incomplete: bool = False) -> Dataset:
    """
    Loads the annotations of a run.

    Args:
        folder (`str` or `Path`):
            Folder of a run, the `output_dir` of runs, a file that [`annotation.files.save_annotations`] wrote, or a folder that
            `save_to_disk` wrote.
        split (`str`, *optional*):
            Split to load. Required if the `output_dir` holds runs of several splits.
        allow_incomplete (`bool`, *optional*, defaults to `False`):
            Whether to load the finished rows of an unfinished run.

    Returns:
        [`~datasets.Dataset`]: the annotations of all rows, in the order of the dataset.

    Raises:
        `ValueError`: If there is no such run, if there are several, or if the run is not finished.
    """
    if (
        Path(folder).is_file()
        or (Path(folder) / "state.json").exists()
        or (Path(folder) / "dataset_dict.json").exists()
    ):
        splits = load_source(str(folder))
        if (split or "train") not in splits:
            raise ValueError(f"{folder} has the splits {', '.join(splits)}: choose one with `split`.")
        return splits[split or "train"]
    runs = find_runs(folder)
    if split is None and len(runs) > 1:
        raise ValueError(f"{folder} holds runs of the splits {', '.join(runs)}: choose one with `split`.")
    split = split or next(iter(runs))
    if split not in runs:
        raise ValueError(f"{folder} holds no run of the split {split!r}; it has {', '.join(runs)}.")
    run = runs[split]
    manifest = read_manifest(run)
    if not manifest["complete"] and not allow_incomplete:
        raise ValueError(
            f"The run in {run} is not finished, {manifest['counts']['rows']:,} rows are done. Repeat the command that "
            "started it to continue, or pass `allow_incomplete=True` to load the rows that are done."
        )
    shards = sorted(run.glob("annotations-*.parquet"))
    if not shards:
        raise ValueError(f"The run in {run} has no annotations: its dataset has no rows.")
    return read_shards(shards, manifest, split)


def read_shards(shards: list[Path], manifest: dict[str, Any], split: str) -> Dataset:
    """
    Reads the shards of a run.

    Args:
        shards (`list[Path]`):
            The files.
        manifest (`dict`):
            The manifest of the run.
        split (`str`):
            Its split.

    Returns:
        [`~datasets.Dataset`]: the rows of all of them.

    Raises:
        `ValueError`: If a shard is not as it was written, or is not of this run, or rows are missing.
    """
    again = "Repeat the command that wrote it: what is damaged is annotated again, and the rest is kept."
    try:
        found = in_threads(lambda shard: rows_and_run(read_shard(shard)), shards)
    except DamagedFile as error:
        raise ValueError(f"{error}. {again}") from error
    num_rows = sum(rows for rows, _ in found)
    if len({run for _, run in found}) > 1:
        raise ValueError(f"{shards[0].parent} holds shards of several runs. {again}")
    if manifest["complete"] and num_rows < manifest["counts"]["rows"]:
        raise ValueError(
            f"{shards[0].parent} has {num_rows:,} rows, and its {MANIFEST} counts {manifest['counts']['rows']:,}. {again}"
        )
    return Dataset.from_parquet([str(shard) for shard in shards], split=split, cache_dir=cache_of(shards))


def find_runs(folder: str | Path) -> dict[str, Path]:
    """
    Finds the runs in a folder.

    Args:
        folder (`str` or `Path`):
            Folder of a run, or the `output_dir` of runs.

    Returns:
        `dict[str, Path]`: the folder of the run of each split.

    Raises:
        `ValueError`: If there is no run, or several runs of one split.
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
                f"{folder} holds several runs of the split {split!r}: {', '.join(names)}. Pass the folder of one of "
                f"them. They differ in {listed(differences([read_manifest(folder / name) for name in names]))}."
            )
        runs[split] = run
    if not runs:
        raise ValueError(
            f"{folder} is not a folder of annotations: neither it nor a folder in it has a {MANIFEST}. Pass the "
            "`--output_dir` of `trl-diffusion annotate-instances` or `annotate-attributes`."
        )
    return runs


def read_manifest(run: Path) -> dict[str, Any]:
    """Reads the manifest of a run. Raises a `ValueError` if it is none."""
    again = "Repeat the command that wrote it: finished shards are kept."
    try:
        manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{run / MANIFEST} cannot be read: {cut(str(error))}. {again}") from error
    for path in ("complete", "dataset.split", "counts.rows"):
        found: Any = manifest
        for name in path.split("."):
            if not isinstance(found, dict) or name not in found:
                raise ValueError(f"{run / MANIFEST} is no manifest of a run: it lacks `{path}`. {again}")
            found = found[name]
    return manifest


def differences(manifests: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """
    Compares the descriptions of runs.

    Args:
        manifests (`list[dict]`):
            Manifests of the runs.

    Returns:
        `dict[str, list]`: each entry that differs between the runs, with its values. Prompts are compared by their
        hashes.
    """
    flat = [dict(entries(manifest)) for manifest in manifests]
    keys = dict.fromkeys(key for entry in flat for key in entry)
    values = {key: [entry.get(key) for entry in flat] for key in keys if not key.endswith(".text")}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def entries(manifest: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flattens the description in a manifest to names such as `judge.model.revision`."""
    for name, value in manifest.items():
        if not prefix and name in PROGRESS:
            continue
        if isinstance(value, dict):
            yield from entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def listed(found: dict[str, list[Any]]) -> str:
    """Formats differences on one line."""
    lines = [f"{key} ({', '.join(str(value)[:60] for value in values)})" for key, values in found.items()]
    return "; ".join(lines) or "nothing that their manifests describe"


# ----- joining with the dataset -----


def join_annotations(
    source: Dataset | IterableDataset,
    annotations: Dataset,
    columns: dict[str, str] | None = None,
    ties: bool = False,
    counts: Counter | None = None,
) -> Dataset | IterableDataset:
    """
    Joins annotations with their source dataset. The result has the columns of the trainers.

    Rows are matched by id, and each image is checked by its uid, if the annotations have uids. The bytes of the images do not change. Rows that are
    rejected, are errors or have no annotation are left out, and their number is logged. For a stream, rows without
    annotation are logged while they are read: the 1st, the 10th, the 100th and so on.

    ```python
    >>> from datasets import load_dataset
    >>> from trl_diffusion import join_annotations

    >>> annotations = load_dataset("user/pickapic-instance", "annotations", split="train")
    >>> source = load_dataset("user/pick-a-pic-v2", split="train", streaming=True)
    >>> train_dataset = join_annotations(source, annotations)
    ```

    Args:
        source ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset, in any order. A stream stays a stream: rows are read only when they are requested. The images of a
            dataset in memory stay where they are, and are read only where uids are made of them.
        annotations ([`~datasets.Dataset`]):
            Annotations of pairs or of single images, from [`annotation.join.load_annotations`] or a published dataset; or
            the rows of a joined dataset without their images.
        columns (`dict[str, str]`, *optional*):
            From our column names to those of the source, see [`annotation.records.pair_columns`]. Defaults to the
            trainers' columns or those of a public dataset.
        ties (`bool`, *optional*, defaults to `False`):
            Whether to return only the ties. They are not for training: the choice of their chosen image is arbitrary.
        counts (`Counter`, *optional*):
            Counter that is updated as rows are read, with the number of rows that are `joined`, `rejected`, `error`,
            `tie` (or `no tie`) and `missing` (without annotation). Rows that another process reads or that come from a
            cache are not counted.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the same type and order as the source, with exactly the
        columns of [`data.formats.instance_pair_features`] or [`data.formats.attribute_features`].

    Raises:
        `ValueError`: If `annotations` are not annotations, if their statuses or preferences are integers without names, or if
            no row of a dataset in memory has one. When rows are read, if the images of a row are not those that were annotated.
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
    annotations = without_decoding(with_lists(annotations.with_format(None), "the annotations"))
    features = joined_features(annotations.features)
    is_pair = "instances" in features
    if ties and not is_pair:
        raise ValueError("`ties=True` is for annotations of pairs; single images have no ties.")
    if is_pair and "chosen_uid" not in annotations.features:
        logger.warning(
            "The annotations have no uids: rows are matched by their ids alone, and their images are not checked."
        )
        source, columns = training_columns(source, columns), None
    source, columns = prepare_rows(source, pair_columns if is_pair else image_columns, columns)
    join = Join(annotations, columns, features, ties, Counter() if counts is None else counts)
    join.log_left_out()
    if isinstance(source, IterableDataset):
        stream = source.map(join, batched=True, batch_size=ROWS_AT_ONCE, remove_columns=list(columns.values()))
        return stream.cast(features)  # if `map` is given the features, it does not decode the images of a stream
    return join.of_dataset(source)


@dataclass
class Join:
    """
    Turns batches of source rows into rows for the trainers.

    Args:
        annotations ([`~datasets.Dataset`]):
            The annotations.
        columns (`dict[str, str]`):
            From our column names to those of the source.
        features ([`~datasets.Features`]):
            Columns of the result.
        ties (`bool`):
            Whether to return only the ties.
        counts (`Counter`):
            Number of rows per outcome.
    """

    annotations: Dataset
    columns: dict[str, str]
    features: Features
    ties: bool
    counts: Counter = field(default_factory=Counter)

    def __getstate__(self) -> dict:
        # `datasets` hashes this state to find a result in its cache. Counts and index do not change the result.
        state = self.__dict__ | {"counts": Counter()}
        for name in ("index", "statuses", "preference"):  # cached properties
            state.pop(name, None)
        return state

    @cached_property
    def index(self) -> tuple[dict[str, int], dict[str, str]]:
        """Maps row ids to the index of their annotation, and the ids of unused annotations to the reason."""
        ids = id_texts(self.annotations["id"][:])
        ties = [False] * len(ids)
        if "tie" in self.annotations.features:
            ties = each_once(read_bool, self.annotations["tie"][:], "tie")
        used, others = {}, {}
        for number, (row_id, status, tie) in enumerate(zip(ids, self.statuses, ties, strict=True)):
            if status != "ok":
                others[row_id] = status
            elif tie != self.ties:
                others[row_id] = "tie" if tie else "no tie"
            elif row_id in used:
                raise ValueError(
                    f"The row with id {shown(row_id)} is annotated twice: join the annotations of one run at a time."
                )
            else:
                used[row_id] = number
        return used, others

    @cached_property
    def statuses(self) -> list[str]:
        """The status of each annotation."""
        if "status" not in self.annotations.features:
            return ["ok"] * len(self.annotations)
        read = name_reader(self.annotations.features["status"], "status", STATUSES)
        return each_once(read, self.annotations["status"][:], "status")

    @cached_property
    def preference(self) -> Callable[[Any], str]:
        """Reads a preference."""
        feature = self.annotations.features["instances"].feature
        if not isinstance(feature, dict):  # there are no instances at all
            return str
        return name_reader(feature["preference"], "instances.preference", PREFERENCES)

    def log_left_out(self) -> None:
        """Logs how many annotations are not used."""
        used, _ = self.index
        if self.is_pair:
            self.preference  # noqa: B018 refuses integers without names before any row is read
        statuses = Counter(self.statuses)
        left_out = {name: statuses[name] for name in STATUSES if name != "ok"} | {"ties": statuses["ok"] - len(used)}
        if self.ties:
            logger.warning(
                f"{len(used):,} of {len(self.annotations):,} annotations are ties, which are not for training."
            )
        elif any(left_out.values()):
            figures = ", ".join(f"{name} {number:,}" for name, number in left_out.items() if number)
            logger.warning(
                f"{len(used):,} of {len(self.annotations):,} annotations become training rows. Left out: {figures}."
            )

    def annotated(self, ids: list[str]) -> list[int]:
        """
        Finds the rows of the source that have an annotation. Logs the numbers of rows without annotation and of
        annotations without row.

        Args:
            ids (`list[str]`):
                Ids of all rows.

        Returns:
            `list[int]`: indices of the rows.

        Raises:
            `ValueError`: If no row has an annotation.
        """
        used, others = self.index
        numbers = [number for number, row_id in enumerate(ids) if row_id in used or row_id in others]
        if ids and not numbers:
            raise ValueError(
                f"None of the {len(ids):,} rows of the source has an annotation. The first id of the source is "
                f"{shown(ids[0])}, that of the annotations is {shown(id_text(self.annotations['id'][0]))}: name the column of the ids with "
                "`columns`, or pass the dataset and split that were annotated." + zeros_lost(ids, [*used, *others])
            )
        if missing := len(ids) - len(numbers):
            self.counts["missing"] += missing
            without = [row_id for row_id in ids if row_id not in used and row_id not in others]
            logger.warning(
                f"{missing:,} of {len(ids):,} rows of the source have no annotation and are left out: those with the ids "
                f"{shortened(without, 5)}."
            )
        known = set(ids)
        if absent := [row_id for row_id in used if row_id not in known]:
            logger.warning(
                f"{len(absent):,} of {len(used):,} usable annotations have no row in the source: those with the ids "
                f"{shortened(absent, 5)}."
            )
        return numbers

    def of_dataset(self, source: Dataset) -> Dataset:
        """
        Joins a dataset in memory by columns, see [`annotation.joined_columns`].

        Args:
            source ([`~datasets.Dataset`]):
                The rows.

        Returns:
            [`~datasets.Dataset`]

        Raises:
            `ValueError`: If no row has an annotation, or the images of a row are not those that were annotated.
        """
        used, others = self.index
        ids = id_texts(source[self.columns["id"]][:])
        numbers = self.annotated(ids)
        for number in numbers:
            if ids[number] not in used:
                self.leave_out(ids[number], others[ids[number]])
        numbers = np.array([number for number in numbers if ids[number] in used], dtype=int)
        places = np.array([used[ids[number]] for number in numbers], dtype=int)
        source, ids = source.select(numbers), [ids[number] for number in numbers]
        turned = self.turned(source, places)
        for number in (turned < 0).nonzero()[0].tolist():
            self.refuse(ids[number])
        kept = (turned >= 0).nonzero()[0]
        self.counts["joined"] += len(kept)
        return joined_columns(
            source.select(kept),
            self.columns,
            [ids[number] for number in kept],
            turned[kept] == 1,
            self.annotations,
            places[kept],
            self.features,
            self.preference if self.is_pair else None,
        )

    def turned(self, source: Dataset, places: np.ndarray) -> np.ndarray:
        """For each row, whether its second image is the chosen one: 0 or 1, and -1 if it has other images than were annotated."""
        uids = [name for name in ("chosen_uid", "rejected_uid", "image_uid") if name in self.annotations.features]
        if not uids or not len(source):
            return np.zeros(len(source), dtype=int)
        annotated = self.annotations.select_columns(uids).select(places).with_format("arrow")[:]
        names = ("image_0", "image_1") if "image_0" in self.columns else ("chosen", "rejected")
        stored = image_uids(source, self.columns, names if self.is_pair else ("image",))
        if self.is_pair:
            return orientation(stored, *(annotated[name] for name in uids))
        return np.where(pc.equal(stored["image"], annotated["image_uid"]).to_numpy(), 0, -1)

    def refuse(self, row_id: str) -> None:
        """Counts a row with other images than were annotated where the source has its id twice, else raises a `ValueError`."""
        _, others = self.index
        if row_id not in others:
            raise ValueError(
                f"The row with id {shown(row_id)} has other images than were annotated: their uids differ from those in the "
                "annotation. Use the dataset, and the revision of it, that was annotated."
            )
        self.leave_out(row_id, others[row_id])  # the other row is the used one

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Joins a batch of rows. The result may have fewer rows."""
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
            join_pair(row, self.columns, annotation, self.preference)
            if self.is_pair
            else join_image(row, self.columns, annotation)
        )
        if joined is None:
            self.refuse(row_id)
            return None
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
                f"The row with id {shown(row_id)} has no annotation and is left out. So far {number:,} rows have none, and "
                f"{self.counts.total() - number:,} have one."
            )


def id_texts(ids: list) -> list[str]:
    """Ids as texts, see [`annotation.records.id_text`]."""
    return [row_id if isinstance(row_id, str) else id_text(row_id) for row_id in ids]


def each_once(read: Callable[[Any], Any], values: list, column: str) -> list:
    """Applies a function to the values of a column, once to all that are equal. Raises a `ValueError` if one is a list or the like."""
    for value in values:
        if not isinstance(value, Hashable):
            raise ValueError(
                f"`{column}` of the annotations must be single values, got {shown(value)}. Annotate again."
            )
    found = {value: read(value) for value in set(values)}
    return [found[value] for value in values]


def zeros_lost(ids: list[str], annotated: list[str]) -> str:
    """Tells if ids differ in leading zeros alone, which a number does not have."""
    if {row_id.lstrip("0") for row_id in ids} & {row_id.lstrip("0") for row_id in annotated}:
        return " The ids differ in leading zeros alone: one side was read as numbers. Store the ids as text."
    return ""
