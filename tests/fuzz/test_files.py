# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Files, folders and archives of strangers."""

import io
import json
import logging
import os
import shutil
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data import layouts
from tests.fuzz.strategies import IMAGES, few, json_values, lawful, many, texts
from trl_diffusion.annotation.join import load_annotations
from trl_diffusion.data import sources
from trl_diffusion.data.formats import prepare_dataset
from trl_diffusion.data.sources import load_source
from trl_diffusion.data.tables import read_list


FORMATS = (
    "jsonl",
    "json_list",
    "comma",
    "tab",
    "parquet_images",
    "arrow",
    "tar_plain",
    "jsonl_gz",
    "jsonl_zst",
    "csv_gz",
)
PIECES = (
    b"\0",
    b"\r",
    b"\n",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\\ud800",
    b"\xff",
    b"\xe2\x80\xa8",
    b"[" * 3000,
    b"9" * 5000,
    b"NaN",
    b"1e999",
    b"null",
    b'"' * 99,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The cache of `datasets` is a folder of the tests, and is silent."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    datasets.enable_progress_bars()
    patch.undo()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, bytes]]:
    """A good file of each format: its path and its content."""
    found = {}
    for name in FORMATS:
        path = getattr(layouts, name)(tmp_path_factory.mktemp("data") / "data")
        found[name] = path, path.read_bytes()
    return found


@st.composite
def damages(draw) -> list[tuple[float, int, bytes]]:
    """Places in a file, as shares of its length, how much is taken out there, and what is put in."""
    piece = st.one_of(st.sampled_from(PIECES), st.binary(max_size=6))
    return draw(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 4, 50]), piece), min_size=1, max_size=4))


def damaged_file(files, name: str, damage, streaming: bool) -> None:
    path, content = files[name]
    data = bytearray(content)
    for share, taken, piece in damage:
        place = int(share * len(data))
        data[place : place + taken] = piece
    path.write_bytes(data)

    def read():
        dataset = load_source(str(path), streaming=streaming)["train"]
        return list(
            prepare_dataset(dataset, "train_dataset", ("prompt", "chosen", "rejected"), ("chosen", "rejected"))
        )

    try:
        lawful(read)
    finally:
        path.write_bytes(content)


@few(30)
@given(st.sampled_from(FORMATS), damages(), st.booleans())
@example("arrow", [(0.0, 0, b"\0")], True)
def test_any_damaged_file(files, name, damage, streaming):
    """A file with a few bytes changed is read, or is refused with a reason."""
    damaged_file(files, name, damage, streaming)


@pytest.mark.slow
@many(500)
@given(st.sampled_from(FORMATS), damages(), st.booleans())
def test_many_damaged_files(files, name, damage, streaming):
    """A file with a few bytes changed is read, or is refused with a reason."""
    damaged_file(files, name, damage, streaming)


@few(100)
@given(st.one_of(texts, json_values.map(json.dumps), json_values.map(repr)))
@example("[" * 100_000)
@example("-" * 100_000)
@example("['a' " * 10_000)
@example("[1e999, NaN]")
def test_any_list_as_text(text):
    """A text of a CSV file is a list or none."""
    lawful(lambda: read_list(text))


def png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(IMAGES["png"])


def pair_folder(folder: Path, names=("a", "b")) -> Path:
    for name in names:
        png(folder / "chosen" / f"{name}.png")
        png(folder / "rejected" / f"{name}.png")
    return folder


captions = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.lists(
        st.dictionaries(st.sampled_from(["file_name", "id", "prompt", "caption", "x"]), json_values, max_size=4),
        max_size=3,
    ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.fixed_dictionaries({"a": texts, "b": json_values}).map(lambda rows: json.dumps(rows).encode()),
)


@few(60)
@given(
    captions,
    st.sampled_from(
        ["captions.jsonl", "captions.json", "captions.csv", "prompts.tsv", "metadata.json", "metadata.bin"]
    ),
)
@example(b"[1, 2]", "captions.json")
@example(b"[" * 5000, "captions.json")
@example(b'{"a": "x\xe2\x80\xa8y", "b": "z"}', "captions.json")
@example(b'{"id": "a", "prompt": "x\xe2\x80\xa8y"}\n{"id": "b", "prompt": ""}', "captions.jsonl")
@example(
    b'{"id": "a", "prompt": "", "n": 99999999999999999999999}\n{"id": "b", "prompt": "", "n": {}}', "captions.jsonl"
)
@example(b"file_name,prompt\na," + b"x" * 200_000, "captions.csv")
@example(b"\xff\xfe", "metadata.bin")
def test_any_captions(tmp_path_factory, content, name):
    """Captions of pairs in two folders are read, or the file is named."""
    folder = pair_folder(tmp_path_factory.mktemp("pairs"))
    for each in ("a", "b"):
        (folder / f"{each}.txt").write_text("a caption")
    (folder / name).write_bytes(content)
    lawful(lambda: load_source(str(folder)))


def test_links_back_and_pipes(tmp_path):
    """A link to a folder above is not followed again and again, and neither pipes nor devices are opened."""
    folder = pair_folder(tmp_path / "data")
    (folder / "chosen" / "up").symlink_to(folder)
    (folder / "rejected" / "up").symlink_to("..")
    for name in ("x.txt", "captions.jsonl", "chosen/p.png", "rejected/p.png", "data.jsonl"):
        os.mkfifo(folder / name)
    (folder / "zero.csv").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    for each in ("a", "b"):
        (folder / f"{each}.txt").write_text("a caption")
    rows = lawful(lambda: load_source(str(folder)))["train"]
    assert rows["id"][:2] == ["a", "b"] and all(each.count("up") <= 1 for each in rows["id"])


@pytest.mark.parametrize("name", [b"\xff.png", b"a\nb.png", b"\x1b[2J.png", "a\u202eb.png".encode()])
def test_names_of_files_that_are_no_text(tmp_path, name):
    """A file whose name cannot be shown or stored is named with escapes."""
    folder = pair_folder(tmp_path / "data")
    (folder / "chosen" / os.fsdecode(name)).write_bytes(IMAGES["png"])
    message = lawful(lambda: load_source(str(folder)))
    if b"\n" not in name:
        assert "has characters that are no text: rename it" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("configs", ["", "configs:\n- config_name: default\n  data_files: rows.jsonl\n"])
def test_a_script_is_not_run(tmp_path, configs, streaming):
    """A folder with a loading script, named as `datasets` once ran it: the script stays text."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "rows.jsonl").write_text('{"id": "1", "prompt": "a"}\n')
    (folder / "README.md").write_text(f"---\n{configs or 'license: mit'}\n---\n")
    lawful(lambda: list(load_source(str(folder), streaming=streaming)["train"]))
    lawful(lambda: load_source(str(folder / "rows.py")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "place",
    [
        "/etc/passwd",
        "../secret.jsonl",
        "a/../../secret.jsonl",
        "http://127.0.0.1:9/x.jsonl",
        "hf://datasets/a/b/c.jsonl",
        "~/x.jsonl",
        "file:///etc/passwd",
    ],
)
def test_a_card_names_no_file_outside(tmp_path, place):
    """The head of a README cannot make files of the machine or of servers rows."""
    (tmp_path / "secret.jsonl").write_text('{"secret": 1}\n')
    folder = tmp_path / "rows"
    folder.mkdir()
    for files in (place, [place], [{"split": "train", "path": [place]}]):
        head = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{head}\n---\n")
        assert "which is not in its folder" in lawful(lambda: load_source(str(folder)))


@few(40)
@given(st.one_of(texts, json_values.map(json.dumps), json_values.map(lambda value: json.dumps({"configs": value}))))
@example("a: " + "[" * 3000)
@example("!!python/object/apply:os.system [ls]")
def test_any_head_of_a_card(tmp_path_factory, head):
    """Whatever the head of a README is."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "rows.jsonl").write_text('{"id": "1", "prompt": "a"}\n')
    (folder / "README.md").write_text(f"---\n{head}\n---\n", errors="replace")
    lawful(lambda: load_source(str(folder)))


OUTSIDE = (
    b'{"_data_files": [{"filename": "../secret.arrow"}]}',
    b'{"_data_files": [{"filename": "/etc/passwd"}]}',
    b'{"splits": ["../../etc"]}',
)


@few(25)
@given(
    st.sampled_from(["state.json", "dataset_info.json", "dataset_dict.json"]),
    st.one_of(st.binary(max_size=30), json_values.map(lambda value: json.dumps(value).encode())),
)
@example("state.json", OUTSIDE[0])
@example("state.json", OUTSIDE[1])
@example("dataset_dict.json", OUTSIDE[2])
@example("dataset_info.json", b'{"features": {"a": {"_type": "Pickle"}}}')
def test_any_saved_dataset(tmp_path_factory, name, content):
    """A folder that `save_to_disk` wrote, with one of its files changed, reads nothing outside of it."""
    folder = tmp_path_factory.mktemp("saved")
    Dataset.from_dict({"id": ["1"], "prompt": ["a"]}).save_to_disk(str(folder / "rows"))
    shutil.copy(next((folder / "rows").glob("*.arrow")), folder / "secret.arrow")
    (folder / "rows" / name).write_bytes(content)
    found = lawful(lambda: load_source(str(folder / "rows")))
    if content in OUTSIDE:
        assert "which is not in its folder" in found


def test_archives_write_nothing_outside(tmp_path):
    """Members with `..`, absolute names and links lead nowhere, in zip and in tar files."""
    outside = tmp_path / "outside"
    (tmp_path / "zips").mkdir()
    with zipfile.ZipFile(tmp_path / "zips" / "images.zip", "w") as archive:
        for name in ("../../../outside/a.png", str(outside / "b.png"), "..\\..\\c.png", "d.png"):
            archive.writestr(name, IMAGES["png"])
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        for name in ("../../../outside/a.png", str(outside / "b.png"), "d.png", "d.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(IMAGES["png"])
            archive.addfile(member, io.BytesIO(IMAGES["png"]))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    for name in ("zips", "rows.tar"):
        for streaming in (False, True):
            path = str(tmp_path / name)
            read = partial(load_source, path, streaming=streaming)
            found = lawful(lambda: [list(rows) for rows in read().values()])  # noqa: B023
            assert "root:" not in str(found)
    assert not outside.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["rows.tar", "zips"]


def test_bombs_are_not_unpacked(tmp_path, monkeypatch):
    """What becomes a thousand times larger is given up, and a file with holes is not read into memory."""
    monkeypatch.setattr(sources, "ALWAYS_UNPACKED", 2**20)
    zeros = b"0" * 2**24
    for packing, suffix in (("zstd", "zst"), ("gzip", "gz")):
        with pa.output_stream(str(tmp_path / f"rows.parquet.{suffix}"), compression=packing) as file:
            file.write(zeros)
        assert "times as large" in lawful(lambda: load_source(str(tmp_path / f"rows.parquet.{suffix}")))  # noqa: B023
    (tmp_path / "zips").mkdir()
    with zipfile.ZipFile(tmp_path / "zips" / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", zeros)
    assert "16,777,216 bytes unpacked" in lawful(lambda: load_source(str(tmp_path / "zips")))
    (tmp_path / "zips" / "images.zip").write_bytes(b"PK\x03\x04 no zip")
    assert "images.zip cannot be read" in lawful(lambda: load_source(str(tmp_path / "zips")))
    with tarfile.open(tmp_path / "holes.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"\x80" + (2**37).to_bytes(11, "big")  # its size with its holes
        header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
        archive.fileobj.write(header)
    assert "sparse file" in lawful(lambda: load_source(str(tmp_path / "holes.tar")))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/dev/zero",
            "/dev/null",
            "/proc/self/mem",
            "a" * 5000,
            "a\0b",
            "\ud800",
            "\x1b[2J",
            "~nobody\x00",
            "",
            ".",
            "..",
            "../../x",
        ),
        *(
            "{0..99999999999999999}.tar",
            "{a,b}" * 60 + ".tar",
            "[",
            "*\x1b.tar",
            "http://127.0.0.1:9/a.parquet",
            "file:///etc/passwd",
        ),
        *("/etc/passwd", "/etc/hostname.parquet", "s3://a/b.parquet", "{" * 3000 + ".tar", "~no_such_user/x.csv"),
    ],
)
def test_any_name_of_a_dataset(tmp_path, monkeypatch, name):
    """What names no dataset is said."""
    monkeypatch.chdir(tmp_path)
    assert isinstance(lawful(lambda: load_source(name)), str)


@few(60)
@given(st.one_of(st.binary(max_size=30), json_values.map(lambda value: json.dumps(value).encode())))
@example(b"[" * 5000)
@example(b'{"complete": true, "dataset": {"split": "../../x"}, "counts": {"rows": 1}}')
@example(b'{"complete": true, "dataset": 5, "counts": 5}')
def test_any_manifest(tmp_path_factory, content):
    """A folder of annotations with any manifest."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "manifest.json").write_bytes(content)
    (folder / "annotations-000000.parquet").write_bytes(b"PAR1 no Parquet")
    lawful(lambda: load_annotations(folder), "run")


def test_no_remote_code_and_no_pickle():
    """Nowhere is code of a repository allowed, nor a pickle of numpy, pandas or torch."""
    root = Path(__file__).parents[2]
    pickling = {"ray_executor.py"}  # between its own processes
    for path in [
        *root.glob("trl_diffusion/**/*.py"),
        *root.glob("datasets_builders/**/*.py"),
        *root.glob("examples/**/*.py"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert (
            "trust_remote_code=True" not in text and "allow_pickle=True" not in text and "read_pickle" not in text
        ), path
        assert "weights_only=False" not in text and (text.count("torch.load(") == text.count("weights_only=True")), (
            path
        )
        assert "pickle.load" not in text or path.name in pickling, path
