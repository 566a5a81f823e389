# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from trl_diffusion.data import buckets, content, row_contents
from trl_diffusion.data.hashing import described, value_hashes
from trl_diffusion.data.row_contents import RowContents, image_states


IMAGES = ("chosen", "rejected")
UNDECODED = Image(decode=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which files are trusted at once."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "TICK_NS", 0)
    monkeypatch.setattr(row_contents, "TICK_NS", 0)


def rows(number: int = 6) -> dict[str, list]:
    box = [1.0, 2.0, 3.5, 4.0]
    return {
        "id": [f"row-{row}" for row in range(number)],
        "prompt": [f"prompt {row // 2}" for row in range(number)],
        "chosen": [{"bytes": f"chosen {row}".encode(), "path": f"{row}.png"} for row in range(number)],
        "rejected": [{"bytes": f"rejected {row}".encode(), "path": None} for row in range(number)],
        "instances": [[{"label": "cat", "box": box, "preference": row % 3}] * (row % 4) for row in range(number)],
    }


def dataset_of(columns: dict[str, list]) -> Dataset:
    made = Dataset.from_dict(columns)
    for name in IMAGES:
        made = made.cast_column(name, UNDECODED)
    return made


def with_files(columns: dict[str, list], folder: Path) -> dict[str, list]:
    """The same rows with paths of images."""
    folder.mkdir(exist_ok=True)
    columns = copy.deepcopy(columns)
    for name in IMAGES:
        for row, image in enumerate(columns[name]):
            path = folder / f"{name}-{row}.png"
            path.write_bytes(image["bytes"])
            os.utime(path, (1e9, 1e9))
            columns[name][row] = {"bytes": None, "path": str(path)}
    return columns


def on_disk(columns: dict[str, list], path: Path) -> Dataset:
    """The same rows, memory-mapped, in record batches of two."""
    table = dataset_of(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.features.arrow_schema) as writer:
        writer.write_table(table.data.table, max_chunksize=2)
    return Dataset.from_file(str(path))


def contents(dataset: Dataset, numbers=None) -> list[str]:
    return (
        RowContents(dataset, IMAGES).of(np.arange(len(dataset)) if numbers is None else np.array(numbers)).to_pylist()
    )


# ---- Equal rows ----


def test_equal_rows_have_one_hash_wherever_they_are(tmp_path):
    """In memory, in a file, as image files, in another order, with other widths of types; all rows differ."""
    expected = contents(dataset_of(rows()))
    assert len(set(expected)) == 6
    order = [3, 0, 5, 5, 1]
    wide = dataset_of(rows()).cast_column("prompt", Value("large_string"))
    for other in (
        on_disk(rows(), tmp_path / "rows.arrow"),
        dataset_of(with_files(rows(), tmp_path / "images")),
        on_disk(with_files(rows(), tmp_path / "images"), tmp_path / "paths.arrow"),
        datasets.concatenate_datasets([dataset_of(rows()).select([0, 1]), dataset_of(rows()).select(range(2, 6))]),
        dataset_of(dict(reversed(rows().items()))),
        wide,
    ):
        assert contents(other) == expected
        assert contents(other.select(order)) == contents(other, order) == [expected[row] for row in order]
        assert contents(other.select(range(2, 5))) == expected[2:5]


PATHS = {
    "text": lambda columns: {name: [image["path"] for image in columns[name]] for name in IMAGES},
    "relative": lambda columns: {
        name: [{"bytes": None, "path": os.path.relpath(image["path"])} for image in columns[name]] for name in IMAGES
    },
    "file://": lambda columns: {
        name: [{"bytes": b"", "path": f"file://{image['path']}"} for image in columns[name]] for name in IMAGES
    },
}


@pytest.mark.parametrize("kind", PATHS)
def test_a_path_is_what_its_file_holds_however_it_is_written(tmp_path, kind):
    """As a column of texts, relative, as an address of this machine."""
    columns = with_files(rows(), tmp_path / "images")
    assert contents(Dataset.from_dict(columns | PATHS[kind](columns))) == contents(dataset_of(rows()))


# ---- Another row ----


def changed(columns: dict[str, list], name: str, value) -> dict[str, list]:
    """The same rows but for one value of row 3."""
    columns = copy.deepcopy(columns)
    columns[name][3] = value
    return columns


BOX = [1.0, 2.0, 3.5, 4.0]
OTHER_ROWS = {
    "id": ("id", "row-33"),
    "prompt": ("prompt", "prompt 11"),
    "no prompt": ("prompt", None),
    "empty prompt": ("prompt", ""),
    "image": ("chosen", {"bytes": b"chosen x", "path": "3.png"}),
    "no image": ("chosen", {"bytes": None, "path": None}),
    "images swapped": None,
    "no instances": ("instances", []),
    "null instances": ("instances", None),
    "instances in another order": ("instances", [{"label": "cat", "box": BOX, "preference": 0}] * 4),
    "box": ("instances", [{"label": "cat", "box": [1.0, 2.0, 3.5, 4.5], "preference": 0}] * 3),
    "box turned": ("instances", [{"label": "cat", "box": [2.0, 1.0, 3.5, 4.0], "preference": 0}] * 3),
    "label": ("instances", [{"label": "cats", "box": BOX, "preference": 0}] * 3),
    "preference": (
        "instances",
        [{"label": "cat", "box": BOX, "preference": 0}] * 2 + [{"label": "cat", "box": BOX, "preference": None}],
    ),
}


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("change", OTHER_ROWS)
def test_another_value_is_another_hash_of_its_row_alone(tmp_path, change, where):
    """Whichever value of a row is another one, and although the dataset says that it is the same one."""
    other = rows()
    if change == "images swapped":
        other["chosen"][3], other["rejected"][3] = other["rejected"][3], other["chosen"][3]
    else:
        other = changed(other, *OTHER_ROWS[change])
    if where == "memory":
        found = [dataset_of(columns) for columns in (rows(), other)]
        found[1]._fingerprint = found[0]._fingerprint
        one, two = map(contents, found)
    else:
        path = tmp_path / "rows.arrow"
        one = contents(on_disk(rows(), path))
        on_disk(other, tmp_path / "new.arrow")
        os.utime(tmp_path / "new.arrow", ns=(path.stat().st_mtime_ns,) * 2)
        (tmp_path / "new.arrow").replace(path)
        two = contents(Dataset.from_file(str(path)))
    assert [row for row in range(6) if one[row] != two[row]] == [3]


def test_names_of_columns_and_of_fields_count():
    """Equal values under other names are other rows."""
    one = dataset_of(rows())
    assert set(contents(one)) & set(contents(one.rename_column("prompt", "text"))) == set()
    fields = (
        Features({"a": {"x": Value("int64"), "y": Value("int64")}}),
        Features({"a": {"y": Value("int64"), "x": Value("int64")}}),
    )
    found = [
        RowContents(Dataset.from_dict({"a": [dict.fromkeys(feature["a"], 1)]}, feature), ()).of(np.arange(1))
        for feature in fields
    ]
    assert found[0] != found[1]
    assert set(contents(one)) & set(contents(one.add_column("score", [1.0] * 6))) == set()


REPLACED = {
    "same size and time": lambda path: (path.write_bytes(b"chosen x"), os.utime(path, (1e9, 1e9))),
    "another size": lambda path: path.write_bytes(b"another image"),
    "removed": lambda path: path.unlink(),
    "another file moved here": lambda path: os.replace(path.with_name("chosen-5.png"), path),
}


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("change", REPLACED)
def test_a_replaced_image_file_is_another_row(tmp_path, change, where):
    """Also of the same size, with its time set back; the other rows are the same."""
    columns = with_files(rows(), tmp_path / "images")
    made = dataset_of(columns) if where == "memory" else on_disk(columns, tmp_path / "rows.arrow")
    one = contents(made)
    REPLACED[change](tmp_path / "images" / "chosen-3.png")
    two = contents(made)
    missing = {5} if change.startswith("another file") else set()
    assert {row for row in range(6) if one[row] != two[row]} == {3} | missing


def test_an_image_in_an_archive_is_told_by_the_archive(tmp_path):
    """Replaced in place, all its images may be others; an address is told by itself."""
    archive = tmp_path / "images.zip"

    def write(text: str) -> None:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a.png", text)

    write("one")
    paths = [f"zip://a.png::{archive}", "https://server/a.png"]
    made = Dataset.from_dict({"image": [{"bytes": None, "path": path} for path in paths]}).cast_column(
        "image", UNDECODED
    )
    one = RowContents(made, ("image",)).of(np.arange(2)).to_pylist()
    write("two")
    two = RowContents(made, ("image",)).of(np.arange(2)).to_pylist()
    assert one[0] != two[0] and one[1] == two[1] and len({*one, *two}) == 3


def test_what_a_transform_makes_counts():
    """Its result, not its name: a function that answers otherwise makes other rows."""
    answer = {"word": "cat"}

    def transform(batch):
        return {**batch, "prompt": [answer["word"]] * len(batch["id"])}

    made = dataset_of(rows()).with_transform(transform)
    one, again = contents(made), contents(made)
    answer["word"] = "dog"
    two = contents(made)
    assert one == again and len(set(one)) == 6 and not set(one) & set(two)


# ---- Values ----


VALUES = {
    "text": ["a", "", None, "ab", "b"],
    "bytes": [b"a", b"", None, b"ab"],
    "integer": [0, 1, -1, None, 2**40],
    "float": [0.0, 1.0, None, float("inf"), 1e-30],
    "flag": [True, False, None],
    "list": [[], [1], [1, 2], [2, 1], [0], [0, 0], [None], None, [1, None], [None, 1]],
    "nested": [[], [[]], [[], []], [[1], [2]], [[1, 2]], [[1, 2], []], [[], [1, 2]], None, [None]],
    "struct": [{"a": 1, "b": "x"}, {"a": None, "b": "x"}, {"a": 1, "b": None}, {"a": None, "b": None}, None],
    "texts": [["a", "b"], ["ab"], ["", "ab"], ["ab", ""], ["b", "a"]],
}


@pytest.mark.parametrize("name", VALUES)
def test_different_values_have_different_hashes(name):
    """Alone, in a slice, in any order; equal ones have one."""
    values = VALUES[name]
    hashes = value_hashes(pa.array(values)).tolist()
    assert len(set(hashes)) == len(values)
    twice = value_hashes(pa.array([*reversed(values), *values]).slice(1)).tolist()
    assert twice == [*hashes[::-1], *hashes][1:]


def test_widths_of_types_do_not_count():
    """Of integers, floats, texts and lists; a type is described by what its values are."""
    kinds = [pa.list_(pa.int8()), pa.large_list(pa.int64()), pa.list_(pa.uint16())]
    assert len({tuple(value_hashes(pa.array([[1, 2], []], kind)).tolist()) for kind in kinds}) == 1
    assert len({described(kind) for kind in kinds}) == 1
    assert described(pa.struct({"a": pa.int8()})) != described(pa.struct({"b": pa.int8()}))
    texts = [pa.string(), pa.large_string(), pa.string_view()]
    assert len({tuple(value_hashes(pa.array(["a", None], kind)).tolist()) for kind in texts}) == 1
    labels = Dataset.from_dict({"a": [["x"]]}, Features({"a": List(ClassLabel(names=["y", "x"]))}))
    assert value_hashes(labels.data.column("a").chunk(0)).tolist() == value_hashes(pa.array([[1]])).tolist()


# ---- What is not done again ----


def test_a_file_of_rows_is_hashed_once(tmp_path, monkeypatch):
    """Of the rows that are needed; a later start computes only those that are new, until the file changes."""
    path, hashed = tmp_path / "rows.arrow", []
    made = on_disk(rows(), path)
    os.utime(path, (1e9, 1e9))
    digests = row_contents.image_digests
    monkeypatch.setattr(row_contents, "image_digests", lambda piece: hashed.append(len(piece)) or digests(piece))
    first = contents(made, [1, 2])
    assert sum(hashed) == 2 * 2
    every = contents(Dataset.from_file(str(path)))
    assert sum(hashed) == 2 * 6 and every[1:3] == first
    assert contents(made) == every == contents(dataset_of(rows()))
    assert sum(hashed) == 2 * 6 + 2 * 6  # those in memory
    hashed.clear()
    with path.open("r+b") as file:
        content_ = file.read()
        file.seek(content_.rindex(b"rejected 4"))
        file.write(b"REJECTED 4")
    os.utime(path, (1e9, 1e9))
    found = contents(Dataset.from_file(str(path)))
    assert sum(hashed) == 2 * 6 and [row for row in range(6) if found[row] != every[row]] == [4]


def test_a_file_that_was_replaced_under_an_open_dataset_is_not_known_by_its_rows(tmp_path):
    """What is mapped still is the old file: its hashes are not taken for those of the new one."""
    path = tmp_path / "rows.arrow"
    made = on_disk(rows(), path)
    other = changed(rows(), "prompt", "another")
    on_disk(other, tmp_path / "new.arrow")
    (tmp_path / "new.arrow").replace(path)
    os.utime(path, (1e9, 1e9))
    assert contents(made) == contents(dataset_of(rows()))
    assert contents(Dataset.from_file(str(path))) == contents(dataset_of(other))


def test_a_row_that_changes_while_it_is_read_is_an_error(tmp_path):
    """An image that is not the one that was hashed is not encoded in its name; unchanged rows have the bytes of their images."""
    made = dataset_of(with_files(rows(), tmp_path / "images"))
    known = RowContents(made, IMAGES)
    hashes = known.of(np.arange(6))
    (tmp_path / "images" / "rejected-4.png").write_bytes(b"another")
    loaded = known.load([1, 3], hashes.take(pa.array([1, 3])))
    assert [row["chosen"]["bytes"] for row in loaded] == [b"chosen 1", b"chosen 3"]
    with pytest.raises(ValueError, match="The row with id 'row-4' changed while it was precomputed"):
        known.load(range(3, 6), hashes.slice(3))


# ---- Sizes ----


@pytest.mark.parametrize("change", ["same size and time", "another file moved here", None])
def test_sizes_follow_the_images(tmp_path, change):
    """The sizes of a dataset that says that it is the same are read again where an image file was replaced, else not."""
    made = on_disk(with_files(rows(), tmp_path / "images"), tmp_path / "rows.arrow")
    for path in (tmp_path / "images").iterdir():
        os.utime(path, (1e9, 1e9))
    read = []

    def size(row):
        read.append(row["id"])
        return len(Path(row["chosen"]["path"]).read_bytes()), 1 + ("x" in Path(row["chosen"]["path"]).read_text())

    def sizes() -> list:
        read.clear()
        return buckets.training_sizes(Dataset.from_file(str(tmp_path / "rows.arrow")), size, "test", IMAGES).tolist()

    one, states = sizes(), image_states(made, IMAGES)
    assert len(read) == 6
    if change is not None:
        REPLACED[change](tmp_path / "images" / "chosen-3.png")
        (tmp_path / "images" / "chosen-5.png").write_bytes(b"chosen 5")
        (tmp_path / "images" / "chosen-3.png").write_bytes(b"chosen x")
    two = sizes()
    assert [row for row in range(6) if one[row] != two[row]] == ([] if change is None else [3])
    assert (len(read) == 0) == (change is None) == (image_states(made, IMAGES) == states)
