# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import os
import re
import shutil
import signal
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value

from tests.cli.processes import start, wait_until
from trl_diffusion.data import caching, content
from trl_diffusion.data.caching import (
    TensorCache,
    is_precomputed,
    precompute_dataset,
    read_batch,
    read_example,
    stack_padded,
    write_example,
)
from trl_diffusion.data.content import SEAL_BYTES
from trl_diffusion.data.encoded_files import CONTENT


FEATURES = Features({"id": Value("string"), "names": List(Value("string"))})


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(caching, "ROWS_PER_FILE", 4)


def rows(number: int = 10) -> Dataset:
    return Dataset.from_dict({"id": [f"row-{index}" for index in range(number)], "value": list(range(number))})


class Encoder:
    """Notes the rows that it is given, and fails before a given call."""

    def __init__(self, fail_at: int | None = None, size: int = 6):
        self.batches, self.fail_at, self.size = [], fail_at, size

    def __call__(self, rows: list[dict]) -> list[dict]:
        if len(self.batches) == self.fail_at:
            raise RuntimeError("the power fails")
        self.batches.append([row["value"] for row in rows])
        return [
            {
                "id": row["id"],
                "names": ["a"] * (row["value"] % 3),
                "tensor": torch.full((self.size,), float(row["value"])),
                "boxes": torch.ones(row["value"] % 3, 4),
            }
            for row in rows
        ]

    @property
    def counts(self) -> Counter:
        """How often each row was encoded, without the one by which the size is told."""
        return Counter(value for batch in self.batches[1:] for value in batch)


def precompute(folder, encode, dataset=None, fingerprint="abc", batch_size=2, **kwargs) -> Dataset:
    dataset = rows() if dataset is None else dataset
    return precompute_dataset(dataset, encode, FEATURES, "the rows", fingerprint, folder, batch_size, **kwargs)


def file(folder: Path, number: int) -> Path:
    """The file of some rows of the whole dataset."""
    return next(folder.glob(f"the-rows-abc-{number:05d}-*.arrow"))


def contents(dataset: Dataset) -> list[dict]:
    return list(dataset)


# ---- One row ----


def test_a_row_comes_back_as_it_was():
    """Every type, empty tensors, slices and transposes, and what is no tensor."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    example = {
        "id": "row",
        "names": ["a", "b"],
        "float": base,
        "slice": base.clone()[1],
        "column": base.clone()[:, :, 1],
        "transposed": base.clone().transpose(0, 2),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "no_flags": torch.zeros(0, dtype=torch.bool),
        "number": torch.tensor(7),
        "half": base.bfloat16(),
    }
    row = write_example(example)
    assert is_precomputed(row) and not is_precomputed(example)
    back = read_example(row)
    assert back.keys() == example.keys() and not is_precomputed(back)
    for name, value in example.items():
        if isinstance(value, torch.Tensor):
            assert back[name].dtype == value.dtype and torch.equal(back[name], value)
        else:
            assert back[name] == value


def test_a_slice_is_written_without_the_batch_it_was_cut_from():
    """One row of a large batch takes the space of one row."""
    batch = torch.zeros(1000, 8)
    assert len(write_example({"tensor": batch[3]})[caching.TENSORS]) < 200


# ---- Many rows ----


@pytest.mark.parametrize("number", [1, 3, 4, 5, 8, 10])
def test_rows_come_out_in_order_each_encoded_once(tmp_path, number):
    """Whatever the number of files, the last of which may hold one row; of the first row the size is told before."""
    encode = Encoder()
    dataset = precompute(tmp_path, encode, rows(number))
    assert dataset.column_names == ["id", "names", CONTENT, caching.TENSORS]
    assert dataset["id"][:] == [f"row-{index}" for index in range(number)]
    examples = [read_example(row) for row in dataset]
    assert [example["tensor"][0].item() for example in examples] == list(range(number))
    assert [len(example["boxes"]) for example in examples] == [index % 3 for index in range(number)]
    assert [example["names"] for example in examples] == [["a"] * (index % 3) for index in range(number)]
    assert encode.counts == Counter(range(number)) and encode.batches[0] == [0]
    assert max(map(len, encode.batches)) <= 2
    assert len(list(tmp_path.iterdir())) == -(-number // 4)


def test_a_shuffled_dataset_is_encoded_in_its_order(tmp_path):
    """Rows of a selection, not those of the table under it."""
    dataset = precompute(tmp_path, Encoder(), rows().select([7, 2, 9, 0, 1]))
    assert dataset["id"][:] == ["row-7", "row-2", "row-9", "row-0", "row-1"]


def test_what_is_there_is_not_encoded_again(tmp_path, capsys):
    """The second time nothing is asked, and the result is the same."""
    first = contents(precompute(tmp_path, Encoder()))
    capsys.readouterr()
    encode = Encoder(fail_at=0)
    assert contents(precompute(tmp_path, encode)) == first
    assert capsys.readouterr().out == f"Precomputed before: the rows, 10 rows in {tmp_path}.\n"


def test_another_fingerprint_is_encoded_beside_the_first(tmp_path):
    """Neither takes the other's files."""
    first = contents(precompute(tmp_path, Encoder()))
    encode = Encoder(size=9)
    second = contents(precompute(tmp_path, encode, fingerprint="abd"))
    assert encode.counts == Counter(range(10))
    assert second != first
    assert contents(precompute(tmp_path, Encoder(fail_at=0))) == first


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4, 5])
def test_an_interrupted_run_goes_on_with_the_file_it_was_at(tmp_path, capsys, fail_at):
    """Finished files are not encoded again, and the result is that of an uninterrupted run, byte for byte."""
    whole = contents(precompute(tmp_path / "whole", Encoder()))
    folder = tmp_path / "cut"
    interrupted = Encoder(fail_at)
    with pytest.raises(RuntimeError, match="the power fails"):
        precompute(folder, interrupted)
    finished = (fail_at - 1) // 2  # of files of two batches
    assert len(list(folder.glob("the-rows-abc-*.arrow"))) == finished
    capsys.readouterr()
    again = Encoder()
    assert contents(precompute(folder, again)) == whole
    assert again.counts == Counter(range(4 * finished, 10))
    assert f"{10 - 4 * finished} of 10 rows are missing" in capsys.readouterr().out
    assert contents(precompute(folder, Encoder(fail_at=0))) == whole


def test_a_file_that_is_lost_is_encoded_again_alone(tmp_path):
    """The others stay."""
    whole = contents(precompute(tmp_path, Encoder()))
    file(tmp_path, 1).unlink()
    again = Encoder()
    assert contents(precompute(tmp_path, again)) == whole
    assert again.counts == Counter(range(4, 8))


def test_an_interrupted_run_leaves_no_half_file_behind(tmp_path):
    """What was begun and not finished does not stay on the disk after an exception."""
    with pytest.raises(RuntimeError):
        precompute(tmp_path, Encoder(4))
    assert list(tmp_path.iterdir()) == [file(tmp_path, 0)]


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from datasets import Dataset, Features, Value
from trl_diffusion.data import caching, content

caching.ROWS_PER_FILE = 4
calls = 0

def encode(rows):
    global calls
    calls += 1
    if calls == 5:  # in the second file
        print("here", flush=True)
        time.sleep(60)
    return [{"id": row["id"], "tensor": torch.full((1000,), float(row["value"]))} for row in rows]

dataset = Dataset.from_dict({"id": [f"row-{index}" for index in range(10)], "value": list(range(10))})
caching.precompute_dataset(dataset, encode, Features({"id": Value("string")}), "the rows", "abc", Path(sys.argv[1]), 2)
"""


def test_a_killed_run_goes_on(tmp_path):
    """After SIGKILL in the second file: the first is kept, the half-written one is not taken for whole."""
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    out.touch()
    process = start(["-c", SCRIPT, tmp_path], out, err)
    wait_until(lambda: "here\n" in out.read_text() or process.exitcode is not None, 60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, err.read_text()
    assert list(tmp_path.glob("*.arrow")) == [file(tmp_path, 0)]
    seen = []

    def encode(rows):
        seen.extend(row["value"] for row in rows)
        return [{"id": row["id"], "tensor": torch.full((1000,), float(row["value"]))} for row in rows]

    dataset = precompute_dataset(rows(), encode, Features({"id": Value("string")}), "the rows", "abc", tmp_path, 2)
    assert sorted(seen[1:]) == [4, 5, 6, 7, 8, 9]
    assert [read_example(row)["tensor"].unique().tolist() for row in dataset] == [[float(i)] for i in range(10)]


def test_a_half_written_temporary_file_is_no_matter(tmp_path):
    """What a killed run left beside the files is not read."""
    (tmp_path / "tmpabcdef").write_bytes(b"half")
    assert len(precompute(tmp_path, Encoder())) == 10


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_processes_share_the_files(tmp_path, num_processes):
    """Each file is encoded by one of them, and all get all rows."""
    barrier, results, encoders = threading.Barrier(num_processes), {}, [Encoder() for _ in range(num_processes)]

    def wait():
        barrier.wait(30)

    def work(index):
        settings = {"process_index": index, "num_processes": num_processes, "wait": wait}
        results[index] = precompute(tmp_path, encoders[index], rows(14), **settings)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum((encoder.counts for encoder in encoders), Counter()) == Counter(range(14))
    assert all(encoder.counts for encoder in encoders[:4])
    expected = contents(precompute(tmp_path / "alone", Encoder(), rows(14)))
    assert all(contents(results[index]) == expected for index in range(num_processes))


def test_a_process_that_is_late_does_not_encode_what_another_has_done(tmp_path):
    """All look for missing files before any writes one: they agree on what to say, and none waits forever."""
    said = [[], []]
    barrier = threading.Barrier(2)

    def work(index):
        if index == 1:
            time.sleep(0.3)
        settings = {"process_index": index, "num_processes": 2, "wait": lambda: barrier.wait(30)}
        precompute(tmp_path, Encoder(), say=said[index].append, **settings)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said[0] == said[1] and len(said[0]) == 1 and "10 of 10 rows are missing" in said[0][0]


# ---- The disk ----


Usage = namedtuple("Usage", "total used free")


def test_the_size_that_is_expected_is_the_size_that_is_written(tmp_path, monkeypatch):
    """A disk with 5 % less than what is written is too full, one with 5 % more is not."""
    monkeypatch.setattr(caching, "ROWS_PER_FILE", 100)
    precompute(tmp_path, Encoder(size=1000), rows(250), batch_size=50)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written > 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, int(0.95 * written)))
    with pytest.raises(ValueError, match="needs 0.00 GB, and the disk of .* has 0.00 GB left.*`precompute_dir`"):
        precompute(tmp_path, Encoder(size=1000), rows(250), fingerprint="other")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, int(1.05 * written)))
    precompute(tmp_path, Encoder(size=1000), rows(250), fingerprint="other", batch_size=50)


def test_only_what_is_missing_needs_room(tmp_path, monkeypatch):
    """A run that goes on where another stopped needs the room of the rest alone, and a finished one none."""
    monkeypatch.setattr(caching, "ROWS_PER_FILE", 100)
    precompute(tmp_path, Encoder(size=1000), rows(250), batch_size=50)
    last = file(tmp_path, 2)
    written = last.stat().st_size
    last.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, int(0.9 * written)))
    with pytest.raises(ValueError, match="`precompute_dir`"):
        precompute(tmp_path, Encoder(size=1000), rows(250), batch_size=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, int(1.1 * written)))
    precompute(tmp_path, Encoder(size=1000), rows(250), batch_size=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 0))
    precompute(tmp_path, Encoder(fail_at=0), rows(250))


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    """After one row, and without a file."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 10))
    encode = Encoder()
    with pytest.raises(ValueError, match="the disk of"):
        precompute(tmp_path, encode)
    assert encode.batches == [[0]] and not list(tmp_path.iterdir())


# ---- Looking up ----


def test_a_cache_gives_the_tensors_of_its_keys(tmp_path):
    """In any order, and as often as they are asked for."""
    cache = TensorCache(precompute(tmp_path, encoded), "id")
    asked = cache[["row-9", "row-0", "row-9", "row-4"]]
    assert asked.keys() == {"x"} and asked["x"].tolist() == [[9.0, 18.0], [0.0, 0.0], [9.0, 18.0], [4.0, 8.0]]
    with pytest.raises(KeyError):
        cache[["row-0", "row-10"]]


def encoded(rows: list[dict]) -> list[dict]:
    return [
        {"id": row["id"], "names": [], "x": torch.tensor([row["value"], 2 * row["value"]]).float()} for row in rows
    ]


def test_a_look_up_stacks_what_was_written(tmp_path):
    """Every type and shape, scalars and empty tensors, and lengths that differ: as if each row were read and stacked."""
    rows = [
        {
            "key": str(row),
            "half": torch.randn(2 + row, 3).half(),
            "brain": torch.randn(2, 3).bfloat16(),
            "count": torch.tensor(row),
            "flags": torch.tensor([True] * row, dtype=torch.bool),
            "none": torch.zeros(0, 4),
            "bytes": torch.full((2, 1), 200 + row, dtype=torch.uint8),
            "double": torch.randn(1, dtype=torch.float64),
            "int": torch.tensor([row], dtype=torch.int32),
        }
        for row in range(5)
    ]
    dataset = precompute_dataset(
        Dataset.from_dict({"key": [row["key"] for row in rows]}),
        lambda batch: [rows[int(row["key"])] for row in batch],
        Features({"key": Value("string")}),
        *("rows", "fingerprint", tmp_path, 2),
    )
    cache, keys = TensorCache(dataset, "key"), ["3", "0", "3", "4"]
    found = cache[keys]
    assert found.keys() == rows[0].keys() - {"key"}
    for name, values in found.items():
        assert torch.equal(values, stack_padded([rows[int(key)][name] for key in keys])), name
        assert values.dtype == rows[0][name].dtype
    with pytest.raises(KeyError):
        cache[["5"]]
    batch = read_batch([dataset[int(key)] for key in keys])
    assert batch.pop("key") == keys and batch.keys() == found.keys()
    assert all(torch.equal(batch[name], found[name]) for name in batch)


# ---- Damaged files ----


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "a byte of a tensor": lambda whole: flipped(whole, whole.rindex(b"\0\0\xa0\x40")),
    "a byte of a key": lambda whole: flipped(whole, whole.index(b"row-5") + 4),
    "a byte of what a row is made of": lambda whole: flipped(whole, re.search(rb"[0-9a-f]{128}", whole).start()),
    "the schema": lambda whole: flipped(whole, 30),
    "the checksum": lambda whole: flipped(whole, -1),
    "cut off by a byte": lambda whole: whole[:-1],
    "cut off in the middle": lambda whole: whole[: len(whole) // 2],
    "without its checksum": lambda whole: whole[:-SEAL_BYTES],
    "empty": lambda whole: b"",
    "no Arrow file": lambda whole: b"something else" * 100,
    "longer": lambda whole: whole + b"\0" * 8,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_made_anew(tmp_path, capsys, damage):
    """Of the same size and with its time set back where possible: what it held is encoded again, nothing else, and the result is the same."""
    whole = contents(precompute(tmp_path, Encoder()))
    damaged, before = file(tmp_path, 1), file(tmp_path, 1).stat()
    damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    again = Encoder()
    assert contents(precompute(tmp_path, again)) == whole
    assert again.counts == Counter(range(4, 8))
    said = capsys.readouterr().out
    assert f"{damaged} is damaged: " in said and "4 of 10 rows are missing" in said
    assert contents(precompute(tmp_path, Encoder(fail_at=0))) == whole
    assert " is damaged" not in capsys.readouterr().out


def rewritten(path: Path, change) -> None:
    """An Arrow file with other rows, whole as far as Arrow can tell."""
    with pa.memory_map(str(path)) as source:
        table = change(pa.ipc.open_stream(source).read_all())
    with pa.OSFile(str(path.with_suffix(".new")), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    "change",
    [lambda table: table.slice(1), lambda table: pa.concat_tables([table, table]), lambda table: table.slice(0, 0)],
)
def test_a_file_with_other_rows_than_were_written_is_made_anew(tmp_path, capsys, change):
    """Rows that are missing, or there twice, or all of them."""
    whole = contents(precompute(tmp_path, Encoder()))
    rewritten(file(tmp_path, 1), change)
    again = Encoder()
    assert contents(precompute(tmp_path, again)) == whole
    assert again.counts == Counter(range(4, 8)) and "is damaged" in capsys.readouterr().out


def test_a_file_of_another_content_under_a_name_of_this_one_is_made_anew(tmp_path, capsys):
    """Whole, but of other settings; under a name of the same settings its rows are told by what they are made of."""
    whole = contents(precompute(tmp_path, Encoder()))
    precompute(tmp_path, Encoder(size=6), fingerprint="abd")
    shutil.copy(next(tmp_path.glob("the-rows-abd-00001-*")), file(tmp_path, 1))
    again = Encoder()
    assert contents(precompute(tmp_path, again)) == whole
    assert again.counts == Counter(range(4, 8)) and "is damaged" in capsys.readouterr().out
    shutil.copy(file(tmp_path, 0), file(tmp_path, 1))
    again = Encoder()
    assert contents(precompute(tmp_path, again)) == whole
    assert again.counts == Counter(range(4, 8)) and "is damaged" not in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_named_and_made_anew(tmp_path, capsys, monkeypatch):
    """As without permission."""
    whole = contents(precompute(tmp_path, Encoder()))
    path = file(tmp_path, 1)
    os.utime(path, (1e9, 1e9))
    real = open

    def refusing(name, *args, **kwargs):
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(content, "open", refusing, raising=False)
    again = Encoder()
    assert contents(precompute(tmp_path, again)) == whole
    assert again.counts == Counter(range(4, 8))
    assert f"{path} is damaged: it cannot be read (Permission denied)" in capsys.readouterr().out


@pytest.mark.parametrize("read", ["batch", "example", "look up"])
def test_a_row_that_is_damaged_while_it_is_used_is_an_error_that_names_its_file(tmp_path, read):
    """A flipped byte under a training is not trained on, and the next start makes the file anew."""
    dataset = precompute(tmp_path, encoded)
    whole, damaged = contents(dataset), file(tmp_path, 1)
    with damaged.open("r+b") as opened:
        opened.seek(damaged.read_bytes().rindex(b"\0\0\xa0\x40"))  # 5.0
        opened.write(b"\1")
    readers = {
        "batch": lambda row: read_batch([dataset[0], dataset[row]]),
        "example": lambda row: read_example(dataset[row]),
        "look up": lambda row: TensorCache(dataset, "id")[["row-0", f"row-{row}"]],
    }
    readers[read](6)
    with pytest.raises(ValueError, match=f"The file {damaged.name} of precomputed rows was damaged"):
        readers[read](5)
    seen = []
    assert contents(precompute(tmp_path, lambda rows: seen.extend(rows) or encoded(rows))) == whole
    assert [row["value"] for row in seen[1:]] == [4, 5, 6, 7]


def test_rows_that_changed_are_encoded_beside_the_others(tmp_path, capsys):
    """One value of one row is one row, although the dataset says that it is the same; the earlier rows stay."""
    first, changed = rows(), rows().to_dict()
    whole = contents(precompute(tmp_path, Encoder(), first))
    changed["value"][6] = 77
    changed = Dataset.from_dict(changed)
    changed._fingerprint = first._fingerprint
    again = Encoder()
    found = precompute(tmp_path, again, changed)
    assert [read_example(row)["tensor"][0].item() for row in found] == [0, 1, 2, 3, 4, 5, 77, 7, 8, 9]
    assert again.counts == Counter([77]) and "1 of 10 rows are missing" in capsys.readouterr().out
    for order in (range(10), [9, 3, 6]):
        expected = [whole[row] for row in order]
        assert contents(precompute(tmp_path, Encoder(fail_at=0), first.select(order))) == expected


def test_runs_on_two_datasets_at_the_same_time_take_no_file_from_each_other(tmp_path):
    """Of one content and one name: each has its rows, and nothing of the other is removed."""
    datasets_ = [rows(10), rows(20).select(range(10, 20))]
    barrier, found = threading.Barrier(2), {}

    def encode(batch):
        barrier.wait(30)
        return Encoder()(batch)

    def work(index):
        found[index] = precompute(tmp_path, encode, datasets_[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, dataset in enumerate(datasets_):
        assert found[index]["id"][:] == dataset["id"][:]
        precompute(tmp_path, Encoder(fail_at=0), dataset)


@pytest.mark.parametrize(
    ("number", "reason"), [(28, "No space left on device"), (30, "Read-only file system"), (13, "Permission denied")]
)
def test_what_cannot_be_written_is_one_line_and_what_was_written_stays(tmp_path, monkeypatch, number, reason):
    """In the middle of a file; the next run goes on."""
    whole, write = contents(precompute(tmp_path / "whole", Encoder())), content.SealedFile.write
    calls = []

    def failing(self, part):
        calls.append(len(part))
        if len(list((tmp_path / "cut").glob("*.arrow"))) == 1:
            raise OSError(number, reason)
        return write(self, part)

    monkeypatch.setattr(content.SealedFile, "write", failing)
    with pytest.raises(
        ValueError, match=f"cannot be written: {reason}. What was precomputed before is safe.*`precompute_dir`"
    ):
        precompute(tmp_path / "cut", Encoder())
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".arrow"]
    monkeypatch.setattr(content.SealedFile, "write", write)
    again = Encoder()
    assert contents(precompute(tmp_path / "cut", again)) == whole and again.counts == Counter(range(4, 10))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    """Where a file has its name."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/cache cannot be written: Not a directory"):
        precompute(tmp_path / "file" / "cache", Encoder())
