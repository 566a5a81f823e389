# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Whole runs with real model classes: Qwen2.5-VL as planner, judge and attribute expert, Grounding DINO as detector."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from tests import tiny
from tests.annotation import tiny_models
from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.attributes import attribute_task
from trl_diffusion.annotation.detector import TransformersDetector
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import STATUSES, image_columns, pair_columns
from trl_diffusion.annotation.run import MANIFEST, Run, Task, run, run_locally
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.criteria import parse_criteria
from trl_diffusion.data.formats import PREFERENCES, check_box, open_image


REAL_PAIRS = Path(__file__).parents[3] / "shared" / "data" / "real_pairs"
SOURCE = {"name": "tiny", "split": "train"}


def undecoded(dataset: Dataset) -> Dataset:
    for column in {"chosen", "rejected", "image"} & set(dataset.column_names):
        dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def real_pairs() -> Dataset:
    """Pairs of images from two versions of a text-to-image model, in 12 sizes."""
    if not REAL_PAIRS.is_dir():
        pytest.skip(f"there is no {REAL_PAIRS}")
    rows = [json.loads(line) for line in (REAL_PAIRS / "pairs.jsonl").read_text().splitlines()]
    # The taught model was trained on prompts of about 200 characters or less; one here has 637.
    columns = {"id": [row["id"] for row in rows], "prompt": [row["prompt"][:200] for row in rows]}
    files = {name: [str(REAL_PAIRS / row[name]) for row in rows] for name in ("chosen", "rejected")}
    return undecoded(Dataset.from_dict({**columns, **files}))


def random_pairs() -> Dataset:
    return undecoded(tiny.pairs(7, with_instances=False))


@pytest.fixture(scope="module", params=[random_pairs, real_pairs], ids=["random", "real"])
def dataset(request) -> Dataset:
    return request.param()


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> TransformersVLM:
    folder = tiny_models.taught_once(tmp_path_factory)
    return TransformersVLM(str(folder), max_new_tokens=32, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def untaught(tmp_path_factory) -> TransformersVLM:
    folder = tiny_models.tiny_vlm(tmp_path_factory.mktemp("untaught"))
    return TransformersVLM(str(folder), max_new_tokens=8, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> TransformersDetector:
    folder = tiny_models.tiny_detector(tmp_path_factory.mktemp("detector"))
    return TransformersDetector(str(folder), threshold=0.5, device="cpu")


def pair_task(planner: TransformersVLM, detector: TransformersDetector, judge: TransformersVLM) -> Task:
    columns = pair_columns(["id", "prompt", "chosen", "rejected"])
    roles = Planner(planner), detector, Judge(judge, crop_size=28)
    return instance_task(*roles, dataset=SOURCE, columns=columns, rows_per_shard=4)


def image_task(vlm: TransformersVLM) -> Task:
    expert = AttributeExpert(vlm, parse_criteria(tiny.CRITERIA, "tiny.yaml"))
    columns = image_columns(["id", "prompt", "image"])
    return attribute_task(expert, dataset=SOURCE, columns=columns, rows_per_shard=4)


def written(folder: Path) -> list[dict]:
    """All rows of a run, with names instead of indices of class labels."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in rows:
        row["status"] = STATUSES[row["status"]]
        for instance in row.get("instances", []):
            instance["preference"] = PREFERENCES[instance["preference"]]
    return rows


def counts(folder: Path) -> dict[str, int]:
    """The counts in the manifest of a finished run."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["complete"]
    return manifest["counts"]


@pytest.fixture(scope="module")
def finished(dataset, taught, detector, tmp_path_factory) -> Run:
    task = pair_task(taught, detector, taught)
    return run(dataset, task, tmp_path_factory.mktemp("instances"), run_locally)


@pytest.fixture(scope="module")
def images(dataset) -> Dataset:
    return dataset.remove_columns("rejected").rename_column("chosen", "image")


class TestInstances:
    def test_every_row_comes_out_once_and_in_order(self, dataset, finished):
        """The shards contain the ids and prompts of the dataset in order, all with status ok and a plan."""
        rows = written(finished.folder)
        assert [row["id"] for row in rows] == dataset["id"] and [row["prompt"] for row in rows] == dataset["prompt"]
        for row in rows:
            assert (row["status"], row["reason"], row["tie"]) == ("ok", "", False)
            assert json.loads(row["planner_answer"]) == {"instances": tiny_models.LABELS}
            assert [instance["label"] for instance in row["instances"]] == tiny_models.LABELS
            assert row["dropped"] == []

    def test_boxes_are_the_detectors_in_pixels_of_the_file(self, dataset, finished, detector):
        """Each box is inside its stored image, has an area, and is the detector's box in pixels."""
        for source, row in zip(dataset, written(finished.folder), strict=True):
            for side in ("chosen", "rejected"):
                image = open_image(source[side]).convert("RGB")
                hits = detector.detect([(image, label) for label in tiny_models.LABELS])
                for instance, hit in zip(row["instances"], hits, strict=True):
                    box = instance[f"{side}_box"]
                    assert check_box(box, *image.size) == box
                    assert min(box) >= 0 and box[2] <= image.width and box[3] <= image.height
                    expected = [share * length for share, length in zip(hit.box, image.size * 2, strict=True)]
                    assert box == pytest.approx(expected, abs=1e-3)
                    assert instance[f"{side}_score"] == pytest.approx(hit.score, abs=1e-5)
                    assert instance[f"{side}_score"] > 0.5

    def test_preferences_follow_from_both_raw_answers(self, finished):
        """Both raw answers are stored, and an instance has a preference if both orders agree."""
        outcomes = {("A", "B"): "chosen", ("B", "A"): "rejected", ("A", "A"): "tie", ("B", "B"): "tie"}
        for row in written(finished.folder):
            for instance in row["instances"]:
                verdicts = [json.loads(instance[name])["better"] for name in ("answer", "swapped_answer")]
                assert instance["preference"] == outcomes[tuple(verdicts)]

    def test_counts_add_up(self, dataset, finished):
        """The counts in the manifest are those of the rows."""
        rows = written(finished.folder)
        preferences = Counter(instance["preference"] for row in rows for instance in row["instances"])
        assert counts(finished.folder) == {
            "rows": len(dataset),
            "ok": len(dataset),
            "rejected": 0,
            "error": 0,
            "tie": 0,
            "without_instances": 0,
            "instances": 2 * len(dataset),
            "conflicts": preferences["rejected"],
            "instance_ties": preferences["tie"],
            "dropped_instances": 0,
        }

    def test_a_detector_that_finds_nothing_leaves_rows_without_instances(self, dataset, taught, detector, tmp_path):
        """Below the threshold, all planned instances are dropped with a reason, and the rows are ok."""
        blind = TransformersDetector(detector.model_name_or_path, threshold=0.99, device="cpu")
        finished = run(dataset, pair_task(taught, blind, taught), tmp_path, run_locally)
        reason = "not detected in the chosen and the rejected image"
        for row in written(finished.folder):
            assert row["status"] == "ok" and row["instances"] == []
            assert row["dropped"] == [{"label": label, "reason": reason} for label in tiny_models.LABELS]
        figures = counts(finished.folder)
        assert (figures["without_instances"], figures["dropped_instances"]) == (len(dataset), 2 * len(dataset))

    def test_babble_makes_error_rows_that_name_the_role(self, dataset, taught, untaught, detector, tmp_path):
        """With random weights, all rows are errors that contain the role, the mistake and the raw answer."""
        for planner, judge, role in ((untaught, taught, "planner: "), (taught, untaught, "judge, 'cow': ")):
            finished = run(dataset, pair_task(planner, detector, judge), tmp_path, run_locally, max_error_rate=1.0)
            rows = written(finished.folder)
            assert [row["id"] for row in rows] == dataset["id"]
            for row in rows:
                assert row["status"] == "error" and row["reason"].startswith(role) and row["instances"] == []
                assert row["planner_answer"] != ""
            figures = counts(finished.folder)
            assert (figures["rows"], figures["error"]) == (len(dataset), len(dataset))
            assert (figures["ok"], figures["instances"]) == (0, 0)


def test_verdicts_follow_from_the_pixels(taught, detector, tmp_path):
    """The judge prefers the bright image of a bright and a dark one, and neither of two bright ones."""
    rng = np.random.default_rng(3)
    kinds = {"chosen": (True, False), "rejected": (False, True), "tie": (True, True)}
    rows = []
    for index, (expected, bright) in enumerate([*kinds.items()] * 4):
        width, height = [(64, 64), (48, 80), (96, 40), (56, 72)][index // 3]
        images = [tiny_models.shade(rng, light, width, height) for light in bright]
        rows.append({"id": f"{index}-{expected}", "prompt": "a cow", "chosen": images[0], "rejected": images[1]})
    dataset = Dataset.from_list(rows).cast_column("chosen", Image()).cast_column("rejected", Image())
    finished = run(undecoded(dataset), pair_task(taught, detector, taught), tmp_path, run_locally)
    for row in written(finished.folder):
        assert [instance["preference"] for instance in row["instances"]] == [row["id"].split("-")[1]] * 2
    figures = counts(finished.folder)
    assert (figures["instances"], figures["conflicts"], figures["instance_ties"]) == (24, 8, 8)


def test_boxes_of_a_turned_photograph_fit_its_file(taught, detector, tmp_path):
    """For a file with a rotation of 90 degrees in its EXIF data, boxes are rotated back to the stored image."""
    width, height = 80, 48
    exif = PILImage.Exif()
    exif[PILImage.ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    tiny.image(1, width, height).save(buffer, format="PNG", exif=exif)
    row = {"id": "turned", "prompt": "a cow", "chosen": buffer.getvalue(), "rejected": tiny.image(2, 40, 60)}
    row["rejected"] = StoredImage.read(row["rejected"]).data
    finished = run(Dataset.from_list([row]), pair_task(taught, detector, taught), tmp_path, run_locally)
    upright = StoredImage(row["chosen"]).upright
    assert upright.size == (height, width)
    hits = detector.detect([(upright, label) for label in tiny_models.LABELS])
    (annotated,) = written(finished.folder)
    for instance, hit in zip(annotated["instances"], hits, strict=True):
        x_min, y_min, x_max, y_max = hit.box
        expected = [y_min * width, (1 - x_max) * height, y_max * width, (1 - x_min) * height]
        assert instance["chosen_box"] == pytest.approx(expected, abs=1e-3)


def test_a_run_of_babble_stops(untaught, detector, tmp_path):
    """With an error rate of 1 %, ten errors are allowed in the first thousand rows: the third shard of four is
    refused."""
    dataset = undecoded(tiny.pairs(16, with_instances=False))
    task = pair_task(untaught, detector, untaught)
    with pytest.raises(ValueError, match="Stopped: 12 of 12 rows are errors.*8 rows are written") as caught:
        run(dataset, task, tmp_path, run_locally, max_error_rate=0.01)
    assert "row-11: planner: " in str(caught.value)
    (folder,) = tmp_path.iterdir()
    assert [row["id"] for row in written(folder)] == [f"row-{index}" for index in range(8)]
    assert not json.loads((folder / MANIFEST).read_text())["complete"]


def test_a_small_run_of_babble_fails_in_the_end(untaught, detector, tmp_path):
    """If the dataset ends before the allowance is used up, all rows are written and the run fails with the errors."""
    dataset = undecoded(tiny.pairs(7, with_instances=False))
    with pytest.raises(ValueError, match="7 of 7 rows are errors"):
        run(dataset, pair_task(untaught, detector, untaught), tmp_path, run_locally)
    (folder,) = tmp_path.iterdir()
    assert len(written(folder)) == 7 and counts(folder)["error"] == 7


class TestAttributes:
    def test_every_image_gets_the_experts_answers(self, images, taught, tmp_path):
        """Each image is written once and in order, with ids of all dimensions in tree order and both raw answers."""
        finished = run(images, image_task(taught), tmp_path, run_locally)
        rows = written(finished.folder)
        assert [row["id"] for row in rows] == images["id"]
        for row in rows:
            assert (row["status"], row["reason"]) == ("ok", "")
            assert (row["positive_attributes"], row["negative_attributes"]) == (["hue", "kind"], ["pet"])
            answers = {answer["dimension"]: json.loads(answer["answer"]) for answer in row["answers"]}
            assert answers == tiny_models.ATTRIBUTES
        assert counts(finished.folder) == {
            "rows": len(images),
            "ok": len(images),
            "rejected": 0,
            "error": 0,
            "positive_attributes": 2 * len(images),
            "negative_attributes": len(images),
            "without_attributes": 0,
        }

    def test_babble_makes_error_rows_that_name_the_dimension(self, images, untaught, tmp_path):
        """With random weights, all rows are errors with raw answers, and the run fails unless they are allowed."""
        task = image_task(untaught)
        with pytest.raises(ValueError, match=f"{len(images)} of {len(images)} rows are errors"):
            run(images, task, tmp_path, run_locally, max_error_rate=0.5)
        (folder,) = tmp_path.iterdir()
        rows = written(folder)
        assert [row["id"] for row in rows] == images["id"]
        for row in rows:
            assert row["status"] == "error" and row["reason"].startswith("attribute expert, ")
            assert row["positive_attributes"] == row["negative_attributes"] == []
            assert [answer["dimension"] for answer in row["answers"]] == ["color", "drawing"]
            assert all(answer["answer"] for answer in row["answers"])
