# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
from PIL import Image

from tests import tiny
from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.detector import Detection, Detector
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.instances import count_instances
from trl_diffusion.annotation.judge import Judge, Verdict, preference
from trl_diffusion.annotation.planner import Plan, Planner
from trl_diffusion.annotation.records import PAIR_ANNOTATION_FEATURES, ImageRecord, PairRecord
from trl_diffusion.annotation.vlm import VLM, GenerationError
from trl_diffusion.criteria import parse_criteria


class Scripted(VLM):
    """Gives scripted answers and records the requests."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def describe(self):
        return {"model": "scripted", "revision": "1"}

    def generate(self, requests):
        self.requests += requests
        return [
            answer if isinstance(answer, GenerationError) else json.dumps(answer)
            for answer in map(self.next, requests)
        ]

    def next(self, request):
        return self.answers.pop(0)


class Everywhere(Detector):
    """Finds everything except the given objects."""

    def __init__(self, *missing):
        self.missing = missing

    def describe(self):
        return {"model": "everywhere", "revision": "1"}

    def detect(self, queries):
        width = {"red": 0.5, "blue": 0.25}
        return [
            None
            if (label, image.getpixel((0, 0))) in self.missing
            else Detection([0.0, 0.0, width.get(label, 1.0), 1.0], 0.7)
            for image, label in queries
        ]


CHOSEN, REJECTED = (10, 200, 10), (200, 10, 10)


def pair(**changes) -> PairRecord:
    images = {}
    for name, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        images[name] = StoredImage.read(Image.new("RGB", (40, 20), color))
    return PairRecord("x", "a red thing", **images, **changes)


def test_the_planner_names_each_thing_once():
    """Labels are stripped and deduplicated in order, and those beyond the limit are recorded as dropped."""
    vlm = Scripted({"instances": [" Eagle ", "tree", "eagle", "house", "cow"]})
    (record,) = Planner(vlm, max_instances=3)([pair()])
    assert record.labels == ["Eagle", "tree", "house"]
    assert record.dropped == [{"label": "cow", "reason": "beyond the first 3 instances"}]
    assert json.loads(record.planner_answer)["instances"][0] == " Eagle "
    (request,) = vlm.requests
    assert request.schema is Plan and "a red thing" in request.text and "at most 3" in request.text
    assert [image.getpixel((0, 0)) for image in request.images] == [CHOSEN, REJECTED]


@pytest.mark.parametrize("labels", [[], ["eagle"]])
def test_pairs_that_share_nothing_are_ok(labels):
    """A pair without shared objects, or without detected ones, is a row without instances."""
    vlm = Scripted({"instances": labels})
    (record,) = Everywhere(("eagle", CHOSEN))(Planner(vlm)([pair()]))
    assert record.status == "ok" and record.to_row()["instances"] == []


@pytest.mark.parametrize(
    "answer", [{"instances": [""]}, {"instances": ["x" * 81]}, {"things": []}, {"instances": "cow"}]
)
def test_a_plan_that_does_not_validate_is_asked_for_once_more(answer):
    """The second answer counts; a second mistake makes the row an error with role and mistake."""
    (record,) = Planner(Scripted(answer, {"instances": ["cow"]}))([pair()])
    assert record.status == "ok" and record.labels == ["cow"]
    (record,) = Planner(Scripted(answer, answer))([pair()])
    assert record.status == "error" and record.reason.startswith("planner: instances")


def test_rows_that_are_not_ok_are_not_asked_about():
    """Rejected and broken rows pass all roles unchanged, without requests."""
    rejected, broken = pair(), pair()
    rejected.reject("tie")
    broken.fail("chosen: broken")
    vlm = Scripted()
    records = [rejected, broken]
    for role in (Planner(vlm), Everywhere(), Judge(vlm)):
        assert role(records) is records
    assert vlm.requests == [] and [record.status for record in records] == ["rejected", "error"]


def test_the_detector_keeps_what_both_images_have():
    """An instance that is missing in an image is dropped with the name of that image."""
    detector = Everywhere(("eagle", CHOSEN), ("cow", REJECTED), ("tree", CHOSEN), ("tree", REJECTED))
    (record,) = detector([pair(labels=["red", "eagle", "cow", "tree", "blue"])])
    assert [(instance.label, instance.chosen_box[2]) for instance in record.instances] == [
        ("red", 0.5),
        ("blue", 0.25),
    ]
    assert [drop["reason"] for drop in record.dropped] == [
        "not detected in the chosen image",
        "not detected in the rejected image",
        "not detected in the chosen and the rejected image",
    ]


@pytest.mark.parametrize(
    "first, swapped, expected",
    [("A", "B", "chosen"), ("B", "A", "rejected"), ("A", "A", "tie"), ("B", "B", "tie")],
)
def test_verdicts_count_in_both_orders(first, swapped, expected):
    """A verdict that changes with the order of the images is a tie; swapping the images swaps the verdict."""
    assert preference(Verdict(better=first), Verdict(better=swapped)) == expected
    mirrored = {"chosen": "rejected", "rejected": "chosen", "tie": "tie"}
    assert preference(Verdict(better=swapped), Verdict(better=first)) == mirrored[expected]


def test_the_judge_sees_crops_of_one_size_in_both_orders():
    """The judge compares each instance twice, with the images swapped, and both raw answers are stored."""
    vlm = Scripted({"better": "B"}, {"better": "A"}, {"better": "A"}, {"better": "A"})
    (record,) = Judge(vlm, crop_size=28)(Everywhere()([pair(labels=["red", "blue"])]))
    assert [instance.preference for instance in record.instances] == ["rejected", "tie"]
    assert record.instances[0].answer == '{"better": "B"}' and record.instances[0].swapped_answer == '{"better": "A"}'
    assert all(image.size == (28, 28) for request in vlm.requests for image in request.images)
    first, swapped = vlm.requests[:2]
    assert first.images == swapped.images[::-1] and first.text == swapped.text and "red" in first.text
    assert first.images[0].getpixel((14, 14)) == CHOSEN


def test_a_judge_without_an_answer_makes_an_error():
    """One instance without a verdict makes its row an error, and other rows of the batch are not affected."""
    answers = [GenerationError("the server is out"), {"better": "A"}, {"better": "A"}, {"better": "B"}]
    records = Judge(Scripted(*answers))(Everywhere()([pair(labels=["red"]), pair(labels=["blue"])]))
    assert [record.status for record in records] == ["error", "ok"]
    assert records[0].reason == "judge, 'red': the server is out"
    assert records[1].instances[0].preference == "chosen"


def test_counts():
    """Conflicts, ties and drops are counted for rows that are ok."""
    vlm = Scripted({"better": "B"}, {"better": "A"}, {"better": "A"}, {"better": "A"})
    good = Judge(vlm)(Everywhere(("cow", CHOSEN))([pair(labels=["red", "blue", "cow"])]))[0]
    bad, kept_tie = pair(labels=["red"]), pair(tie=True)
    bad.instances = list(good.instances)
    bad.fail("judge")
    rows = [PAIR_ANNOTATION_FEATURES.encode_example(record.to_row()) for record in (good, bad, kept_tie)]
    assert count_instances(rows) == {
        "tie": 1,
        "without_instances": 1,
        "instances": 2,
        "conflicts": 1,
        "instance_ties": 1,
        "dropped_instances": 1,
    }


CRITERIA = parse_criteria(tiny.CRITERIA, "tiny")


def painting() -> ImageRecord:
    return ImageRecord("p", "a cat", image=StoredImage.read(Image.new("RGB", (8, 8))))


def test_the_expert_walks_the_tree():
    """There is one request per dimension with its leaves; attributes are in tree order, and raw answers are stored."""
    vlm = Scripted({"positive": ["hue"], "negative": []}, {"positive": [], "negative": ["pet", "kind"]})
    (record,) = AttributeExpert(vlm, CRITERIA)([painting()])
    assert record.positive_attributes == ["hue"] and record.negative_attributes == ["kind", "pet"]
    assert [answer["dimension"] for answer in record.answers] == ["color", "drawing"]
    color, drawing = (request.text for request in vlm.requests)
    assert '- hue: "red" or "blue". Whether it is red.' in color and "- kind:" not in color
    assert "- kind:" in drawing and "- pet:" in drawing and "- hue:" not in drawing and "a cat" in drawing


@pytest.mark.parametrize(
    "answer, mistake",
    [
        ({"positive": ["kind"], "negative": []}, "positive.0: Input should be 'hue'"),
        ({"positive": ["hue"], "negative": ["hue"]}, "hue stand more than once"),
        ({"positive": ["hue", "hue"], "negative": []}, "hue stand more than once"),
        ({"positive": ["red"], "negative": []}, "positive.0: Input should be 'hue'"),
        ({"positive": []}, "negative: Field required"),
    ],
)
def test_the_expert_answers_with_known_ids_only(answer, mistake):
    """An id of another dimension, a form instead of an id, or a repeated id causes one retry, then an error."""
    drawing = {"positive": [], "negative": []}
    (record,) = AttributeExpert(Scripted(answer, drawing, drawing), CRITERIA)([painting()])
    assert record.status == "ok"
    vlm = Scripted(answer, drawing, answer)
    (record,) = AttributeExpert(vlm, CRITERIA)([painting()])
    assert (
        record.status == "error" and record.reason.startswith("attribute expert, color: ") and mistake in record.reason
    )
    assert mistake in vlm.requests[-1].text
    assert record.to_row()["positive_attributes"] == []


def test_schemas_are_closed_lists():
    """A server that enforces schemas can only answer with ids of the dimension."""
    schema = AttributeExpert(Scripted(), CRITERIA).schemas["drawing"].model_json_schema()
    assert schema["properties"]["positive"]["items"]["enum"] == ["kind", "pet"]
    assert schema["required"] == ["positive", "negative"]
    assert Verdict.model_json_schema()["properties"]["better"]["enum"] == ["A", "B"]


def test_shipped_prompts_name_the_answers_that_are_asked_for():
    """The example answer in each shipped prompt is valid."""
    vlm = Scripted()
    record = pair(labels=["red"])
    Everywhere()([record])
    requests = [Planner(vlm).request(record), *Judge(vlm).requests(record, record.instances[0])]
    requests += [AttributeExpert(vlm, CRITERIA).request(painting(), dimension) for dimension in CRITERIA.dimensions]
    for request in requests:
        lines = [line for line in request.text.splitlines() if "{" in line]
        examples = [line[line.index("{") : line.index("}") + 1] for line in lines]
        assert examples
        for example in examples:
            request.schema.model_validate_json(example)
