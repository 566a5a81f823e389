# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a model thinks is not its answer: from each text comes the right object, or the reason why there is none."""

import json

import pytest
from PIL import Image

from tests.annotation.model_texts import EXAMPLE, QUESTION, TEXTS
from tests.annotation.test_vlm import Scripted
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.judge import Verdict
from trl_diffusion.annotation.planner import Plan, Planner
from trl_diffusion.annotation.records import PairRecord
from trl_diffusion.annotation.vlm import GenerationError, Request, ask, validate


@pytest.mark.parametrize("text, expected", [case[1:] for case in TEXTS], ids=[case[0] for case in TEXTS])
def test_what_comes_out_of_a_text(text, expected):
    """A text gives the labels outside of its thoughts, or a reason on one line, and is kept."""
    answer = validate(text, Plan, QUESTION)
    if isinstance(expected, list):
        assert (answer.value, answer.error) == (Plan(instances=expected), None)
    else:
        assert answer.value is None and expected in answer.error and "\n" not in answer.error
        assert len(answer.error) < 300
    assert answer.raw == text


def test_a_cut_off_text_names_the_flag():
    """Where a longer answer would help, the reason names `--vlm_max_new_tokens`."""
    for text in (
        f"<think>{EXAMPLE}",
        '{"instances": ["do',
        f"<|channel|>analysis<|message|>{EXAMPLE}",
        "<think></think>",
    ):
        assert "`--vlm_max_new_tokens`" in validate(text, Plan, QUESTION).error


def test_answers_that_the_question_names_are_no_examples():
    """The judge's question names both answers within a sentence: each of them counts, with an explanation as well."""
    question = 'Answer with one JSON object: {"better": "A"} or {"better": "B"}.'
    for letter in "AB":
        text = f'I looked at both. The answer is {{"better": "{letter}"}}, since its wheels are round.'
        assert validate(text, Verdict, question).value == Verdict(better=letter)


def test_every_end_of_a_thought_is_an_error():
    """A text with a thought that quotes the example gives nothing, wherever it is cut off before the answer."""
    text = f"<think>They want {EXAMPLE}. I see a dog.</think> The answer: "
    for end in range(len(text) + 1):
        assert validate(text[:end], Plan, QUESTION).value is None


def test_the_second_request_quotes_no_thoughts():
    """What a model is shown of its last answer is what it said, not what it thought."""
    request = Request(QUESTION, (), Plan)
    wrong = f'<think>They want {EXAMPLE}</think>{{"things": []}}'
    vlm = Scripted([wrong, "<think>They want"], ['{"instances": []}'] * 2)
    answers = ask(vlm, [request, request])
    assert [answer.value for answer in answers] == [Plan(instances=[])] * 2
    said, cut = (again.text.removeprefix(QUESTION) for again in vlm.calls[1])
    assert '{"things": []}' in said and "<think>" not in said and "eagle" not in said
    assert "(nothing)" in cut and "<think>" not in cut


def test_an_error_row_keeps_the_text():
    """A pair whose answer is cut off is an error with the reason and the whole text, and is not asked again."""
    raw = f"<think>They want {EXAMPLE}"
    vlm = Scripted([GenerationError("the answer is cut off after 9 tokens", raw)])
    images = [StoredImage.read(Image.new("RGB", (40, 20), color)) for color in ("green", "red")]
    (pair,) = Planner(vlm)([PairRecord("x", "a dog", chosen=images[0], rejected=images[1])])
    assert (pair.status, pair.reason) == ("error", "planner: the answer is cut off after 9 tokens")
    assert pair.to_row()["planner_answer"] == raw and len(vlm.calls) == 1


def test_the_first_text_is_kept_where_the_second_is_missing():
    """If the second request gives no text, the error row has the first one."""
    vlm = Scripted(["I see a dog."], [GenerationError("the server answers 500")])
    (answer,) = ask(vlm, [Request(QUESTION, (), Plan)])
    assert (answer.raw, answer.error) == ("I see a dog.", "the server answers 500")


def test_every_prefix_of_an_answer_is_an_error():
    """Of all beginnings of an answer with text before it, only the whole one is an answer."""
    text = 'So: {"answer": {"instances": ["dog", "a } b"], "why": {"instances": ["cat"]}}}'
    values = [validate(text[:end], Plan, QUESTION).value for end in range(len(text) + 1)]
    assert values[-1] == Plan(instances=["dog", "a } b"])
    assert values[:-1] == [None] * len(text)
    assert json.loads(text.removeprefix("So: "))["answer"]["instances"] == values[-1].instances
