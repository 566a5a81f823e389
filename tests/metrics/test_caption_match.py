# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import re

import evaluate
import numpy as np
import PIL.Image
import pytest

from tests import tiny
from tests.annotation import tiny_models
from trl_diffusion.annotation.detector import Detection, Detector, TransformersDetector
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.annotation.vlm import VLM, GenerationError
from trl_diffusion.metrics import metric_path
from trl_diffusion.metrics.caption_match import CaptionMatchScorer, VLMThings
from trl_diffusion.metrics.scorer import ScoringError
from trl_diffusion.quickstart import world
from trl_diffusion.quickstart.oracle import SIDES, OracleDetector


COLORS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200)}


class Palette(Detector):
    """A detector that finds a colour if the image has a pixel of it."""

    def __init__(self):
        self.queries = []

    def describe(self):
        return {"model": "palette", "revision": "2", "threshold": 0.25}

    def detect(self, queries):
        self.queries += queries
        return [
            Detection([0.0, 0.0, 1.0, 1.0], 0.9) if (np.asarray(image) == COLORS[thing]).all(-1).any() else None
            for image, thing in queries
        ]


class Reader(VLM):
    """Lists the colours of a prompt or gives scripted answers, and records the requests of each call."""

    def __init__(self, **answers):
        self.answers, self.calls = answers, []

    def describe(self):
        return {"model": "reader", "revision": "7"}

    def generate(self, requests):
        self.calls.append(requests)
        return [self.answer(request.text) for request in requests]

    def answer(self, text):
        for word, answer in self.answers.items():
            if word in text:
                return answer
        return json.dumps({"things": colors([text.splitlines()[2]])[0]})  # the line of the prompt


def colors(prompts: list[str]) -> list[list[str]]:
    """The colours that prompts name, as a plain function."""
    return [re.findall("red|green|blue", prompt) for prompt in prompts]


def stripes(*names: str) -> PIL.Image.Image:
    """An image with a stripe of each colour."""
    image = PIL.Image.new("RGB", (20, 10))
    for place, name in enumerate(names):
        image.paste(COLORS[name], (4 * place, 0, 4 * place + 4, 10))
    return image


@pytest.mark.parametrize(
    "drawn, prompt, share",
    [
        (["red", "green"], "red and green", 1.0),
        (["blue"], "red and green", 0.0),
        (["blue", "green"], "red and green", 0.5),
        (["red", "blue"], "red, green and blue", 2 / 3),
        (["red"], "red, red and blue", 0.5),
    ],
)
@pytest.mark.parametrize("things", [colors, VLMThings(Reader())], ids=["function", "model"])
def test_the_score_is_the_share_that_is_found(things, drawn, prompt, share):
    """The score is one if all objects are found, zero if none is, and a half for one of two; repeated names count
    once."""
    assert CaptionMatchScorer(Palette(), things).score([stripes(*drawn)], [prompt]).values == [share]


def test_the_shapes_of_a_scene_are_found():
    """Rendered scenes score one for their own prompt, a half with one shape removed, and zero with both removed."""
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, defective=(False, False)) for _ in range(6)]

    def shapes(prompts):
        return [
            [f"{side} {color} {kind}" for side, (color, kind) in zip(SIDES, world.parse_prompt(prompt), strict=True)]
            for prompt in prompts
        ]

    images, expected = [], []
    for scene in scenes:
        whole, half, bare = (world.render(scene) for _ in range(3))
        half.paste(world.BACKGROUND, (18, 0, world.SIZE, world.SIZE))
        bare.paste(world.BACKGROUND, (0, 0, world.SIZE, world.SIZE))
        images += [whole, half, bare]
        expected += [1.0, 0.5, 0.0]
    prompts = [scene.prompt for scene in scenes for _ in range(3)]
    assert CaptionMatchScorer(OracleDetector(), shapes).score(images, prompts, batch_size=5).values == expected


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_image_scores_by_itself(batch_size):
    """The score of an image does not depend on order, batch size or errors of other images."""
    images = [stripes("red"), stripes("red", "blue"), stripes(), stripes("green"), stripes("blue")]
    prompts = ["red and blue", "red, green and blue", "a mood", "green", "red"]
    expected = [0.5, 2 / 3, None, 1.0, 0.0]
    order = np.random.default_rng(batch_size).permutation(5)
    scorer = CaptionMatchScorer(Palette(), colors)
    scores = scorer.score([images[i] for i in order], [prompts[i] for i in order], batch_size=batch_size)
    assert scores.values == [expected[i] for i in order]


def test_a_prompt_is_asked_about_once():
    """Objects are extracted once for each distinct prompt, from text alone, across batches and runs."""
    reader = Reader()
    scorer = CaptionMatchScorer(Palette(), VLMThings(reader, max_things=4))
    prompts = ["red", "blue", "red", "green", "blue", "red"]
    scorer.score([stripes("red")] * 6, prompts, batch_size=3)
    assert scorer.score([stripes("blue")] * 2, ["blue", "red"]).values == [1.0, 0.0]
    assert [len(requests) for requests in reader.calls] == [2, 1]
    asked = [request for requests in reader.calls for request in requests]
    assert [request.text.splitlines()[2] for request in asked] == ["red", "blue", "green"]
    assert all(request.images == () and "at most 4" in request.text for request in asked)


def test_a_batch_is_looked_at_at_once():
    """The detector gets all objects of all upright images of a batch in one call, and no images with errors."""
    calls = []

    class Counting(Palette):
        def detect(self, queries):
            calls.append([(image.size, thing) for image, thing in queries])
            return super().detect(queries)

    lying = stripes("red")
    lying.getexif()[0x0112] = 6  # stored on its side
    CaptionMatchScorer(Counting(), colors).score([lying, stripes(), stripes("blue")], ["red and blue", "", "blue"])
    assert calls == [[((10, 20), "red"), ((10, 20), "blue"), ((20, 10), "blue")]]


def test_a_prompt_without_things_has_no_score():
    """A prompt that names no object has no score but a reason, and does not count as zero."""
    for things in (colors, VLMThings(Reader())):
        scores = CaptionMatchScorer(Palette(), things).score([stripes("red")] * 2, ["a mood", "red"])
        assert scores.values == [None, 1.0] and scores.errors == {0: "the prompt names no object to find"}


def test_a_prompt_that_is_not_understood_has_no_score():
    """Without a valid answer of the model, all images of the prompt have a reason, and other prompts have scores."""
    reader = Reader(
        server=GenerationError("the server is out"),
        poem="Red is my favourite.",
        crowd=json.dumps({"things": ["red", "blue", "green"]}),
        blank=json.dumps({"things": [" "]}),
    )
    scorer = CaptionMatchScorer(Palette(), VLMThings(reader, max_things=2))
    prompts = ["server", "red", "poem", "crowd", "blank", "server"]
    scores = scorer.score([stripes("red")] * 6, prompts)
    assert scores.values == [None, 1.0, None, None, None, None]
    assert scores.errors[0] == scores.errors[5] == "things: the server is out"
    assert scores.errors[2] == "things: there is no JSON object in it"
    assert scores.errors[3].startswith("things: things: List should have at most 2 items")
    assert scores.errors[4].startswith("things: things.0: String should have at least 1 character")


def test_a_function_may_not_know():
    """A `ScoringError` instead of a list becomes the reason of the images of that prompt."""

    def things(prompts):
        return [ScoringError("in no language I know") if prompt == "?" else ["red"] for prompt in prompts]

    scores = CaptionMatchScorer(Palette(), things).score([stripes("red")] * 3, ["?", "red", "?"])
    assert scores.values == [None, 1.0, None]
    assert scores.errors == {0: "in no language I know", 2: "in no language I know"}


@pytest.mark.parametrize(
    "answer, message",
    [
        ([["red"]], "it was given 2 prompts and returned 1 lists"),
        (["red", "blue"], "for 'a' it returned 'red'"),
        ([["red"], None], "for 'b' it returned None"),
        ([["red", " "], []], r"for 'a' it returned \['red', ' '\]"),
        ([["red"], [3]], r"for 'b' it returned \[3\]"),
    ],
)
def test_a_function_must_return_lists_of_names(answer, message):
    """A wrong number of lists, or lists of anything but names, raise an error that shows them."""
    with pytest.raises(ValueError, match=message):
        CaptionMatchScorer(Palette(), lambda prompts: answer).score([stripes("red")] * 2, ["a", "b"])


def test_the_score_names_what_it_depends_on():
    """The weights list detector and model with revisions, threshold and prompt; a function is listed by its name."""
    weights = CaptionMatchScorer(Palette(), VLMThings(Reader())).weights
    assert list(weights) == ["palette", "threshold of the detector", "reader", "prompt of the things"]
    assert (weights["palette"], weights["threshold of the detector"], weights["reader"]) == ("2", "0.25", "7")
    assert list(CaptionMatchScorer(OracleDetector(), colors).weights) == ["oracle", f"{__name__}.colors"]


def test_a_prompt_of_ones_own(tmp_path):
    """A user's template replaces the shipped one and changes the hash; the example answers in both are valid."""
    path = tmp_path / "mine.md"
    path.write_text('Things of {{ prompt }}, {{ max_things }}, like {"things": ["oak"]}')
    shipped, mine = VLMThings(Reader()), VLMThings(Reader(), prompt_path=path)
    assert mine.request("a wood").text == 'Things of a wood, 8, like {"things": ["oak"]}'
    assert mine.weights["prompt of the things"] != shipped.weights["prompt of the things"]
    for things in (shipped, mine):
        text = things.request("a wood").text
        for example in re.findall(r"\{.*?\}", text):
            things.schema.model_validate_json(example)
    assert len(re.findall(r"\{.*?\}", shipped.request("a wood").text)) == 2


def test_an_image_that_no_detector_takes_is_an_error():
    """An image with an extreme aspect ratio has no score but a reason, and the others of its batch have scores."""
    scores = CaptionMatchScorer(Palette(), colors).score([PIL.Image.new("RGB", (1, 500)), stripes("red")], ["red"] * 2)
    assert scores.values == [None, 1.0] and "1 x 500 pixels" in scores.errors[0]


def test_evaluate_loads_it():
    """The module of `evaluate` computes the shares for images in memory, with objects extracted by a model."""
    metric = evaluate.load(metric_path("caption_match"), detector=Palette(), things=VLMThings(Reader()))
    images, prompts = [stripes("red"), stripes("red", "blue"), stripes()], ["red and blue", "blue", "a mood"]
    result = metric.compute(images=images, prompts=prompts)
    assert result["scores"] == [0.5, 1.0, None] and result["caption_match"] == 0.75
    assert list(result["errors"]) == [2] and result["higher_is_better"] is True
    assert result["weights"]["reader"] == "7"


def test_real_models_look_and_read(tmp_path):
    """The threshold of Grounding DINO determines the score, in any batch; a random model names no objects."""
    folder = str(tiny_models.tiny_detector(tmp_path / "detector"))
    images = [tiny.image(seed, *[(40, 32), (32, 48)][seed % 2]) for seed in range(4)]
    prompts = ["a cow", "a cow and a tree", "a tree", "a tree and a cow"]

    def animals(prompts):
        return [re.findall("cow|tree", prompt) for prompt in prompts]

    for threshold, expected in ((0.0, 1.0), (0.999, 0.0)):
        scorer = CaptionMatchScorer(TransformersDetector(folder, threshold=threshold, device="cpu"), animals)
        assert scorer.score(images, prompts, batch_size=3).values == [expected] * 4
    # A threshold between the scores, so that some objects are found and others are not
    detector = TransformersDetector(folder, threshold=0.0, device="cpu")
    hits = detector.detect(
        [(image, thing) for image, things in zip(images, animals(prompts), strict=True) for thing in things]
    )
    detector.threshold = float(np.median([hit.score for hit in hits]))
    found = iter(hit.score > detector.threshold for hit in hits)
    expected = [float(np.mean([next(found) for _ in things])) for things in animals(prompts)]
    scores = CaptionMatchScorer(detector, animals).score(images, prompts, batch_size=2).values
    assert scores == expected and 0 < sum(scores) < 4

    vlm = TransformersVLM(str(tiny_models.tiny_vlm(tmp_path / "vlm")), max_new_tokens=8, dtype="float32", device="cpu")
    babbled = CaptionMatchScorer(detector, VLMThings(vlm)).score(images, prompts)
    assert babbled.values == [None] * 4
    assert all(reason.startswith("things: ") for reason in babbled.errors.values())
