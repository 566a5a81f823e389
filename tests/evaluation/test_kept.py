# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What an evaluation keeps and uses again is what was sampled and scored: its content decides, not its name."""

import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.evaluation.test_run import Brightness, evaluate
from tests.kills.killing import contents
from trl_diffusion.evaluation.push import read_evaluation
from trl_diffusion.evaluation.scores import IMAGES_SCHEMA, score_models
from trl_diffusion.files import hold


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny pipelines, prompts, and an evaluation of the first."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        tiny.sd_pipeline().save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("a red circle\na cat and a dog")
    evaluate(folder, folder / "whole", ("first",))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return contents(folder, lambda name: not name.endswith(".lock"))


def flipped(content: bytes) -> bytes:
    """With one bit in the middle turned."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "another image": lambda path: shutil.copy(path.with_name("00001_1.png"), path),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_changed_is_sampled_again(world, tmp_path, caplog, damage):
    """An image that was replaced, cut off or damaged under its name, with its size and time kept, is named and made anew."""
    shutil.copytree(world / "whole", tmp_path / "out")
    image = tmp_path / "out" / "images" / "first" / "00000_1.png"
    times = image.stat()
    DAMAGES[damage](image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    evaluate(world, tmp_path / "out", ("first",))
    assert "1 of 4 images in" in caplog.text and "00000_1.png. They are sampled again" in caplog.text
    assert files(tmp_path / "out") == files(world / "whole")


def altered(path: Path) -> None:
    """Another value in a table that is otherwise as it was written, its metadata included."""
    table = pq.read_table(path)
    score = pc.add(table["score"], 1.0)
    pq.write_table(table.set_column(table.column_names.index("score"), "score", score), path)


SCORE_DAMAGES = {
    "cut off": (DAMAGES["cut off"], 4),
    "empty": (DAMAGES["empty"], 4),
    "a bit": (DAMAGES["a bit"], 4),
    "other values": (altered, 4),
    "rows lost": (lambda path: pq.write_table(pq.read_table(path).slice(1), path), 4),
    "no checksum": (lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(), path), 4),
    "removed": (lambda path: path.unlink(), 4),
}


@pytest.mark.parametrize("damage", SCORE_DAMAGES)
def test_scores_that_are_damaged_are_computed_again(world, tmp_path, caplog, damage):
    """A table of scores that is not as it was written is named, and its images are scored again."""
    shutil.copytree(world / "whole", tmp_path / "out")
    path = tmp_path / "out" / "scores" / "brightness.parquet"
    spoil, scored = SCORE_DAMAGES[damage]
    spoil(path)
    Brightness.scored = 0
    evaluate(world, tmp_path / "out", ("first",))
    assert Brightness.scored == scored
    assert damage == "removed" or "brightness.parquet" in caplog.text and "its images are scored again" in caplog.text
    assert files(tmp_path / "out") == files(world / "whole")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"protocol": {"seed": 1}}'])
def test_a_manifest_that_is_lost_is_written_again(world, tmp_path, caplog, content):
    """A damaged manifest is written again if its checksum is that of the same settings; otherwise nobody knows the settings."""
    shutil.copytree(world / "whole", tmp_path / "out")
    manifest = tmp_path / "out" / "images" / "first" / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    evaluate(world, tmp_path / "out", ("first",))
    assert "manifest.json is lost or damaged. It is written again" in caplog.text
    assert files(tmp_path / "out") == files(world / "whole")
    manifest.write_bytes(b"{")
    (manifest.parent / "SHA256SUMS").unlink()
    with pytest.raises(
        ValueError, match="holds images but a damaged manifest.json: their sampling settings are unknown"
    ):
        evaluate(world, tmp_path / "out", ("first",))


def test_checksums_that_are_damaged_cost_their_images_only(world, tmp_path, caplog):
    """Of a file of checksums with a wrong line and half a line, the images of these lines are sampled again."""
    shutil.copytree(world / "whole", tmp_path / "out")
    sums = tmp_path / "out" / "images" / "first" / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(["0" * 64 + lines[0][64:], *lines[1:3], lines[3][:30]]))
    evaluate(world, tmp_path / "out", ("first",))
    assert "2 of 4 images in" in caplog.text
    assert files(tmp_path / "out") == files(world / "whole")


def test_other_weights_under_the_same_path_are_refused(world, tmp_path):
    """One changed weight in a file with the same size and time is another model."""
    shutil.copytree(world / "whole", tmp_path / "out")
    shutil.copytree(world / "first", tmp_path / "first")
    shutil.copy(world / "prompts.txt", tmp_path)
    evaluate(tmp_path, tmp_path / "out", ("first",))
    path = tmp_path / "first" / "unet" / "diffusion_pytorch_model.safetensors"
    times, weights = path.stat(), load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    with pytest.raises(ValueError, match="`model.revision` 'sha256:.*', not 'sha256:"):
        evaluate(tmp_path, tmp_path / "out", ("first",))


def test_an_evaluation_that_changed_is_not_read(world, tmp_path):
    """A changed figure in the summary, a changed image and a damaged table of scores are named, and nothing is pushed of them."""
    out = tmp_path / "out"
    for name, spoil in {
        "summary.json": lambda path: path.write_text(path.read_text().replace('"num_prompts": 2', '"num_prompts": 3')),
        "images/first/00000_0.png": DAMAGES["a bit"],
        "scores.parquet": lambda path: pq.write_table(pa.concat_tables([pq.read_table(path)]).slice(1), path),
    }.items():
        shutil.copytree(world / "whole", out)
        read_evaluation(out)
        spoil(out / name)
        with pytest.raises(ValueError, match=f"{name}.*Repeat the command that wrote it"):
            read_evaluation(out)
        shutil.rmtree(out)


def test_a_folder_in_use_and_leftovers(world, tmp_path):
    """A second evaluation into a folder is refused while the first runs; afterwards, what a killed one left is removed."""
    out = tmp_path / "out"
    shutil.copytree(world / "whole", out)
    lock = hold(out, "evaluating")
    with pytest.raises(ValueError, match=f"Another process is evaluating into {out}. Wait for it, or stop it"):
        evaluate(world, out, ("first",))
    lock.release()
    for name in (
        "summary.json.tmp",
        "scores/brightness.parquet.tmp",
        "images/first/00000_0.png.tmp",
        ".push-x/data/0.parquet",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")
    evaluate(world, out, ("first",))
    assert files(out) == files(world / "whole") and not list(out.glob(".push*"))
    assert json.loads((out / "summary.json").read_text())["models"] == {"first": 4}


def test_a_folder_that_cannot_be_written(world, tmp_path):
    """A folder that is a file is one clear line, before anything is sampled."""
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out cannot be written to: .*repeat the same command"):
        evaluate(world, tmp_path / "out", ("first",))


@pytest.mark.parametrize("after", [0, 1, 3, 5, 9])
def test_a_full_disk(world, tmp_path, monkeypatch, after):
    """Wherever the disk is full, the run ends with one line that says so, and the same command ends with the whole result."""
    out, fsync, written = tmp_path / "out", os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ValueError, match="cannot be written: No space left on device. .* is safe. Free some disk space"
        ):
            evaluate(world, out, ("first",))
    evaluate(world, out, ("first",))
    assert files(out) == files(world / "whole")


def test_scores_of_other_settings_are_not_used(world, tmp_path, caplog):
    """If a scorer's settings change, its weights being the same, all images are scored again."""

    class Judge(Brightness):
        """The same score, by a model with settings."""

        limit = 1

        def __init__(self):
            super().__init__("cpu")
            self.settings = {"max_new_tokens": Judge.limit}

    shutil.copytree(world / "whole", tmp_path / "out")
    table = pq.read_table(world / "whole" / "scores.parquet").select(IMAGES_SCHEMA.names)
    for limit, scored in ((1, 4), (1, 0), (2, 4)):
        Judge.limit, Brightness.scored = limit, 0
        score_models(table, {"judge": Judge}, tmp_path / "out", disable_tqdm=True)
        assert Brightness.scored == scored
    assert (
        "`judge` was computed with the settings {'max_new_tokens': 1}, but they are now {'max_new_tokens': 2}"
        in caplog.text
    )
