# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows that `datasets` keeps of files are those of the files that are there."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pytest
from datasets import Dataset

from trl_diffusion.data.sources import load_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def replaced(path: Path, write: Callable[[], None]) -> None:
    """Writes a file again, and sets its time back."""
    before = path.stat()
    write()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rows_in(kind: str, folder: Path, word: str) -> Path:
    """A row with a word of three letters, in a file of a kind or in what lies around it."""
    path, rows = folder / f"rows.{kind}", Dataset.from_dict({"id": ["1"], "prompt": [word]})
    if kind == "jsonl":
        path.write_text(json.dumps(rows[0]) + "\n")
    elif kind == "csv":
        path.write_text(f"id,prompt\n1,{word}\n")
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "parquet.gz":
        rows.to_parquet(folder / "made")
        path.write_bytes(gzip.compress((folder / "made").read_bytes()))
        (folder / "made").unlink()
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.data.schema) as writer:
            writer.write_table(rows.data.table)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("0.prompt.txt")
            info.size = 3
            archive.addfile(info, io.BytesIO(word.encode()))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.csv", f"id,prompt\n1,{word}\n")
    return path


KINDS = ("jsonl", "csv", "parquet", "parquet.gz", "arrow", "tar", "zip", "metadata", "configurations")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_replaced_in_place_has_its_own_rows(tmp_path, kind):
    """Of the same name, size and time: not the rows that `datasets` kept of the earlier one; those are kept as well."""
    folder = tmp_path / "data"
    folder.mkdir()

    def write(word: str) -> Path:
        if kind == "metadata":
            path = folder / "metadata.csv"
            path.write_text(f"file_name,prompt\na.png,{word}\n")
        elif kind == "configurations":
            path = rows_in("csv", folder, word)
        else:
            path = rows_in(kind, folder, word)
        return path

    if kind == "metadata":
        PIL.Image.new("RGB", (8, 8)).save(folder / "a.png")
    if kind == "configurations":
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n---\n")
    path, found = write("aaa"), []
    for word in ("aaa", "bbb", "aaa"):
        replaced(path, lambda word=word: write(word))
        rows = load_source(str(folder if kind in ("metadata", "configurations", "zip") else path))["train"]
        found.append(next(rows[name][0] for name in ("prompt", "prompt.txt") if name in rows.column_names))
    assert found == ["aaa", "bbb", "aaa"]
