# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io
import json

import evaluate
import numpy as np
import PIL.Image
import pytest
from datasets import Image

from tests import tiny
from tests.annotation import tiny_models
from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.annotation.vlm import VLM, GenerationError
from trl_diffusion.criteria import Criteria, parse_criteria
from trl_diffusion.metrics import metric_path
from trl_diffusion.metrics.num_negative_attributes import NumNegativeAttributesScorer
from trl_diffusion.metrics.scorer import ScoringError
from trl_diffusion.quickstart.oracle import OracleVLM
from trl_diffusion.quickstart.paintings import inspect_painting, painting_dataset
from trl_diffusion.quickstart.sampling import shipped


NUM_PAINTINGS = 24


class Scripted(VLM):
    """Answers what `script` makes of a request, and remembers how many requests came at once."""

    def __init__(self, script):
        self.script, self.batches = script, []

    def describe(self):
        return {"model": "scripted", "revision": "3"}

    def generate(self, requests):
        self.batches.append(len(requests))
        return [self.script(request) for request in requests]


def expert(vlm: VLM | None = None) -> AttributeExpert:
    return AttributeExpert(vlm or OracleVLM(), Criteria.load(shipped("criteria.yaml")))


def looked_at(image: PIL.Image.Image, prompt: str) -> tuple[str, ...]:
    """What the oracle sees, as a plain function."""
    return inspect_painting(image, prompt).negative_attributes


@pytest.fixture(scope="module")
def paintings():
    """Paintings with 0 to 4 negatives, their images undecoded."""
    dataset = painting_dataset(NUM_PAINTINGS, seed=5).cast_column("image", Image(decode=False))
    assert {len(row["negative_attributes"]) for row in dataset} == {0, 1, 2, 3, 4}
    return dataset


def drawn(paintings) -> list[float]:
    return [float(len(row["negative_attributes"])) for row in paintings]


@pytest.mark.parametrize("who", [expert(), looked_at], ids=["expert", "function"])
def test_the_negatives_that_were_drawn_are_counted(paintings, who):
    """On rendered paintings the number is that of the negatives that each was drawn with, whoever looks."""
    scores = NumNegativeAttributesScorer(who).score(list(paintings["image"]), list(paintings["prompt"]), batch_size=7)
    assert scores.values == drawn(paintings) and scores.errors == {}
    assert scores.mean == pytest.approx(np.mean(drawn(paintings)))


def test_a_batch_is_asked_about_at_once(paintings):
    """The expert gets the questions about all images of a batch in one call: four dimensions an image."""
    vlm = Scripted(lambda request: '{"positive": [], "negative": []}')
    scorer = NumNegativeAttributesScorer(expert(vlm))
    scores = scorer.score(list(paintings["image"])[:5], list(paintings["prompt"])[:5], batch_size=3)
    assert vlm.batches == [3 * 4, 2 * 4] and scores.values == [0.0] * 5


def test_no_valid_answer_is_no_zero(paintings):
    """An image that the model says nothing valid about has no score, but the reason; its neighbours have theirs."""
    oracle, lost, garbled = OracleVLM(), "a red circle", "a blue square"

    def script(request):
        if lost in request.text:
            return GenerationError("the server is out")
        if garbled in request.text:
            return "I like it very much."
        return json.dumps(oracle.answer(request))

    prompts = list(paintings["prompt"])
    prompts[1], prompts[4] = lost, garbled
    wrong = {place for place, prompt in enumerate(prompts) if prompt in (lost, garbled)}
    scores = NumNegativeAttributesScorer(expert(Scripted(script))).score(list(paintings["image"]), prompts)
    assert set(scores.errors) == wrong
    assert scores.errors[1].endswith(": the server is out")
    assert scores.errors[4].startswith("attribute expert, ") and "no JSON object" in scores.errors[4]
    expected = [None if place in wrong else number for place, number in enumerate(drawn(paintings))]
    assert scores.values == expected
    nothing = NumNegativeAttributesScorer(expert(Scripted(lambda request: "{}"))).score(
        list(paintings["image"])[:2], prompts[:2]
    )
    assert nothing.values == [None, None] and nothing.mean is None and set(nothing.errors) == {0, 1}


def test_the_expert_sees_every_pixel():
    """What the model is shown of an image is the upright image itself: nothing is lost on the way."""
    image = tiny.image(0, 40, 24)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored on its side
    file = io.BytesIO()
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    shown = []
    vlm = Scripted(lambda request: shown.append(request.images[0]) or '{"positive": [], "negative": []}')
    seen = []
    for who in (expert(vlm), lambda image, prompt: seen.append(image) or []):
        NumNegativeAttributesScorer(who).score([{"bytes": file.getvalue(), "path": None}, image], ["a", "b"])
    assert len(shown) == 2 * 4 and len(seen) == 2
    for one in (*shown, *seen):
        assert np.array_equal(np.asarray(one), np.asarray(image))


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "I;16"])
def test_images_of_every_mode_are_taken(mode):
    """An image in another mode than RGB is looked at too."""
    image = PIL.Image.new("RGB", (16, 16), (200, 10, 10)).convert("L" if mode == "I;16" else mode).convert(mode)
    vlm = Scripted(lambda request: '{"positive": [], "negative": []}')
    assert NumNegativeAttributesScorer(expert(vlm)).score([image], ["a cat"]).values == [0.0]


def test_an_image_that_no_model_takes_is_an_error():
    """An image of extreme shape has no score and a reason, and the others of its batch have theirs."""
    vlm = Scripted(lambda request: '{"positive": [], "negative": []}')
    images = [PIL.Image.new("RGB", (1, 500)), PIL.Image.new("RGB", (50, 50))]
    scores = NumNegativeAttributesScorer(expert(vlm)).score(images, ["a", "b"])
    assert scores.values == [None, 0.0] and "1 x 500 pixels" in scores.errors[0]


def test_a_function_may_have_no_answer():
    """What a function raises as `ScoringError` is the reason of that image alone; an id twice counts once."""

    def who(image, prompt):
        if prompt == "?":
            raise ScoringError("too dark to tell")
        return ["outline", "ground", "outline"]

    images = [PIL.Image.new("RGB", (8, 8))] * 3
    scores = NumNegativeAttributesScorer(who).score(images, ["a", "?", "b"])
    assert scores.values == [2.0, None, 2.0] and scores.errors == {1: "too dark to tell"}


@pytest.mark.parametrize("answer", [None, "outline", 2, [1, 2]])
def test_a_function_must_return_ids(answer):
    """A function that returns anything but a collection of ids is named, with what it returned."""
    scorer = NumNegativeAttributesScorer(lambda image, prompt: answer)
    with pytest.raises(ValueError, match=r"test_num_negative_attributes.*<lambda> must return the ids") as caught:
        scorer.score([PIL.Image.new("RGB", (8, 8))], ["a"])
    assert str(caught.value).endswith(f"got {answer!r}.")


def test_an_expert_is_asked_for():
    """What cannot be called is no expert."""
    with pytest.raises(ValueError, match="`expert` must be an `AttributeExpert`, or a function .* got 'painting'"):
        NumNegativeAttributesScorer("painting")


def test_the_score_names_what_it_depends_on():
    """Model and revision, prompt, and the tree with its digest, which change with the tree; a function by its name."""
    weights = NumNegativeAttributesScorer(expert(Scripted(None))).weights
    assert weights["scripted"] == "3" and weights["criteria quickstart"].startswith("sha256:")
    other = NumNegativeAttributesScorer(AttributeExpert(Scripted(None), parse_criteria(tiny.CRITERIA, "x"))).weights
    assert list(other) == ["scripted", "prompt of the expert", "criteria tiny"]
    assert other["prompt of the expert"] == weights["prompt of the expert"]
    assert other["criteria tiny"] != weights["criteria quickstart"]
    (name,) = NumNegativeAttributesScorer(looked_at).weights
    assert name.endswith("test_num_negative_attributes.looked_at")


def test_evaluate_loads_it(paintings):
    """The module of `evaluate` gives the drawn numbers, of images in memory too, and that lower is better."""
    metric = evaluate.load(metric_path("num_negative_attributes"), expert=expert())
    images = [PIL.Image.open(io.BytesIO(image["bytes"])) for image in paintings["image"]]
    result = metric.compute(images=images, prompts=list(paintings["prompt"]))
    assert result["scores"] == drawn(paintings) and result["higher_is_better"] is False
    assert result["num_negative_attributes"] == pytest.approx(np.mean(drawn(paintings)))


def test_a_real_model_that_babbles_scores_nothing(tmp_path):
    """What a Qwen2.5-VL of random weights says is no answer: no image has a score, each has a reason."""
    vlm = TransformersVLM(str(tiny_models.tiny_vlm(tmp_path)), max_new_tokens=8, dtype="float32", device="cpu")
    scorer = NumNegativeAttributesScorer(AttributeExpert(vlm, parse_criteria(tiny.CRITERIA, "tiny")))
    scores = scorer.score([tiny.image(seed, 40, 40) for seed in range(3)], ["a cat", "a red dog", "a cow"])
    assert scores.values == [None] * 3
    assert all(reason.startswith("attribute expert, color: ") for reason in scores.errors.values())
    assert scorer.weights[str(tmp_path)] == vlm.revision
