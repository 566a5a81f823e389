# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest

from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.attributes import attribute_task
from trl_diffusion.annotation.instances import instance_task
from trl_diffusion.annotation.judge import Judge
from trl_diffusion.annotation.planner import Planner
from trl_diffusion.annotation.records import image_columns, pair_columns, prepare_rows
from trl_diffusion.criteria import Criteria
from trl_diffusion.data.formats import PREFERENCES
from trl_diffusion.quickstart import paintings, world
from trl_diffusion.quickstart.oracle import CROP_MARGIN, OracleDetector, OracleVLM, crop_quality, plan
from trl_diffusion.quickstart.sampling import shipped


NUM_PAIRS = 300


def iou(a: list[float], b: list[float]) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


@pytest.fixture(scope="module")
def annotated():
    """Pairs with their true instances, and what the roles make of them without these."""
    truth = world.preference_dataset(NUM_PAIRS, seed=3)
    rows, columns = prepare_rows(truth.remove_columns("instances"), pair_columns)
    vlm = OracleVLM()
    source = {"name": "world", "split": "train"}
    task = instance_task(Planner(vlm), OracleDetector(), Judge(vlm, crop_size=64), source, columns)
    return truth, task.annotate([task.open(row) for row in rows])


def test_boxes_are_recovered(annotated):
    """Detected boxes overlap the drawn ones by 0.9 or more in 95 % of the cases, and never by less than 0.8."""
    overlaps = [
        iou(found[box], drawn[box])
        for row, result in zip(*annotated)
        for drawn, found in zip(row["instances"], result["instances"], strict=True)
        for box in ("chosen_box", "rejected_box")
    ]
    assert len(overlaps) == 4 * NUM_PAIRS
    assert np.mean(np.array(overlaps) >= 0.9) >= 0.95 and min(overlaps) > 0.8


def test_verdicts_and_the_share_of_conflicts_are_recovered(annotated):
    """Every verdict is the true one, so the share of conflicts is too."""
    truth, results = annotated
    true = [PREFERENCES[instance["preference"]] for row in truth for instance in row["instances"]]
    found = [instance["preference"] for result in results for instance in result["instances"]]
    assert found == true
    assert abs(found.count("rejected") / len(found) - 0.23) < 0.01  # 46 % of the B, none of the A


def test_two_shapes_of_one_name_are_told_apart(annotated):
    """Where A and B have one colour and kind, there are still two instances."""
    same = [
        result for row, result in zip(*annotated) if len({instance["label"] for instance in row["instances"]}) == 1
    ]
    assert same and all(len({instance["label"] for instance in result["instances"]}) == 2 for result in same)


def test_a_shape_that_is_not_there_is_no_instance():
    """What only one of the images shows is not planned, and not found."""
    rng = np.random.default_rng(0)
    scene = world.sample_scene(rng, "a red circle and a blue square", (False, False))
    image = world.render(scene)
    half = image.copy()
    half.paste(world.BACKGROUND, (18, 0, 32, 32))
    assert plan((image, image), scene.prompt) == ["left red circle", "right blue square"]
    assert plan((image, half), scene.prompt) == ["left red circle"]
    detector = OracleDetector()
    assert detector.detect_shape(half, "right blue square") is None
    assert detector.detect_shape(image, "right red square") is None
    assert detector.detect_shape(image, "right blue square").score > world.CLEAN_QUALITY


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_crop_is_judged_as_its_scene(kind):
    """A bite costs a crop's shape at least half of its area in quality, whole shapes are near 1."""
    from trl_diffusion.annotation.images import crop_around

    rng = np.random.default_rng(1)
    qualities = {True: [], False: []}
    for defective in (True, False):
        for _ in range(20):
            scene = world.sample_scene(rng, f"a red {kind} and a blue square", (defective, False))
            box = [side / world.SIZE for side in scene.shapes[0].box]
            crop = crop_around(world.render(scene), box, 64, CROP_MARGIN)
            qualities[defective].append(crop_quality(crop, "red", kind))
    assert min(qualities[False]) > max(qualities[True]) + world.TIE_MARGIN
    assert np.mean(qualities[False]) - np.mean(qualities[True]) > world.BITE_AREA / 2


def test_equal_drawings_are_ties():
    """An image beside itself is a tie in all its instances."""
    scene = world.sample_scene(np.random.default_rng(0))
    image = {"bytes": world.png_bytes(world.render(scene)), "path": None}
    row = {"id": "x", "prompt": scene.prompt, "chosen": image, "rejected": image}
    vlm = OracleVLM()
    columns = pair_columns(list(row))
    source = {"name": "world", "split": "train"}
    task = instance_task(Planner(vlm), OracleDetector(), Judge(vlm, crop_size=64), source, columns)
    (result,) = task.annotate([task.open(row)])
    assert [instance["preference"] for instance in result["instances"]] == ["tie", "tie"]


def test_attributes_are_recovered():
    """The expert's walk over the quickstart's tree finds the attributes that each painting was drawn with."""
    truth = paintings.painting_dataset(60, seed=0)
    rows, columns = prepare_rows(truth.remove_columns(["positive_attributes", "negative_attributes"]), image_columns)
    expert = AttributeExpert(OracleVLM(), Criteria.load(shipped("criteria.yaml")))
    task = attribute_task(expert, {"name": "paintings", "split": "train"}, columns)
    results = task.annotate([task.open(row) for row in rows])
    for row, result in zip(truth, results, strict=True):
        assert result["status"] == "ok"
        assert set(result["positive_attributes"]) == set(row["positive_attributes"])
        assert set(result["negative_attributes"]) == set(row["negative_attributes"])


def test_padding_is_no_part_of_a_drawing():
    """Where a crop reaches beyond the image, the grey there changes no verdict."""
    from trl_diffusion.annotation.images import crop_around

    shape = world.Shape("circle", "red", (0.0, 9.0, 14.0, 23.0), False)
    scene = world.Scene((shape, world.Shape("square", "blue", (19.0, 10.0, 31.0, 22.0), False)))
    box = [side / world.SIZE for side in shape.box]
    crop = crop_around(world.render(scene), box, 64, CROP_MARGIN)
    assert crop.getpixel((0, 32)) == (127, 127, 127)
    assert crop_quality(crop, "red", "circle") > 0.93
