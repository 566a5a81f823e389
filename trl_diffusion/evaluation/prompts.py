# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Prompts for the comparison of models, from benchmarks, datasets of the Hub or files."""

import csv
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download

from ..data.columns import column_names, with_nested_columns, without_decoding
from ..data.sources import format_of, load_source
from ..revisions import commit_of
from ..safe_names import SAFE_NAME, check_safe_name


@dataclass(frozen=True)
class Benchmark:
    """
    A published set of prompts: small files in a dataset repository of the Hub.

    Args:
        repo_id (`str`):
            The repository.
        revision (`str`):
            The commit, or a branch if no commit is pinned.
        files (`dict[str, str | None]`):
            The group of each file, `None` if the groups are in a column or there are none.
        prompt_column (`str`):
            Column of the prompts.
        group_column (`str`):
            Column of the groups.
    """

    repo_id: str
    revision: str
    files: dict[str, str | None]
    prompt_column: str = "prompt"
    group_column: str = "group"


BENCHMARKS = {
    # PartiPrompts (arXiv:2206.10789): 1632 prompts in 12 categories
    "parti": Benchmark(
        "nateraw/parti-prompts",
        "944b156abfdad7627c3221b5ec4f6a6fb060a197",
        {"PartiPrompts.tsv": None},
        prompt_column="Prompt",
        group_column="Category",
    ),
    # HPD v2 (arXiv:2306.09341): 800 prompts in each of four styles
    "hpdv2": Benchmark(
        "zhwang/HPDv2",
        "b9517430f34b1080d4f741118d2a440155a165cd",
        {f"benchmark/{style}.json": style for style in ("anime", "concept-art", "paintings", "photo")},
    ),
    # Pick-a-Pic v2 (arXiv:2305.01569): the 500 prompts of `test_unique`, from the edition without images
    "pickapic": Benchmark(
        "yuvalkirstain/pickapic_v2_no_images",
        "main",
        {"data/test_unique-00000-of-00001-e852c19ead276a89.parquet": None},
        prompt_column="caption",
    ),
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """
    A prompt.

    Args:
        id (`str`):
            Id of the prompt, part of the file names of its images.
        text (`str`):
            Text of the prompt.
        group (`str`, *optional*):
            Category or style of the prompt.
    """

    id: str
    text: str
    group: str | None = None

    def __post_init__(self):
        check_safe_name(self.id, "prompt's id")


@dataclass(frozen=True)
class PromptSet:
    """
    All prompts of a source, or a selection of them.

    Args:
        name (`str`):
            Name of the benchmark, Hub id of the dataset, or name of the file.
        revision (`str`, *optional*):
            Commit on the Hub, `None` for a file.
        digest (`str`):
            Hash `"sha256:..."` of the ids and texts of all prompts of the source, selected or not.
        prompts (`tuple[Prompt, ...]`):
            The prompts.
        split (`str`, *optional*):
            Split of the dataset on the Hub.
    """

    name: str
    revision: str | None
    digest: str
    prompts: tuple[Prompt, ...]
    split: str | None = None

    def select(self, limit: int) -> "PromptSet":
        """
        Selects evenly spaced prompts. The consecutive groups of a benchmark therefore keep their shares, and a
        selection of twice the size contains the smaller one.

        Args:
            limit (`int`):
                Maximum number of prompts.

        Returns:
            [`PromptSet`]: the selection, with the same ids and digest.

        Raises:
            `ValueError`: If `limit` is less than 1.
        """
        if limit < 1:
            raise ValueError(f"The limit on the number of prompts must be at least 1, got {limit}.")
        num = len(self.prompts)
        taken = min(limit, num)
        return replace(self, prompts=tuple(self.prompts[place * num // taken] for place in range(taken)))


def load_prompts(
    source: str | Path,
    limit: int | None = None,
    prompt_column: str = "prompt",
    split: str = "train",
    revision: str | None = None,
) -> PromptSet:
    """
    Loads prompts.

    The id of a prompt is that of the column `id`, if there is one, else the zero-padded row number, counted from 0.
    The ids of `hpdv2` begin with the style. Groups are Parti's categories, HPD v2's styles, or a column `group`.

    Args:
        source (`str` or `Path`):
            - `"parti"`, `"hpdv2"` or `"pickapic"`;
            - a file: `.txt` with one prompt per line, `.json` with a list of strings or of objects, or `.jsonl`, `.csv`,
              `.tsv` or `.parquet` with columns;
            - another file or a folder of rows or of images with captions, see [`data.sources.load_source`];
            - a dataset of the Hub. Of Parquet files, only the needed columns are downloaded, no images.
        limit (`int`, *optional*):
            Maximum number of prompts, which are evenly spaced, see [`evaluation.prompts.PromptSet.select`].
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts, in a file or a dataset.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Defaults to the pinned one of a benchmark, and to `main` for a dataset.

    Returns:
        [`PromptSet`]

    Raises:
        `ValueError`: If the source does not exist, cannot be downloaded or read, has no prompts or lacks the column;
            if a prompt is empty; if an id is repeated or is not valid in a file name.
    """
    source = str(source)
    if source in BENCHMARKS:
        name, (rows, commit) = source, read_benchmark(BENCHMARKS[source], revision)
    elif Path(source).suffix in READERS or (Path(source).is_file() and not format_of(Path(source))):
        name, rows, commit = Path(source).name, read_file(Path(source), prompt_column), None
    elif Path(source).is_dir() or format_of(Path(source)):
        name, rows, commit = Path(source).name, read_source(source, prompt_column, split), None
    elif HUB_ID.fullmatch(source):
        name, (rows, commit) = source, read_dataset(source, prompt_column, split, revision)
    else:
        raise ValueError(
            f"There are no prompts called {source!r}. Choose one of {', '.join(BENCHMARKS)}, a file "
            f"({', '.join(READERS)}), a folder of rows or a dataset of the Hub, such as user/name."
        )
    prompts = make_prompts(rows, name)
    digest = hashlib.sha256(json.dumps([(prompt.id, prompt.text) for prompt in prompts]).encode()).hexdigest()
    of_dataset = commit is not None and source not in BENCHMARKS
    prompt_set = PromptSet(name, commit, f"sha256:{digest[:16]}", prompts, split if of_dataset else None)
    return prompt_set if limit is None else prompt_set.select(limit)


def make_prompts(rows: list[Row], name: str) -> tuple[Prompt, ...]:
    """
    Converts rows to prompts, and checks them.

    Args:
        rows (`list[dict]`):
            Rows with `prompt`, and with `id` and `group`, which may be `None`.
        name (`str`):
            Name of the source, for messages.

    Returns:
        `tuple[Prompt, ...]`

    Raises:
        `ValueError`: If there are no prompts, a prompt is empty, or an id is not valid.
    """
    if not rows:
        raise ValueError(f"{name} holds no prompts.")
    prompts: dict[str, Prompt] = {}  # by lower-case id, because some file systems ignore case
    for number, row in enumerate(rows):
        text, where = row["prompt"], f"row {number} of {name}, counted from 0,"
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The prompt in {where} is {text!r}. Write a text, or remove the row.")
        prompt_id = f"{number:05d}" if row["id"] is None else str(row["id"])
        if not SAFE_NAME.fullmatch(prompt_id):
            raise ValueError(
                f"The id {prompt_id!r} in {where} cannot be part of a file name. An id has at most 200 letters from a to z, "
                "digits, '.', '_' and '-', and begins with a letter or digit."
            )
        if (earlier := prompts.get(prompt_id.lower())) is not None:
            raise ValueError(
                f"The id {prompt_id!r} in {where} repeats {earlier.id!r} of an earlier row. Ids are part of file names: they "
                "must be unique, and differ in more than upper and lower case."
            )
        prompts[prompt_id.lower()] = Prompt(prompt_id, text, None if row["group"] in (None, "") else str(row["group"]))
    return tuple(prompts.values())


# ----- sources -----


def read_benchmark(benchmark: Benchmark, revision: str | None) -> tuple[list[Row], str]:
    """
    Reads a benchmark.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark.
        revision (`str`, *optional*):
            Branch, tag or commit, instead of the pinned one.

    Returns:
        `tuple[list[dict], str]`: rows for [`evaluation.prompts.make_prompts`], and the commit.

    Raises:
        `ValueError`: If a file cannot be downloaded, with the command that downloads it.
    """
    repo_id, revision = benchmark.repo_id, revision or benchmark.revision
    rows = []
    for filename, group in benchmark.files.items():
        try:
            path = Path(hf_hub_download(repo_id, filename, revision=revision, repo_type="dataset"))
        except OSError as error:
            raise ValueError(
                f"{filename} of https://huggingface.co/datasets/{repo_id} is not in the cache and could not be downloaded: "
                f"{str(error).splitlines()[0]} On a machine with network access, run `hf download {repo_id} {filename} "
                f"--revision {revision} --repo-type dataset` and copy its Hub cache (`HF_HOME`) here; or pass a mirror of it "
                "on the Hub, or a file of prompts."
            ) from error
        revision = commit_of(path, filename)
        of_file = read_file(path, benchmark.prompt_column, benchmark.group_column)
        if group is not None:
            of_file = [
                {"id": f"{group}-{number:05d}", "prompt": row["prompt"], "group": group}
                for number, row in enumerate(of_file)
            ]
        rows += of_file
    return rows, revision


def read_dataset(repo_id: str, prompt_column: str, split: str, revision: str | None) -> tuple[list[Row], str]:
    """
    Streams a dataset of the Hub. Of Parquet files, only the needed columns are read.

    Args:
        repo_id (`str`):
            The dataset.
        prompt_column (`str`):
            Column of the prompts.
        split (`str`):
            The split.
        revision (`str`, *optional*):
            Branch, tag or commit.

    Returns:
        `tuple[list[dict], str]`: rows for [`evaluation.prompts.make_prompts`], and the commit.

    Raises:
        `ValueError`: If it cannot be read, or lacks the split or the column.
    """
    try:
        commit = HfApi().dataset_info(repo_id, revision=revision).sha
        dataset = load_dataset(repo_id, split=split, revision=commit, streaming=True)
        if dataset.column_names is not None:  # unknown for CSV and JSON until they are read
            columns = [name for name in ("id", prompt_column, "group") if name in dataset.column_names]
            check_column(prompt_column, dataset.column_names, repo_id)
            if dataset.info.builder_name == "parquet":
                dataset = load_dataset(repo_id, split=split, revision=commit, streaming=True, columns=columns)
            dataset = dataset.select_columns(columns)
        return chosen_columns(dataset, repo_id, prompt_column), commit
    except (OSError, httpx2.HTTPError) as error:
        raise ValueError(
            f"{repo_id} is not a file, and https://huggingface.co/datasets/{repo_id} could not be read: "
            f"{str(error).splitlines()[0]}"
        ) from error


def read_source(source: str, prompt_column: str, split: str) -> list[Row]:
    """
    Reads the prompts of a dataset on the disk. Its images are not decoded.

    Args:
        source (`str`):
            A file or folder that [`data.sources.load_source`] reads.
        prompt_column (`str`):
            Column of the prompts. A dot names a field of a column of objects.
        split (`str`):
            The split.

    Returns:
        `list[dict]`: rows for [`evaluation.prompts.make_prompts`].

    Raises:
        `ValueError`: If it cannot be read, or lacks the split or the column.
    """
    splits = load_source(source, streaming=True)
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(splits)}.")
    dataset = with_nested_columns(without_decoding(splits[split]), [prompt_column])
    present = column_names(dataset)
    check_column(prompt_column, present, source)
    columns = [name for name in ("id", prompt_column, "group") if name in present]
    rows = chosen_columns(dataset.select_columns(columns), source, prompt_column)
    return [row | {"id": row["id"] if row["id"] is None else str(row["id"]).replace("/", "-")} for row in rows]


def read_file(path: Path, prompt_column: str, group_column: str = "group") -> list[Row]:
    """
    Reads a file of prompts.

    Args:
        path (`Path`):
            The file.
        prompt_column (`str`):
            Column of the prompts. Ignored for `.txt`, and for `.json` with strings.
        group_column (`str`, *optional*, defaults to `"group"`):
            Column of the groups, if there is one.

    Returns:
        `list[dict]`: rows for [`evaluation.prompts.make_prompts`].

    Raises:
        `ValueError`: If there is no such file, it cannot be read, or it lacks the column.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path} is not a file of prompts, which must end in one of {', '.join(READERS)}.")
    if not path.is_file():
        raise ValueError(f"There is no file of prompts at {path}.")
    try:
        rows = READERS[path.suffix](path)
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as a file of prompts: {error}.") from error
    if path.suffix == ".txt" or (path.suffix == ".json" and all(list(row) == ["prompt"] for row in rows)):
        prompt_column = "prompt"
    return chosen_columns(rows, str(path), prompt_column, group_column)


def chosen_columns(rows: Iterable[Row], name: str, prompt_column: str, group_column: str = "group") -> list[Row]:
    chosen = []
    for number, row in enumerate(rows):
        check_column(prompt_column, row, f"Row {number} of {name}, counted from 0,")
        chosen.append({"id": row.get("id"), "prompt": row[prompt_column], "group": row.get(group_column)})
    return chosen


def check_column(prompt_column: str, columns: Iterable[str], where: str) -> None:
    if prompt_column not in columns:
        raise ValueError(
            f"{where} has no {prompt_column!r}; it has {', '.join(map(repr, columns))}. Name the column of the prompts with "
            "`prompt_column`."
        )


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig").removesuffix("\n")  # some editors write a byte order mark


def read_txt(path: Path) -> list[Row]:
    text = read_text(path)
    return [{"prompt": line} for line in text.split("\n")] if text else []


def read_json(path: Path) -> list[Row]:
    texts = json.loads(read_text(path))
    if not isinstance(texts, list):
        raise ValueError("it is not a list of strings or objects")
    return [text if isinstance(text, dict) else {"prompt": text} for text in texts]


def read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_txt(path)):
        try:
            rows.append(dict(json.loads(line["prompt"])))
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {number}, counted from 0, is not a JSON object ({error})") from error
    return rows


def read_csv(path: Path) -> list[Row]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Not strict with tabs: one prompt of Parti begins with a quoted word, which pandas also reads without its quotes
        rows = list(csv.DictReader(file, delimiter=delimiter, strict=delimiter == ","))
    for number, row in enumerate(rows):
        if None in row:
            raise ValueError(
                f"row {number}, counted from 0, has more cells than there are columns. Quote texts that contain "
                f"{delimiter!r}"
            )
    return rows


def read_parquet(path: Path) -> list[Row]:
    is_data = (
        pa.types.is_nested,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )  # skip images, which may be many gigabytes
    columns = [column.name for column in pq.read_schema(path) if not any(check(column.type) for check in is_data)]
    return pq.read_table(path, columns=columns).to_pylist()


READERS = {
    ".txt": read_txt,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
