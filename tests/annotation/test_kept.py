# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What an annotation run keeps is of the rows and images that are there now: their content decides, not ids, names and times."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image

from tests.annotation.test_run import Asked, contents, make_task, world
from trl_diffusion import join_annotations, load_annotations
from trl_diffusion.annotation.records import pair_columns, prepare_rows
from trl_diffusion.annotation.run import Run, run, run_locally
from trl_diffusion.checksums import DamagedFile, read_table, write_table


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[dict]:
    """Ten pairs whose images are files."""
    folder, rows = tmp_path_factory.mktemp("images"), []
    for number, row in enumerate(world(10)):
        paths = {name: str(folder / f"{number}-{name}.png") for name in ("chosen", "rejected")}
        for name, path in paths.items():
            row[name].save(path)
        rows.append({"id": row["id"], "prompt": row["prompt"], **paths})
    return rows


@pytest.fixture
def rows(pairs, tmp_path) -> list[dict]:
    """The pairs, with files of their own."""
    shutil.copytree(Path(pairs[0]["chosen"]).parent, tmp_path / "images")
    own = {name: lambda path: str(tmp_path / "images" / Path(path).name) for name in ("chosen", "rejected")}
    return [row | {name: move(row[name]) for name, move in own.items()} for row in pairs]


def annotate(rows: list[dict], folder: Path, vlm=None, streaming: bool = False, read_again: bool = True) -> Run:
    dataset = Dataset.from_list(rows).cast_column("chosen", Image()).cast_column("rejected", Image())
    dataset, columns = prepare_rows(dataset.to_iterable_dataset() if streaming else dataset, pair_columns)
    return run(dataset, make_task(columns, vlm), folder, run_locally, disable_tqdm=True, read_again=read_again)


def replace_image(rows: list[dict], place: int) -> None:
    """Puts another image in the place of one, with the same time."""
    path = Path(rows[place]["rejected"])
    times = path.stat()
    world(1, seed=5)[0]["rejected"].save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_prompt(rows: list[dict], place: int) -> None:
    rows[place]["prompt"] = "a red circle and a blue square"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", [replace_image, change_prompt])
def test_a_row_that_changed_is_annotated_again(rows, tmp_path, caplog, change, streaming):
    """After another image has come under a path, or another prompt under an id, its shard alone is annotated again."""
    annotate(rows, tmp_path / "kept", streaming=streaming)
    vlm = Asked()
    annotate(rows, tmp_path / "kept", vlm, streaming)
    assert not vlm.prompts
    change(rows, 5)
    annotate(rows, tmp_path / "kept", vlm, streaming)
    assert f"changed since they were annotated, in 1 rows, such as {rows[5]['id']}" in caplog.text
    assert vlm.prompts.total() == 4
    annotate(rows, tmp_path / "fresh", streaming=streaming)
    assert contents(tmp_path / "kept") == contents(tmp_path / "fresh")


def flip(path: Path) -> None:
    content = path.read_bytes()
    place = len(content) // 3  # of the rows
    path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])


def edit(path: Path) -> None:
    table = pq.read_table(path)
    answers = table["planner_answer"].to_pylist()
    other = table.set_column(
        table.column_names.index("planner_answer"), "planner_answer", [[*answers[1:], answers[0]]]
    )
    pq.write_table(other.cast(table.schema), path)


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit": flip,
    "rows lost": lambda path: pq.write_table(pq.read_table(path).slice(0, 3), path),
    "other values": edit,
    "another shard": lambda path: shutil.copy(path.with_name("annotations-000002.parquet"), path),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_is_damaged_is_made_again(pairs, tmp_path, caplog, damage):
    """A shard that is not as it was written is refused by name where it is read, and annotated again by the same command."""
    for streaming in (False, True):
        folder = tmp_path / f"streaming-{streaming}"
        finished = annotate(pairs, folder, streaming=streaming, read_again=False)
        before, vlm = contents(folder), Asked()
        DAMAGES[damage](finished.path(1))
        with pytest.raises(ValueError, match="Repeat the command that wrote it"):
            load_annotations(folder)
        annotate(pairs, folder, vlm, streaming, read_again=False)
        assert vlm.prompts.total() == 4 and contents(folder) == before
        assert damage == "removed" or "annotations-000001.parquet" in caplog.text
        assert load_annotations(folder)["id"] == [row["id"] for row in pairs]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]"])
@pytest.mark.parametrize("name", ["manifest.json", ".stream_state.json"])
def test_what_a_run_remembers_is_damaged(pairs, tmp_path, name, content):
    """A manifest or a state of the stream that is lost or damaged costs no annotation."""
    finished = annotate(pairs[:8], tmp_path, streaming=True, read_again=False)
    (finished.folder / "manifest.json").unlink()  # not finished
    path = finished.folder / name
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    vlm = Asked()
    annotate(pairs, tmp_path, vlm, streaming=True, read_again=False)
    assert vlm.prompts.total() == 2
    annotate(pairs, tmp_path / "fresh", streaming=True, read_again=False)
    assert contents(finished.folder) == contents(tmp_path / "fresh")


def test_other_images_are_not_joined(rows, tmp_path):
    """An image file that was replaced after the annotation is found, also where `datasets` has the hash of the old one in its cache."""
    annotate(rows, tmp_path / "out")
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")

    def join():
        source = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
        source = source.cast_column("chosen", Image()).cast_column("rejected", Image())
        return join_annotations(source, load_annotations(tmp_path / "out"))

    assert len(join()) == len(join()) == 10
    replace_image(rows, 5)
    with pytest.raises(ValueError, match=f"row with id {rows[5]['id']!r} has other images than were annotated"):
        join()


def test_every_bit_of_a_table_counts(tmp_path):
    """A table with any bit turned, or cut off anywhere, is not read."""
    path = tmp_path / "table.parquet"
    write_table(path, pa.table({"id": ["a", "b"], "score": [1.0, None]}))
    whole = path.read_bytes()
    assert read_table(path).to_pylist() == [{"id": "a", "score": 1.0}, {"id": "b", "score": None}]
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(DamagedFile, match="table.parquet is cut off, damaged, or written by something else"):
            read_table(path)
        path.write_bytes(whole[:place])
        with pytest.raises(DamagedFile):
            read_table(path)
