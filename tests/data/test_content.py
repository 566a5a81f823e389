# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
import xxhash

from trl_diffusion.data import content
from trl_diffusion.data.content import (
    FileIndex,
    SealedFile,
    clear_unfinished,
    damage_of,
    file_hash,
    read_sealed,
    state_of,
    write_sealed,
)


class Counted:
    """Hashes files, and notes which."""

    def __init__(self):
        self.names = []

    def __call__(self, path: str) -> str:
        self.names.append(Path(path).name)
        return file_hash(path)


def old(path: Path, content: bytes) -> Path:
    """A file that was written a while ago, as far as its times tell."""
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))
    return path


@pytest.fixture(autouse=True)
def no_tick(monkeypatch):
    """Files of these tests are trusted at once."""
    monkeypatch.setattr(content, "TICK_NS", 0)


def read(folder: Path, *paths: Path) -> tuple[list[str], list[str]]:
    """What an index says of files, and which of them were read for it."""
    time.sleep(0.02)  # a tick of the file system's clock
    counted = Counted()
    return FileIndex(folder / "index.arrow", counted).of(paths), sorted(counted.names)


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path, monkeypatch):
    """However many blocks it is read in."""
    path = old(tmp_path / "file", bytes(range(256)) * 10)
    expected = xxhash.xxh3_128_hexdigest(bytes(range(256)) * 10)
    assert file_hash(path) == expected
    monkeypatch.setattr(content, "BLOCK_BYTES", 100)
    assert file_hash(path) == expected


def test_a_file_is_read_once(tmp_path):
    """By one index and by the next, as often as it is named, by any path; of many files only those that are new."""
    paths = [old(tmp_path / f"{number}", b"x" * number) for number in range(600)]
    found, names = read(tmp_path, *paths)
    assert found == [xxhash.xxh3_128_hexdigest(b"x" * number) for number in range(600)] and len(names) == 600
    more = old(tmp_path / "more", b"y")
    again, names = read(tmp_path, more, *paths, paths[3], os.path.relpath(paths[5]))
    assert again == [file_hash(more), *found, found[3], found[5]] and names == ["more"]


CHANGES = {
    "content": lambda path: path.write_bytes(b"another"),
    "same size and time": lambda path: (path.write_bytes(b"Content"), os.utime(path, (1e9, 1e9))),
    "one byte in place": lambda path: (path.open("r+b").write(b"C"), os.utime(path, (1e9, 1e9))),
    "another file under its name": lambda path: old(path.with_name("new"), b"Content").replace(path),
    "a link to another": lambda path: (path.unlink(), path.symlink_to(old(path.with_name("new"), b"Content"))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_read_again(tmp_path, change):
    """Also where its size and the time of its change are as before; the others are not."""
    path, other = old(tmp_path / "file", b"content"), old(tmp_path / "other", b"content")
    (one, _), _ = read(tmp_path, path, other)
    CHANGES[change](path)
    found, names = read(tmp_path, path, other)
    assert found == [file_hash(path), one] and found[0] != one and names == ["file"]
    assert read(tmp_path, path)[1] == []


def test_a_file_that_changed_just_now_is_not_trusted(tmp_path, monkeypatch):
    """Within a tick of the clock it may change again and show the same state: the next index reads it again."""
    monkeypatch.setattr(content, "TICK_NS", 3600 * 10**9)
    path = old(tmp_path / "file", b"content")
    assert [read(tmp_path, path)[1] for _ in range(2)] == [["file"], ["file"]]


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path):
    """What is kept belongs to the state that it is kept with."""
    path, calls = old(tmp_path / "file", b"content"), []

    def find(name: str) -> str:
        found = file_hash(name)
        calls.append(found)
        if len(calls) == 1:
            time.sleep(0.02)
            path.write_bytes(b"another")
        return found

    assert FileIndex(tmp_path / "index.arrow", find).of([path]) == [file_hash(path)] and len(calls) == 2


def test_a_missing_file_has_no_hash(tmp_path):
    """Once it is there it has one, and once it is gone none again."""
    path = tmp_path / "file"
    assert read(tmp_path, path) == (["absent"], [])
    old(path, b"content")
    assert read(tmp_path, path) == ([file_hash(path)], ["file"])
    path.unlink()
    assert read(tmp_path, path) == (["absent"], [])
    assert read(tmp_path, path / "in a file") == (["absent"], [])


@pytest.mark.parametrize("place", [0, 30, 300, -1])
def test_a_damaged_index_is_made_again(tmp_path, place):
    """A flipped byte anywhere: the files are read, and nothing wrong is said."""
    path, index = old(tmp_path / "file", b"content"), tmp_path / "index.arrow"
    expected, _ = read(tmp_path, path)
    whole = bytearray(index.read_bytes())
    whole[place] ^= 1
    index.write_bytes(whole)
    assert read(tmp_path, path) == (expected, ["file"])
    assert read(tmp_path, path) == (expected, [])


def test_an_index_that_cannot_be_written_is_no_matter(tmp_path):
    """Files are then read again."""
    path = old(tmp_path / "file", b"content")
    old(tmp_path / "taken", b"")
    index = FileIndex(tmp_path / "taken" / "index.arrow")
    assert index.of([path]) == [file_hash(path)]


def test_what_is_known_without_reading_is_kept_with_its_state(tmp_path):
    """Until the file changes."""
    path, counted = old(tmp_path / "file", b"content"), Counted()
    FileIndex(tmp_path / "index.arrow").keep({path: (state_of(path), "known")})
    assert FileIndex(tmp_path / "index.arrow", counted).of([path]) == ["known"] and not counted.names
    path.write_bytes(b"another")
    assert FileIndex(tmp_path / "index.arrow", counted).of([path]) == [file_hash(path)]


# ---- Files with a checksum ----


def test_every_damage_of_a_sealed_file_is_seen(tmp_path):
    """A flipped bit at each place, each length that it may be cut to, an added byte, another label; no file at all."""
    path = tmp_path / "file.arrow"
    file = SealedFile(path, "label")
    file.write(b"some content of a file")
    file.finish()
    whole = path.read_bytes()
    assert damage_of(path, "label") == "" and whole.startswith(b"some content of a file")
    assert damage_of(path, "other") == "its content is not what was written"
    damaged = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    damaged += [whole[:length] for length in range(len(whole))] + [whole + b"\0", whole + whole, b"ARROW1" * 50]
    for content_ in damaged:
        path.write_bytes(content_)
        assert damage_of(path, "label") != ""
    path.unlink()
    assert damage_of(path, "label") == "it cannot be read (No such file or directory)"


def test_a_table_comes_back_or_nothing(tmp_path):
    """As it was written; nothing of a damaged or missing file."""
    table, path = pa.table({"a": [1, None, 3], "b": ["x", "y", None]}), tmp_path / "folder" / "table.arrow"
    assert read_sealed(path) is None
    write_sealed(path, table)
    assert read_sealed(path).equals(table) and [other.name for other in path.parent.iterdir()] == ["table.arrow"]
    path.write_bytes(path.read_bytes()[:-1])
    assert read_sealed(path) is None


def test_what_dead_writers_left_is_cleared(tmp_path):
    """Not the file of a writer that lives, which then has its name, nor a file of somebody else."""
    left, other = tmp_path / f"file.arrow.{'0' * 32}.tmp", tmp_path / "notes.tmp"
    left.write_bytes(b"half")
    other.write_bytes(b"mine")
    living = SealedFile(tmp_path / "living.arrow")
    living.write(b"content")
    clear_unfinished(tmp_path, "another")
    assert left.exists()
    clear_unfinished(tmp_path)
    assert not left.exists() and other.exists() and living.temporary.exists()
    living.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living.arrow", "notes.tmp"]
    assert damage_of(tmp_path / "living.arrow") == ""
