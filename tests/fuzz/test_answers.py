# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Answers of models: any text, also of the length that a server may send, becomes an answer or a reason on one line."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.annotation.model_texts import QUESTION, TEXTS
from tests.fuzz.strategies import CONTROL, NASTY_TEXTS, few, json_values, many, texts, within
from trl_diffusion import Criteria
from trl_diffusion.annotation.attribute_expert import AttributeExpert
from trl_diffusion.annotation.completions import LARGEST
from trl_diffusion.annotation.judge import Verdict
from trl_diffusion.annotation.planner import MOST_LABELS, Plan
from trl_diffusion.annotation.vlm import PromptTemplate, Request, retry, validate


PAINTING = Criteria.load("painting")
DIMENSION = AttributeExpert(None, PAINTING).schema(PAINTING.dimensions[0])
IDS = [attribute.id for attribute in PAINTING.select(PAINTING.dimensions[0])]
SCHEMAS = (Plan, Verdict, DIMENSION)
PIECES = (
    *(
        "<think>",
        "</think>",
        "<thinking a=1>",
        "[THINK]",
        "[/THINK]",
        "◁think▷",
        "<|channel|>final<|message|>",
        "<|channel|>analysis",
    ),
    *(
        "<|end|>",
        "<|return|>",
        "assistantfinal",
        "analysisWe",
        "```json\n",
        "```",
        "{",
        "}",
        "[",
        "]",
        '"',
        ":",
        ",",
        "\\",
        "\\u0000",
    ),
    *(
        '{"instances": ["dog"]}',
        '{"better": "A"}',
        '{"better": "B"}',
        '{"positive": [], "negative": []}',
        '{"instances": 5}',
        "null",
    ),
    *(
        "NaN",
        "Infinity",
        "1e999",
        "9" * 5000,
        '{"a": 1, "a": 2}',
        '"{\\"better\\": \\"A\\"}"',
        '{"answer": {"better": "A"}}',
        "\\ud800",
    ),
)
answers = st.one_of(
    st.lists(st.one_of(st.sampled_from(PIECES), texts), max_size=8).map("".join),
    json_values.map(lambda value: json.dumps(value)),
    st.dictionaries(
        st.sampled_from(["instances", "better", "positive", "negative", "x"]), json_values, max_size=3
    ).map(json.dumps),
    st.fixed_dictionaries({"instances": st.lists(texts, max_size=5)}).map(json.dumps),
    st.fixed_dictionaries({"instances": st.lists(texts, max_size=5)}).map(
        lambda value: json.dumps(value, ensure_ascii=False)
    ),
)


def any_answer(text: str, question: str = QUESTION) -> None:
    for schema in SCHEMAS:
        with within():
            answer = validate(text, schema, question)
        assert (answer.value is None) != (answer.error is None)
        if answer.error:
            assert "\n" not in answer.error and not CONTROL.search(answer.error) and len(answer.error) < 1000
            with within():
                assert len(retry(Request(question, (), schema), answer).text) < len(question) + 2000
        elif schema is Plan:
            assert all(label and not CONTROL.search(label) and "\n" not in label for label in answer.value.instances)
        elif schema is DIMENSION:
            assert {*answer.value.positive, *answer.value.negative} <= set(IDS)


@few(200)
@given(answers)
@example('{"instances": ["\\ud800"]}')  # half a character, which no detector reads
@example('{"instances": ["dog\\u001b[2J"]}')
@example('{"instances": ["a\\u202eb"]}')
@example('{"instances": ["\\u0000"]}')
@example('{"instances": ["two\\nlines"]}')
def test_any_answer(text):
    """Any text is an answer or a reason that can be printed; labels are one line."""
    any_answer(text)


@pytest.mark.slow
@many(5000)
@given(answers)
def test_many_answers(text):
    """Any text is an answer or a reason that can be printed; labels are one line."""
    any_answer(text)


@few(60)
@given(st.sampled_from([case[1] for case in TEXTS]), texts, texts)
def test_any_question(text, before, after):
    """A hostile prompt within the question changes no answer into an error of the program."""
    any_answer(text, f"{before}\n{QUESTION}\n{after}")


EXAMPLE = '{"instances": ["eagle", "red car"]}\n'
LONG = {
    "channels": "<|channel|> final",  # took hours, as did the next ones
    "examples": EXAMPLE,
    "thoughts": "a<think></think>",
    "open thoughts": "<think ",
    "ends of thoughts": "</think>",
    "messages": "<|channel|>final<|message|>",
    "objects": '{"a": 1} ',
    "empty objects": "{} ",
    "lists": "[[1]] ",
    "open objects": '{"a": ',
    "open lists": "[ ",
    "braces": "{ ",
    "strings": '"',
    "backslashes": "\\",
    "spaces": " ",
    "tags": "<a ",
    "plain": "analysis final assistant final ",
}


@pytest.mark.parametrize("name", LONG)
def test_the_longest_answers(name):
    """A text of an eighth of what a server may send takes a second, whatever is repeated in it."""
    text = (LONG[name] * LARGEST)[: LARGEST // 8]  # the time is linear
    for each in (text, '{"instances": ["dog"]}' + text):
        with within():
            validate(each, Plan, EXAMPLE * 100)


def test_a_list_without_end():
    """An answer that lists thousands of instances or the same attribute thousands of times is refused within a second."""
    with within():
        assert f"more than {MOST_LABELS}" in validate(json.dumps({"instances": ["a"] * 500_000}), Plan).error
        text = json.dumps({"positive": [IDS[0]] * 100_000, "negative": []})
        assert "stand more than once" in validate(text, DIMENSION).error


@pytest.mark.parametrize("depth", [100, 900, 980, 990, 995, 1000, 5000, 10_000, 100_000])
def test_deep_answers(depth):
    """However deep an answer is, there is a reason."""
    for start, end in (("[", "]"), ('{"a": ', "}"), ('{"better": ', "}"), ('[{"a": ', "}]")):
        any_answer(start * depth + "1" + end * depth)
        any_answer(start * depth)


@pytest.mark.parametrize("text", NASTY_TEXTS, ids=range(len(NASTY_TEXTS)))
@pytest.mark.parametrize("name", ["planner", "judge", "attribute_expert"])
def test_a_prompt_is_no_template(name, text):
    """What stands in a prompt or a label is not evaluated."""
    values = {
        "prompt": text,
        "label": text,
        "max_instances": 5,
        "dimension": text,
        "attributes": PAINTING.attributes[:1],
    }
    assert text.strip() in PromptTemplate(name).render(**values)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self._TemplateReference__context.environment }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 1 // 0 }}",
        "{{ missing }}",
        "{{ prompt | nofilter }}",
        "{{ prompt.x.y }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ prompt + 5 }}",
        "{{ [][1] }}",
        "\x1b[2J{% if %}",
    ],
)
def test_a_template_runs_no_code(tmp_path, template):
    """A prompt file of a stranger reaches nothing of the program, and every mistake in it is a `ValueError`."""
    (tmp_path / "prompt.md").write_text(template)
    with pytest.raises(ValueError, match=r"prompt\.md") as caught:
        PromptTemplate("planner", tmp_path / "prompt.md").render(prompt="x", max_instances=5)
    assert not CONTROL.search(str(caught.value))
