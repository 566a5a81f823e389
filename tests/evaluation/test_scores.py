# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import weakref
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageStat

from trl_diffusion.evaluation import scores as scores_module
from trl_diffusion.evaluation.scores import IMAGES_SCHEMA, metrics_of, score_models
from trl_diffusion.metrics.scorer import Scorer, ScoringError


class Brightness(Scorer):
    """Scores the mean of the red channel, gives an error for black images, and records the images."""

    name = "brightness"
    needs_prompts = False

    def __init__(self, revision="1", power_cut_after=None):
        super().__init__(device="cpu")
        self.weights = {"lamp": revision}
        self.power_cut_after = power_cut_after
        self.asked = []

    def prepare(self, image):
        return ImageStat.Stat(image).mean[0]

    def score_batch(self, prepared, prompts):
        if self.power_cut_after is not None and len(self.asked) >= self.power_cut_after:
            raise KeyboardInterrupt
        self.asked += prepared
        return [value or ScoringError("it is dark") for value in prepared]


class PromptLength(Scorer):
    """Scores the number of letters of the prompt."""

    name = "prompt_length"
    higher_is_better = False

    def __init__(self):
        super().__init__(device="cpu")
        self.asked = []

    def score_batch(self, prepared, prompts):
        self.asked += prompts
        return [float(len(prompt)) for prompt in prompts]


def paint(folder, image, red):
    path = folder / image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (red, 0, 0)).save(path)


def images_of(folder, models=("base", "tuned"), num_prompts=3) -> pa.Table:
    """An image for each model and prompt, with red 10, 20, ..."""
    rows = []
    for model in models:
        for number in range(num_prompts):
            image = f"images/{model}/{number}-0.png"
            paint(folder, image, 10 * (len(rows) + 1))
            rows.append(
                {
                    "model": model,
                    "prompt_id": str(number),
                    "prompt": "a" * (number + 1),
                    "group": None,
                    "index": 0,
                    "image": image,
                }
            )
    return pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)


def score(images, folder, scorer, **options) -> pa.Table:
    return score_models(images, {scorer.name: lambda: scorer}, folder, disable_tqdm=True, **options)


def test_the_table_has_a_column_for_each_metric(tmp_path):
    """`scores.parquet` has the columns of the images, float64 scores (null if missing), and descriptions of the
    metrics."""
    images = images_of(tmp_path)
    paint(tmp_path, "images/tuned/1-0.png", 0)
    scorers = {"brightness": Brightness, "prompt_length": PromptLength}
    table = score_models(images, scorers, tmp_path, batch_size=2, disable_tqdm=True)
    assert table["brightness"].to_pylist() == [10, 20, 30, 40, None, 60]
    assert table["prompt_length"].to_pylist() == [1, 2, 3, 1, 2, 3]
    assert table.schema.names == [*IMAGES_SCHEMA.names, "brightness", "prompt_length"]
    assert table.schema.types == [*IMAGES_SCHEMA.types, pa.float64(), pa.float64()]
    assert metrics_of(table) == {
        "brightness": {
            "higher_is_better": True,
            "weights": {"lamp": "1"},
            "errors": {"images/tuned/1-0.png": "it is dark"},
        },
        "prompt_length": {"higher_is_better": False, "weights": {}, "errors": {}},
    }
    stored = pq.read_table(tmp_path / "scores.parquet")
    assert stored.equals(table) and metrics_of(stored) == metrics_of(table)


def test_nothing_is_scored_twice(tmp_path):
    """A repeated run scores nothing, including errors; for a new model, only its images are scored."""
    first_scorer = Brightness()
    images = images_of(tmp_path)
    paint(tmp_path, "images/base/0-0.png", 0)
    first = score(images, tmp_path, first_scorer)
    assert first_scorer.asked == [0, 20, 30, 40, 50, 60]
    again = Brightness()
    assert score(images, tmp_path, again).equals(first, check_metadata=True) and again.asked == []
    more = images_of(tmp_path, ("base", "tuned", "other"))
    paint(tmp_path, "images/base/0-0.png", 0)
    other = Brightness()
    table = score(more, tmp_path, other)
    assert other.asked == [70, 80, 90] and table["brightness"].to_pylist() == [None, 20, 30, 40, 50, 60, 70, 80, 90]


def test_scores_of_images_that_are_left_out_for_once_are_kept(tmp_path):
    """Scores of a model are kept when a run leaves it out."""
    images = images_of(tmp_path)
    score(images, tmp_path, Brightness())
    assert score(images.slice(0, 3), tmp_path, Brightness())["brightness"].to_pylist() == [10, 20, 30]
    paint(tmp_path, "images/base/0-0.png", 200)
    score(images.slice(0, 3), tmp_path, Brightness())  # which writes the file
    back = Brightness()
    assert score(images, tmp_path, back)["brightness"].to_pylist() == [200, 20, 30, 40, 50, 60] and back.asked == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch, batch_size):
    """After an interruption, written scores are kept, batches are the same, and so are the scores."""
    monkeypatch.setattr(scores_module, "IMAGES_AT_ONCE", 4)
    written = 4 if batch_size == 1 else 6  # whole batches
    images = images_of(tmp_path, num_prompts=5)
    stopped = Brightness(power_cut_after=written + batch_size)
    with pytest.raises(KeyboardInterrupt):
        score(images, tmp_path, stopped, batch_size=batch_size)
    rest = Brightness()
    table = score(images, tmp_path, rest, batch_size=batch_size)
    assert rest.asked == [10 * (number + 1) for number in range(written, 10)]
    whole = score(
        images_of(tmp_path / "whole", num_prompts=5), tmp_path / "whole", Brightness(), batch_size=batch_size
    )
    assert table.equals(whole, check_metadata=True)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("num_images", [40, 80])
def test_every_score_is_written_twice_at_most(tmp_path, monkeypatch, num_images):
    """In a part when it is new, and in the whole file at the end: however many images there are."""
    monkeypatch.setattr(scores_module, "IMAGES_AT_ONCE", 4)
    rows, write = Counter(), scores_module.write_scores

    def counted(path, scores, weights):
        rows[path.name] += len(scores)
        write(path, scores, weights)

    monkeypatch.setattr(scores_module, "write_scores", counted)
    score(images_of(tmp_path, ["base"], num_images), tmp_path, Brightness(), batch_size=1)
    assert rows.pop("brightness.parquet") == num_images and sum(rows.values()) == num_images - 4
    assert max(rows.values()) == 4
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["brightness.parquet"]


def test_parts_of_several_stopped_runs_are_all_kept(tmp_path, monkeypatch):
    """Those of other weights, and of images that changed since, are not taken; none stays behind."""
    monkeypatch.setattr(scores_module, "IMAGES_AT_ONCE", 2)
    images = images_of(tmp_path, ["base"], 10)
    for revision, power_cut_after in (("0", 3), ("1", 3), ("1", 3)):
        with pytest.raises(KeyboardInterrupt):
            score(images, tmp_path, Brightness(revision, power_cut_after), batch_size=1)
    assert len(list((tmp_path / "scores").iterdir())) == 3
    paint(tmp_path, "images/base/0-0.png", 200)
    last = Brightness("1")
    assert score(images, tmp_path, last, batch_size=1)["brightness"].to_pylist() == [200, *range(20, 110, 10)]
    assert last.asked == [200, *range(50, 110, 10)]
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["brightness.parquet"]
    assert score(images, tmp_path, Brightness("1", 0)).num_rows == 10


def test_a_changed_image_is_scored_again(tmp_path):
    """Only an image whose bytes changed is scored again."""
    images = images_of(tmp_path)
    score(images, tmp_path, Brightness())
    paint(tmp_path, "images/tuned/0-0.png", 200)
    again = Brightness()
    assert score(images, tmp_path, again)["brightness"].to_pylist() == [10, 20, 30, 200, 50, 60]
    assert again.asked == [200]


def test_a_changed_prompt_is_scored_again_where_the_metric_reads_it(tmp_path):
    """An image whose prompt changed is scored again only by metrics that use prompts."""
    images = images_of(tmp_path)
    score(images, tmp_path, Brightness())
    score(images, tmp_path, PromptLength())
    prompts = pa.array(["aaaa", *images["prompt"].to_pylist()[1:]])
    images = images.set_column(2, "prompt", prompts)
    brightness, length = Brightness(), PromptLength()
    score(images, tmp_path, brightness)
    assert score(images, tmp_path, length)["prompt_length"].to_pylist() == [4, 2, 3, 1, 2, 3]
    assert brightness.asked == [] and length.asked == ["aaaa"]


def test_other_weights_score_everything_again(tmp_path, caplog):
    """Cached scores of other weights are ignored, with a warning."""
    images = images_of(tmp_path)
    score(images, tmp_path, Brightness())
    other = Brightness(revision="2")
    with caplog.at_level(logging.WARNING):
        table = score(images, tmp_path, other)
    assert len(other.asked) == 6 and metrics_of(table)["brightness"]["weights"] == {"lamp": "2"}
    (message,) = caplog.messages
    assert "{'lamp': '1'}" in message and "{'lamp': '2'}" in message and "scored again" in message
    kept = pq.read_table(tmp_path / "scores/brightness.parquet")
    assert json.loads(kept.schema.metadata[b"weights"]) == {"lamp": "2"} and kept.num_rows == 6


def test_errors_are_tried_again_on_request(tmp_path):
    """`retry_errors` scores only the errors again."""
    images = images_of(tmp_path)
    paint(tmp_path, "images/base/1-0.png", 0)
    score(images, tmp_path, Brightness())
    again = Brightness()
    score(images, tmp_path, again, retry_errors=True)
    assert again.asked == [0]


def test_one_scorer_is_in_memory_at_a_time(tmp_path):
    """A scorer is released before the next is loaded, and each is loaded once for all models."""
    loaded = []

    def load():
        assert all(scorer() is None for scorer in loaded)
        scorer = Brightness()
        scorer.itself = scorer  # a reference cycle, as between modules and hooks
        loaded.append(weakref.ref(scorer))
        return scorer

    score_models(images_of(tmp_path), {"first": load, "second": load}, tmp_path, disable_tqdm=True)
    assert len(loaded) == 2 and loaded[1]() is None


def test_what_is_wrong_with_the_images_is_said(tmp_path):
    """Missing files, files that are not images, duplicate rows, no rows and missing columns raise errors that name
    them."""
    images = images_of(tmp_path)
    with pytest.raises(ValueError, match="no images"):
        score(images.slice(0, 0), tmp_path, Brightness())
    with pytest.raises(ValueError, match="lacks group, index"):
        score(images.drop_columns(["group", "index"]), tmp_path, Brightness())
    with pytest.raises(ValueError, match="same image: images/base/0-0.png"):
        score(pa.concat_tables([images, images.slice(0, 1)]), tmp_path, Brightness())
    same = images.set_column(images.schema.get_field_index("prompt_id"), "prompt_id", pa.array(["0"] * 6))
    with pytest.raises(ValueError, match="same model, prompt_id, index: base, 0, 0"):
        score(same, tmp_path, Brightness())
    (tmp_path / "images/base/1-0.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="1-0.png cannot be read as an image"):
        score(images, tmp_path, Brightness())
    (tmp_path / "images/base/1-0.png").unlink()
    with pytest.raises(ValueError, match="1-0.png cannot be read: No such file"):
        score(images, tmp_path, Brightness())


def test_a_disk_that_is_full_is_said(tmp_path):
    """If a file cannot be written, the error names the file and the way out."""
    images = images_of(tmp_path)
    (tmp_path / "scores").write_bytes(b"in the way")
    with pytest.raises(ValueError, match="brightness.parquet cannot be written: .* the same command"):
        score(images, tmp_path, Brightness())
