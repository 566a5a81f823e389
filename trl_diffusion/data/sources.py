# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Reads datasets as people have them: files, folders of files and images, pairs in two folders, WebDataset archives, the Hub."""

import csv
import glob
import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    config,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from huggingface_hub import metadata_load

from ..messages import CONTROL, cut, shown
from .columns import Source, without_decoding
from .content import FileIndex, state_of
from .image_files import IMAGE_SUFFIXES, captioned_images, find_pair_folders, pairs_in_folders, visible_files
from .row_contents import kept_folder
from .tables import csv_settings, with_images, with_lists, without_hpdv2_lists


logger = logging.getLogger(__name__)

Splits = DatasetDict | IterableDatasetDict

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_DATA = {
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
    "dataset_dict.json",
    "manifest.json",
    "config.json",
}
UNREADABLE = (  # what `datasets` and Arrow raise at files that are not what their names say
    *(
        DatasetGenerationError,
        ValueError,
        TypeError,
        OSError,
        tarfile.TarError,
        pa.ArrowException,
        zlib.error,
        EOFError,
    ),
    *(LookupError, AttributeError, NotImplementedError, RuntimeError, csv.Error),
)
LONGEST_ID = 200  # characters of an id of the Hub
MOST_NAMES = 100_000  # of a pattern
MOST_TIMES = 200  # as large as it was packed a file may become, if that is more than the next number of bytes
ALWAYS_UNPACKED = 2**30
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")  # as `push_to_hub` names files; a hash may follow


def load_source(
    name: str, config_name: str | None = None, revision: str | None = None, streaming: bool = False
) -> Splits:
    """
    Loads a dataset.

    Args:
        name (`str`):
            A file (`.parquet`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.arrow`, `.tar`, also with `.gz` or `.zst`), a pattern of
            files such as `shard-{000..009}.tar` or `part-*.parquet`, a folder, or a Hub id. A folder holds such files, images
            with a `metadata` file, pairs in two folders such as `chosen/` and `rejected/`, images with captions in `.txt`
            files, or what `save_to_disk` wrote.
        config_name (`str`, *optional*):
            Configuration of the dataset.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Stream the dataset.

    Returns:
        `DatasetDict` or `IterableDatasetDict`: the splits. A file, or a folder without splits, is the split `train`.

    Raises:
        `ValueError`: If there is no such dataset, or it cannot be read. The message names the file.
    """
    path = Path(os.path.expanduser(name))
    if CONTROL.search(name):
        raise ValueError(f"There is no file or folder {shown(name)}.")
    if os.path.isdir(path):
        splits = read_folder(path, config_name, streaming)
    elif os.path.isfile(path):
        splits = read_files({"train": [path]}, streaming)
    elif is_pattern(name):
        splits = read_files({"train": expanded(str(path))}, streaming)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or format_of(path) or len(name) > LONGEST_ID:
        raise ValueError(f"There is no file or folder {cut(name)}.")
    else:
        return read_hub(name, config_name, revision, streaming)
    return (IterableDatasetDict if streaming else DatasetDict)(splits)


def read_hub(name: str, config_name: str | None, revision: str | None, streaming: bool) -> Splits:
    """Loads a dataset of the Hub."""
    try:
        return load_dataset(name, name=config_name, revision=revision, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no file or folder {name}, and no dataset of this name could be read from the Hub: {first_line(error)} "
            "If it is private or gated, run `hf auth login`."
        ) from error
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        raise ValueError(
            f"The dataset {name} is read by a script, which `datasets` no longer runs. Download its files, such as with "
            f"`hf download {name} --repo-type dataset --local-dir FOLDER`, and name the folder or the file of its rows."
        ) from error


# ----- folders -----


def read_folder(folder: Path, config_name: str | None, streaming: bool) -> dict[str, Source]:
    """Reads a folder, by what is in it."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return read_saved(folder, streaming)
    files = list(visible_files(folder))
    if config_name is not None or has_configurations(folder):
        return load_folder(folder, config_name, cache_of(files, streaming), streaming)
    tables = [path for path in files if format_of(path) not in (None, "webdataset") and path.name not in NOT_DATA]
    metadata = [path for path in tables if path.name.split(".")[0] == "metadata"]
    archives = [path for path in files if format_of(path) == "webdataset"]
    if folders := find_pair_folders(folder, SPLITS):
        return {split: streamed(pairs_in_folders(*pair), streaming) for split, pair in folders.items()}
    if metadata:
        return read_files(by_split(folder, metadata), streaming)
    if archives:
        return read_files(by_split(folder, archives), streaming)
    if tables:
        return read_files(by_split(folder, of_one_format(folder, tables)), streaming)
    if zips := [path for path in files if path.suffix.lower() == ".zip"]:
        for path in zips:
            refuse_bomb(path)
        return load_folder(folder, None, cache_of(files, streaming), streaming)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        splits = by_top_folder(folder, images)
        return {split: streamed(captioned_images(folder, found), streaming) for split, found in splits.items()}
    held = Counter(path.suffix.lower() or "no suffix" for path in files)
    raise ValueError(
        f"The folder {folder} holds nothing that can be read as a dataset: "
        f"{', '.join(f'{number} files with {suffix}' for suffix, number in held.most_common(5)) or 'it has no files'}. It may "
        f"hold {', '.join(FORMATS)} files, images with a metadata.jsonl, or pairs in the folders chosen/ and rejected/."
    )


def load_folder(folder: Path, config_name: str | None, cache_dir: str | None, streaming: bool) -> Splits:
    """Loads a folder as `datasets` does, which reads no more than what is in it and runs no script."""
    try:
        return load_dataset(str(folder), name=config_name, streaming=streaming, cache_dir=cache_dir)
    except UNREADABLE as error:
        raise ValueError(f"The folder {folder} cannot be read: {first_line(error.__cause__ or error)}") from error


def read_saved(folder: Path, streaming: bool) -> dict[str, Source]:
    """Reads what `save_to_disk` wrote."""
    try:
        for path in (folder / "dataset_dict.json", *folder.glob("**/state.json")):
            refuse_places_outside(path)
        dataset = load_from_disk(str(folder))
    except UNREADABLE as error:
        raise ValueError(f"The folder {folder} cannot be read: {first_line(error)}") from error
    splits = dataset if isinstance(dataset, DatasetDict) else {"train": dataset}
    return {split: streamed(rows, streaming) for split, rows in splits.items()}


def refuse_places_outside(path: Path) -> None:
    """Refuses a file of `save_to_disk` that names files or splits outside of its folder."""
    if not path.exists():
        return
    held = json.loads(path.read_text(encoding="utf-8"))
    files = [*(held.get("_data_files") or []), *(held.get("_indices_data_files") or [])]
    for name in [*(held.get("splits") or []), *(file["filename"] for file in files)]:
        if Path(name).name != name:
            raise ValueError(f"{path} names {shown(name)}, which is not in its folder")


def refuse_bomb(path: Path) -> None:
    """Refuses a zip file that is damaged, or a thousand times larger when it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if size > most_unpacked(path):
        raise ValueError(
            f"{path} cannot be read: it claims {size:,} bytes unpacked, for {path.stat().st_size:,} packed."
        )


def refuse_holes(path: Path) -> None:
    """Refuses a tar file with a sparse member, which is read into memory with its holes."""
    with tarfile.open(path, "r:") as archive:
        if sparse := next((member for member in archive if member.issparse()), None):
            raise ValueError(f"{shown(sparse.name)} in it is a sparse file of {sparse.size:,} bytes")


def most_unpacked(path: Path) -> int:
    """Bytes that a packed file may become."""
    return max(MOST_TIMES * path.stat().st_size, ALWAYS_UNPACKED)


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files."""
    return any(character in name for character in "*?{[")


def streamed(dataset: Dataset, streaming: bool) -> Source:
    return dataset.to_iterable_dataset() if streaming else dataset


def has_configurations(folder: Path) -> bool:
    """Whether the card in a folder describes the files of the dataset."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    try:
        configs = (metadata_load(card) or {}).get("configs")
    except (ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"The head of {card} cannot be read: {first_line(error)}") from error
    for text in texts_in(configs):
        if text.startswith(("/", "~")) or "://" in text or ".." in text.split("/"):
            raise ValueError(f"The head of {card} names {shown(text)}, which is not in its folder.")
    return configs is not None


def texts_in(value: Any) -> Iterator[str]:
    """The texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts_in(part)


def of_one_format(folder: Path, tables: list[Path]) -> list[Path]:
    """The tables of the most common format. Others are named in a warning."""
    suffixes = {path: path.suffixes[-2] if path.suffix.lower() in COMPRESSIONS else path.suffix for path in tables}
    counts = Counter(suffixes.values()).most_common()
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        names = ", ".join(str(path.relative_to(folder)) for path in tables[:6])
        raise ValueError(
            f"The folder {folder} holds files of several formats: {names}. Name the file that holds the rows."
        )
    others = [str(path.relative_to(folder)) for path in tables if suffixes[path] != counts[0][0]]
    if others:
        logger.warning(
            f"Of the files in {folder.name}, {', '.join(others[:6])} are not read: they have another format."
        )
    return [path for path in tables if suffixes[path] == counts[0][0]]


def by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """
    Sorts files into splits, by their names or those of their folders, as `datasets` does.

    Args:
        folder (`Path`):
            The folder of the dataset.
        files (`list[Path]`):
            The files.

    Returns:
        `dict[str, list[Path]]`: `train` if no name tells a split.
    """
    splits = defaultdict(list)
    for path in files:
        splits[split_of(path.relative_to(folder))].append(path)
    without = splits.pop(None, [])
    if not splits:
        return {"train": without}
    if without:
        names = ", ".join(str(path.relative_to(folder)) for path in without[:5])
        logger.warning(
            f"The names of {len(without)} files in {folder.name} tell no split, and they are not read: {names}."
        )
    order = [*SPLITS, *sorted(splits)]
    return {split: splits[split] for split in sorted(splits, key=order.index)}


def by_top_folder(folder: Path, images: list[Path]) -> dict[str, list[Path]]:
    """Sorts images into splits, if they are all in folders that are called so. The names of images tell no split."""
    tops = {path: path.relative_to(folder).parts[0].lower() for path in images}
    splits = {split: [path for path in images if tops[path] in words] for split, words in SPLITS.items()}
    if sum(map(len, splits.values())) < len(images):
        return {"train": images}
    return {split: found for split, found in splits.items() if found}


def split_of(path: Path) -> str | None:
    """The split that a relative path names: in its file name, else in a folder."""
    if shard := SHARD.match(path.name):
        return shard[1]
    for part in reversed(path.parts):
        for split, words in SPLITS.items():
            if set(re.split(r"[-._ 0-9]", part.lower())) & set(words):
                return split
    return None


# ----- files -----


def format_of(path: Path) -> str | None:
    """The builder of `datasets` that reads a file, by its suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def expanded(pattern: str) -> list[Path]:
    """
    Finds the files of a pattern.

    Args:
        pattern (`str`):
            With `*`, `?`, `[...]`, `{a,b}` or a range `{000..009}`.

    Returns:
        `list[Path]`

    Raises:
        `ValueError`: If there are none, or a file of a range is missing.
    """
    files = []
    names = list(islice(braces(pattern), MOST_NAMES + 1))
    if len(names) > MOST_NAMES:
        raise ValueError(f"{cut(pattern)} names more than {MOST_NAMES:,} files.")
    for name in names:
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise ValueError(f"There is no file {name}" + (f", which {pattern} names." if name != pattern else "."))
        files += [Path(path) for path in found]
    return files


def braces(pattern: str) -> Iterator[str]:
    """Expands `{a,b}` and `{000..009}`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    words: Iterable[str] = match[1].split(",")
    if span := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1]):
        words = (str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1))
    for word in words:
        yield from braces(pattern[: match.start()] + word + pattern[match.end() :])


def read_files(files: dict[str, list[Path]], streaming: bool) -> dict[str, Source]:
    """Reads files of rows. Paths of images in them are relative to the folder of their file."""
    splits = {}
    for split, paths in files.items():
        folders = defaultdict(list)
        for path in paths:
            if format_of(path) is None:
                raise ValueError(
                    f"{path} cannot be read as a dataset: its name must end in one of {', '.join(FORMATS)}, which "
                    f"{' or '.join(COMPRESSIONS)} may follow."
                )
            folders[path.parent, format_of(path)].append(path)
        parts = [read_group(split, group, builder, streaming) for (_, builder), group in folders.items()]
        splits[split] = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return splits


def read_group(split: str, files: list[Path], builder: str, streaming: bool) -> Source:
    """Reads the files of one folder."""
    names = ", ".join(str(path) for path in files[:5])
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"{names} cannot be read: it is empty.")
    try:
        for path in files if builder == "webdataset" and not streaming else ():
            if path.suffix.lower() == ".tar":
                refuse_holes(path)
        settings = csv_settings(files[0]) if builder == "csv" else {}
        places = [unpacked(path) for path in files]
        data_files, cache_dir = {split: list(map(glob.escape, places))}, cache_of(places, streaming)
        dataset = load_dataset(
            builder, data_files=data_files, split=split, streaming=streaming, cache_dir=cache_dir, **settings
        )
    except UNREADABLE as error:
        reason = first_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            reason = "it has no rows."
        raise ValueError(f"{names} cannot be read: {reason}") from error
    if builder == "webdataset":
        return with_keys(dataset)
    where = str(files[0])
    try:  # the first row of a stream is read here, and of a file that is mapped into memory
        return with_images(with_lists(without_hpdv2_lists(dataset, where), where), files[0])
    except (OSError, pa.ArrowException, DatasetGenerationError) as error:
        raise ValueError(f"{names} cannot be read: {first_line(error.__cause__ or error)}") from error


def cache_of(files: list[str | Path], is_read_anew: bool = False) -> str | None:
    """
    Where `datasets` keeps the rows that it makes of files: for each content of theirs another folder, for `datasets` itself takes a file
    with the time of an earlier one for that one.

    Args:
        files (`list[str | Path]`):
            The files.
        is_read_anew (`bool`, *optional*, defaults to `False`):
            Whether nothing is kept.

    Returns:
        `str` or `None`
    """
    if is_read_anew:
        return None
    places = sorted(os.path.abspath(path) for path in files)
    index = kept_folder() / f"files-{Hasher.hash(os.path.commonpath(places))}.arrow"
    content = Hasher.hash((places, FileIndex(index).of(places)))
    return str(Path(config.HF_DATASETS_CACHE) / "by_content" / content)


def first_line(error: BaseException) -> str:
    return cut((str(error).strip() or type(error).__name__).splitlines()[0]).rstrip(".") + "."


def unpacked(path: Path) -> str:
    """A file that `datasets` reads: zstd, for which it needs another package, and packed Parquet are unpacked into its cache."""
    packing = COMPRESSIONS.get(path.suffix.lower())
    if packing is None or (packing == "gzip" and format_of(path) not in ("parquet", "arrow")):
        return str(path)
    state = "-".join(map(str, state_of(path)))
    target = Path(config.HF_DATASETS_CACHE) / "unpacked" / state / path.stem
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        with pa.input_stream(str(path), compression=packing) as packed, partial.open("wb") as file:
            while block := packed.read(1 << 20):
                file.write(block)
                if file.tell() > most_unpacked(path):
                    raise ValueError(f"it is more than {MOST_TIMES} times as large when it is unpacked")
        partial.replace(target)
    return str(target)


class Keys:
    """Gives the rows of a WebDataset ids: the name of the archive and the key, which may begin at 0 in every archive."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        pairs = zip(batch["__url__"], batch["__key__"], strict=True)
        return {"id": [f"{Path(url).name.split('.')[0]}/{key}" for url, key in pairs]}


def with_keys(dataset: Source) -> Source:
    """Adds the ids of a WebDataset."""
    if isinstance(dataset, IterableDataset):
        features = dataset.features
        stream = without_decoding(dataset).map(Keys(), batched=True, remove_columns=["__url__", "__key__"])
        kept = {name: feature for name, feature in features.items() if name not in ("__url__", "__key__")}
        return stream.cast(Features(kept | {"id": features["__key__"]}))
    columns = dataset.select_columns(["__url__", "__key__"])[:]
    return dataset.add_column("id", Keys()(columns)["id"]).remove_columns(["__url__", "__key__"])
