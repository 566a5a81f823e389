# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What does not happen for each row. Counted, at two numbers of rows."""

import hashlib
import io
import random
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.formatting.formatting import PythonArrowExtractor
from PIL import Image

from tests import tiny
from tests.benchmark import million_rows
from trl_diffusion.annotation.join import join_annotations
from trl_diffusion.data import buckets, caching
from trl_diffusion.data.caching import precompute_dataset, read_example
from trl_diffusion.data.columns import numbered, with_column, with_nested_columns
from trl_diffusion.data.formats import prepare_dataset
from trl_diffusion.data.hashing import hash_of
from trl_diffusion.data.key_index import KeyIndex
from trl_diffusion.data.pipelining import ahead, behind


@pytest.fixture(autouse=True)
def no_bars(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def num_calls(function) -> int:
    """How many Python functions are called."""
    calls = 0

    def note(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


CHECKS = ["checks of pairs", "checks of pairs, shuffled", "checks of pairs without ids"]
CHECKS += ["checks of pairs without ids, shuffled", "checks of paintings", "checks of attributes"]
CHECKS += ["hash of all rows for the run record", "sampler of buckets"]


@pytest.mark.parametrize("arm", CHECKS)
def test_no_function_is_called_for_each_row(tmp_path, arm):
    """As many calls for 4,000 rows as for 2,000, in chunks of as many: none becomes a Python object."""
    found = []
    million_rows.ARMS[arm](100, tmp_path)()  # imports
    for rows in (2000, 4000):
        measured = million_rows.ARMS[arm](rows, tmp_path)
        found.append(num_calls(measured))
    chunks = 2  # more of the table, each of which is asked a few things
    assert found[1] - found[0] < 300 * chunks, found


def test_a_join_makes_no_row(tmp_path, monkeypatch):
    """Columns of ids alone become Python objects, as often for 4,000 rows as for 2,000."""
    calls, extract = [], PythonArrowExtractor.extract_batch
    monkeypatch.setattr(PythonArrowExtractor, "extract_row", lambda *args: pytest.fail("a row was made"))
    monkeypatch.setattr(PythonArrowExtractor, "extract_batch", lambda *args: calls.append(args) or extract(*args))
    found = []
    for rows in (2000, 4000):
        calls.clear()
        assert len(million_rows.ARMS["join without images"](rows, tmp_path)()) == rows
        found.append(len(calls))
    assert found[0] == found[1] and {table.column_names[0] for _, table in calls} <= {"id", "status"}


# ----- columns -----


def images_of(dataset: Dataset) -> list[int]:
    """Where the bytes of the images lie in memory."""
    return [chunk.field("bytes").buffers()[2].address for chunk in dataset.data.column("chosen").chunks]


def test_numbering_a_selection_copies_no_image():
    """Rows are numbered in their order, whatever rows of a table they are, and the images stay where they are."""
    dataset = tiny.pairs(8).remove_columns("id")
    for rows in ([5, 2, 7], list(range(8))[::-1], range(8)):
        made = numbered(dataset.select(rows))
        assert made["id"][:] == [str(number) for number in range(len(rows))]
        assert made.remove_columns("id")["prompt"][:] == dataset.select(rows)["prompt"][:]
        assert images_of(made) == images_of(dataset)
    twice = numbered(dataset.select([3, 3, 1]))
    assert twice["id"][:] == ["0", "1", "2"] and twice["prompt"][:] == dataset.select([3, 3, 1])["prompt"][:]
    several = numbered(concatenate_datasets([dataset.select([3, 1]), dataset.select([3, 0])]))
    assert several["id"][:] == ["0", "1", "2", "3"]


def test_numbering_keeps_transform_and_fingerprint():
    """A transform of the user still makes the rows, and the same rows have the same fingerprint."""
    dataset = tiny.pairs(4).remove_columns("id")
    transformed = numbered(dataset.with_transform(lambda batch: {**batch, "prompt": ["x"] * len(batch["prompt"])}))
    assert transformed[2]["prompt"] == "x" and transformed[2]["id"] == "2"
    assert numbered(dataset)._fingerprint == numbered(dataset)._fingerprint
    assert numbered(dataset)._fingerprint != numbered(dataset.select([1, 0, 2, 3]))._fingerprint


def test_columns_of_a_selection_are_replaced_without_a_copy():
    """A function of a column, and a field of an object, in the order of the rows."""
    dataset = tiny.pairs(6).select([4, 1, 4])
    made = with_column(dataset, "prompt", lambda texts: [text.upper() for text in texts])
    assert made["prompt"][:] == [text.upper() for text in dataset["prompt"][:]] and images_of(made) == images_of(
        dataset
    )
    dataset = tiny.pairs(6).add_column("json", [{"a": number} for number in range(6)]).select([4, 1, 4])
    made = with_nested_columns(dataset, ["json.a"])
    assert made["json.a"][:] == [4, 1, 4] and images_of(made) == images_of(dataset)


def test_unknown_attributes_are_not_compared_with_every_name(monkeypatch):
    """A column of a thousand wrong texts is refused with the first, and only for that the nearest name is looked for."""
    from trl_diffusion import Criteria, attribute_features, criteria
    from trl_diffusion.data.formats import check_attribute_columns

    looked, nearest = [], criteria.get_close_matches
    monkeypatch.setattr(criteria, "get_close_matches", lambda *args, **kw: looked.append(args) or nearest(*args, **kw))
    table = {"id": [str(n) for n in range(1000)], "positive_attributes": [[f"wrong {n}"] for n in range(1000)]}
    features = {name: attribute_features()[name] for name in (*table, "negative_attributes")}
    dataset = Dataset.from_dict(table | {"negative_attributes": [[]] * 1000}, features=Features(features))
    with pytest.raises(ValueError, match="'wrong 0' is no attribute.*first of 1000 such rows"):
        check_attribute_columns(dataset, "train_dataset", Criteria.load("painting"), True)
    assert len(looked) == 1


# ----- hashes and keys -----


def hashed(values, kind=None, *, chunks=1) -> str:
    size = -(-len(values) // chunks)
    parts = [pa.array(values[start : start + size], kind) for start in range(0, len(values), size)]
    return hash_of(pa.chunked_array(parts))


def test_a_hash_is_of_values_alone():
    """Chunks, offsets and widths of types do not count."""
    boxes = [1.0, None, 3.5]
    kind = pa.struct({"a": pa.string(), "b": pa.list_(pa.float32())})
    rows = [{"a": "x", "b": boxes}, {"a": None, "b": []}, None, {"a": "é", "b": None}]
    assert hashed(rows, kind) == hashed(rows, kind, chunks=3)
    sliced = pa.chunked_array([pa.array([rows[1], *rows, rows[0]], kind)]).slice(1, 4)
    assert hash_of(sliced) == hashed(rows, kind)
    texts = ["a", "bc", None, ""]
    assert hashed(texts) == hashed(texts, pa.large_string()) == hashed(texts, pa.string_view())
    assert hashed([1, 2, None]) == hashed([1, 2, None], pa.int8()) == hashed([1, 2, None], pa.uint16())
    four = [[1.0, 2.0]] * 3
    assert hashed(four, pa.list_(pa.float32())) == hashed(four, pa.list_(pa.float64(), 2))


def test_a_hash_tells_values_apart():
    """Neither nulls and empty values, nor where one ends and the next begins, nor order, nor type are confused."""
    columns = [["ab", "c"], ["a", "bc"], ["c", "ab"], [None, "abc"], ["", "abc"], ["abc", None], ["abc"]]
    columns += [[1, 2], [2, 1], [1.0, 2.0], [None, 2], [0, 2], [[1], [2]], [[1, 2], []], [[], [1, 2]], [[1, 2], None]]
    columns += [[{"a": 1}], [{"b": 1}], [{"a": None}], [None], [b"ab", b"c"], [True, False], [False, True], [-1, 2]]
    assert len({hashed(column) for column in columns}) == len(columns)


def test_an_index_finds_what_a_dict_finds():
    """Texts of all kinds and null, in several chunks; what is missing is not found."""
    generator = random.Random(0)
    letters = "aäz0 \U0001f600中"
    keys = list({"".join(generator.choices(letters, k=generator.randrange(6))) for _ in range(1000)})
    for kept in (keys, [*keys[:300], None, *keys[300:]], ["one"], [None], []):
        size = max(1, len(kept) // 3)
        parts = [pa.array(kept[start : start + size], pa.string()) for start in range(0, len(kept), size)]
        index = KeyIndex(pa.chunked_array(parts, pa.string()))
        places = {key: place for place, key in enumerate(kept)}
        for key in [*keys, None, "one", "", "absent", "zzzzzzz", "\U0010ffff"]:
            assert (key in index) == (key in places)
            if key in places:
                assert index[key] == places[key]
            else:
                with pytest.raises(KeyError):
                    index[key]


# ----- reading ahead, writing behind -----


def test_what_is_read_ahead_is_bounded_and_in_order():
    """No more than so many items beyond the one that is asked for are taken, and none after the reader stops."""
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = ahead(lambda number: number**2, items(), 5)
    for number in range(20):
        assert next(results) == number**2 and len(taken) == number + 6
    results.close()
    assert len(taken) == 25
    assert list(ahead(lambda number: -number, range(7), 20)) == [0, -1, -2, -3, -4, -5, -6]


def test_what_reading_raises_is_raised_at_its_turn():
    """Results before it come first."""

    def fail(number):
        if number == 3:
            raise RuntimeError("row 3")
        return number

    found = []
    with pytest.raises(RuntimeError, match="row 3"):
        for number in ahead(fail, range(10), 8):
            found.append(number)
    assert found == [0, 1, 2]


def test_nothing_is_written_after_a_write_that_failed():
    """The error comes out, and later calls are not made."""
    done = []

    def write(number):
        if number == 1:
            raise OSError("disk full")
        done.append(number)

    with pytest.raises(OSError, match="disk full"), behind(3) as call:
        for number in range(4):
            call(write, number)
    assert done == [0]
    with pytest.raises(RuntimeError, match="encoder"), behind(3) as call:
        call(write, 5)
        raise RuntimeError("encoder")
    assert done == [0, 5]


FEATURES = Features({"id": Value("string")})


def test_rows_are_read_while_others_are_encoded(tmp_path):
    """While a batch is encoded the next rows are prepared, else this test would wait in vain."""
    prepared, dataset = threading.Event(), Dataset.from_dict({"id": [str(number) for number in range(8)]})

    def prepare(row):
        if row["id"] == "2":
            prepared.set()
        return row

    def encode(rows):
        if rows[0]["id"] == "0" and len(rows) > 1:
            assert prepared.wait(30)
        return rows

    precompute_dataset(dataset, encode, FEATURES, "rows", "0", tmp_path, 2, prepare=prepare)


def test_rows_are_written_while_others_are_encoded(tmp_path, monkeypatch):
    """The first batch is not written before the second is being encoded, else this test would wait in vain."""
    encoded, write = threading.Event(), caching.write_example
    dataset = Dataset.from_dict({"id": [str(number) for number in range(8)]})

    def wait_and_write(example):
        if example["id"] == "1":
            assert encoded.wait(30)
        return write(example)

    def encode(rows):
        if rows[0]["id"] == "2":
            encoded.set()
        return [row | {"x": torch.ones(2)} for row in rows]

    monkeypatch.setattr(caching, "write_example", wait_and_write)
    made = precompute_dataset(dataset, encode, FEATURES, "rows", "0", tmp_path, 2)
    assert [read_example(row)["x"].tolist() for row in made] == [[1.0, 1.0]] * 8


@pytest.mark.parametrize("rows", [2000, 4000])
def test_files_that_are_there_are_mapped_and_no_row_of_them_is_read(tmp_path, monkeypatch, rows):
    """At a second start neither a row is read nor one encoded, and a file costs a few calls."""
    dataset = Dataset.from_dict({"id": [str(number) for number in range(rows)]})
    first = precompute_dataset(dataset, lambda rows: rows, FEATURES, "rows", "0", tmp_path, 500)
    read = []
    monkeypatch.setattr(Dataset, "__getitem__", lambda *args: read.append(args))
    second = precompute_dataset(dataset, None, FEATURES, "rows", "0", tmp_path, 500)
    assert len(second) == rows and second._fingerprint == first._fingerprint == "0" and not read


# ----- sizes for buckets -----


def jpeg(width: int, height: int, turn: int = 1) -> bytes:
    """A JPEG of more than what is read of its header."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = turn
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=95, exif=exif)
    assert len(buffer.getvalue()) > 2 * buckets.HEADER_BYTES
    return buffer.getvalue()


def test_sizes_are_read_from_headers(tmp_path):
    """Of a JPEG the first bytes are read, whichever way it is turned; of a PNG, which may be turned at its end, all."""
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)).save(png, "PNG")
    path = tmp_path / "stored.jpg"
    path.write_bytes(jpeg(300, 400))
    stored = [jpeg(400, 300), jpeg(400, 300, turn=6), png.getvalue(), None]
    rows = [{"bytes": content, "path": None if content else str(path)} for content in stored]
    dataset = Dataset.from_dict({"id": list("abcd"), "image": rows})
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    seen = []

    def size(row):
        from trl_diffusion.data.images import image_size

        seen.append(len(row["image"]["bytes"] or b""))
        return image_size(row["image"])

    found = buckets.training_sizes(dataset.select([3, 1, 0, 2]), size, "test").tolist()
    assert found == [[400, 300], [400, 300], [300, 400], [300, 200]]
    assert sorted(seen) == [0, buckets.HEADER_BYTES, buckets.HEADER_BYTES, len(png.getvalue())]


# ----- joining -----


def test_a_join_copies_no_image(tmp_path):
    """Neither into the cache nor in memory, where rows are selected and some are turned; the rows are the same."""
    source = tiny.pairs(6).remove_columns("instances").select([4, 0, 3, 5])
    uids = [
        [hashlib.sha256(row[name]["bytes"]).hexdigest()[:32] for name in ("chosen", "rejected")]
        for row in source.cast_column("chosen", datasets.Image(decode=False)).cast_column(
            "rejected", datasets.Image(decode=False)
        )
    ]
    uids[1].reverse(), uids[3].reverse()
    table = {"id": source["id"][:], "instances": tiny.pairs(6)["instances"][:4], "status": ["ok"] * 4}
    table |= {"chosen_uid": [pair[0] for pair in uids], "rejected_uid": [pair[1] for pair in uids]}
    annotations = Dataset.from_dict(table).select([2, 0, 1, 3])
    with pytest.raises(ValueError, match="integers|no names"):
        join_annotations(source, annotations)
    annotations = annotations.map(named)
    joined = join_annotations(source, annotations)
    assert joined["id"][:] == ["row-4", "row-0", "row-3", "row-5"]
    pairs = [("chosen", "rejected"), ("rejected", "chosen")] * 2
    for row, expected, names in zip(joined, source, pairs, strict=True):
        assert np.array_equal(np.asarray(row["chosen"]), np.asarray(expected[names[0]]))
        assert np.array_equal(np.asarray(row["rejected"]), np.asarray(expected[names[1]]))
    assert set(images_of(joined)) <= {
        chunk.field("bytes").buffers()[2].address
        for name in ("chosen", "rejected")
        for chunk in source.data.column(name).chunks
    }
    checked = prepare_dataset(joined, "train_dataset", ("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    assert len(checked) == 4 and not list(Path(tmp_path).rglob("*.arrow"))


def named(row: dict) -> dict:
    names = ("chosen", "rejected", "tie")
    return {"instances": [instance | {"preference": names[instance["preference"]]} for instance in row["instances"]]}
