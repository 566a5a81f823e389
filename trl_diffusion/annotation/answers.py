# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Finds the answer in the text of a vision-language model: the one JSON object that stands outside of its thoughts."""

import json
import re
from collections import Counter

from pydantic import BaseModel, ValidationError

from ..messages import cut, shown


# Pairs of marks around thoughts: what opens them, and what closes them
THOUGHTS = (
    *(
        (rf"<{tag}(?:\s[^<>/]*)?>", rf"</{tag}\s*>")
        for tag in (
            *("think", "thinking", "thought", "thoughts", "reason", "reasoning", "reflection", "rationale"),
            *("analysis", "scratchpad", "seed:think"),
        )
    ),
    (r"\[THINK\]", r"\[/THINK\]"),
    ("◁think▷", "◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|channel>thought", r"<channel\|>"),
    ("<unused94>thought", "<unused95>"),
)
MARKS = re.compile(
    r"(?=[<\[◁])(?:"  # which most letters are not
    + "|".join(f"(?P<open{i}>{opening})|(?P<close{i}>{closing})" for i, (opening, closing) in enumerate(THOUGHTS))
    + ")",
    re.IGNORECASE,
)
FINAL_CHANNEL = re.compile(
    r"<\|channel\|>\s*final\b.{0,200}?<\|message\|>(.*?)(?=<\|(?:return|end|start|channel)\|>|\Z)", re.DOTALL
)
PLAIN_CHANNELS = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z{])")  # the same without its special tokens
PLAIN_FINAL = re.compile(r"assistant\s*final(?=\W|[A-Z])")
LONGER = "(`--vlm_max_new_tokens` allows longer answers)"
WORD = re.compile(r"\w")
MOST_OBJECTS = 100  # that are looked at in a text
OPENING = re.compile(r"\{(?=\s*[\"'}])|\[(?=\s*[\[{])")  # where an object, or a list of objects, starts


class NoAnswer(Exception):
    """There is no answer in a text. The message tells why, on one line."""


def read_answer(text: str, schema: type[BaseModel], question: str = "") -> BaseModel:
    """
    Reads an answer. Of answers that differ, none is taken: the last one may be a correction, but as well a quote of the question.

    Args:
        text (`str`):
            Output of the model: a JSON object, which may be in a code block, in other text, in a list, in another object with
            a single key, or in a JSON string. It may be repeated. Thoughts are ignored.
        schema (`type[BaseModel]`):
            Schema of the answer.
        question (`str`, *optional*, defaults to `""`):
            Text of the request. An object that stands on a line of its own there is an example. It is no answer if it is
            quoted with text after it.

    Returns:
        `BaseModel`: the answer.

    Raises:
        [`NoAnswer`]: If there is no answer.
    """
    words = without_thoughts(text)
    if not words.strip():
        raise NoAnswer("the answer is empty" if not text.strip() else f"there are thoughts, but no answer {LONGER}")
    objects = find_objects(words)
    if not objects:
        raise NoAnswer("there is no JSON object in it")
    examples = own_lines(question)
    untagged = re.sub(r"<[^<>]*>", lambda tag: " " * len(tag[0]), words)
    found = [
        unwrapped(item, schema) for item, end in objects if item not in examples or not WORD.search(untagged, end)
    ]
    if not found:
        raise NoAnswer("it only quotes the example of the question")
    answers = [item for item in found if schema.model_fields.keys() & item.keys()] or found
    try:
        values = [schema.model_validate(item) for item in answers]
    except ValidationError as error:
        raise NoAnswer("; ".join(describe_mistake(mistake) for mistake in error.errors()[:3])) from error
    if any(value != values[0] for value in values):
        raise NoAnswer(f"there are {len(values)} answers in it that differ")
    return values[0]


def without_thoughts(text: str) -> str:
    """
    Removes a model's thoughts.

    Args:
        text (`str`):
            Output of the model.

    Returns:
        `str`: what stands outside of thoughts. Before a closing mark without an opening one, everything is a thought, because
            many chat templates write the opening mark themselves.

    Raises:
        [`NoAnswer`]: If the text ends within thoughts.
    """
    if "<|channel|>" in text or PLAIN_CHANNELS.match(text):
        finals = FINAL_CHANNEL.findall(text) if "<|channel|>" in text else PLAIN_FINAL.split(text)[1:]
        if not finals:
            raise NoAnswer(f"it ends within its thoughts {LONGER}")
        return finals[-1]
    kept, place, inside = [], 0, None
    for mark in MARKS.finditer(text):
        number = mark.lastgroup.removeprefix("open").removeprefix("close")
        if mark.lastgroup.startswith("open") and inside is None:
            kept.append(text[place : mark.start()])
            inside = number
        elif mark.lastgroup.startswith("close") and inside in (None, number):
            if inside is None:
                kept = []
            inside, place = None, mark.end()
    if inside is not None:
        raise NoAnswer(f"it ends within its thoughts {LONGER}")
    return "".join((*kept, text[place:]))


def find_objects(text: str) -> list[tuple[dict, int]]:
    """
    Finds the JSON objects in a text.

    Args:
        text (`str`):
            The text.

    Returns:
        `list[tuple[dict, int]]`: the objects that are no parts of other objects, each with the place after it. A list counts
            if it holds only objects.

    Raises:
        [`NoAnswer`]: If an object is not valid JSON. What is inside of it is not looked at.
    """
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, str):
        text = whole
    found, place = [], 0
    while start := OPENING.search(text, place):
        try:
            value, place = DECODER.raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            if not text[error.pos :].strip() or error.msg.startswith("Unterminated string"):
                raise NoAnswer(f"its JSON object is cut off {LONGER}") from error
            raise NoAnswer(f"Invalid JSON: {error.msg} at {text[error.pos : error.pos + 20]!r}") from error
        except ValueError as error:
            raise NoAnswer(f"Invalid JSON: {' '.join(str(error).split())[:100]}") from error
        except RecursionError as error:
            raise NoAnswer("Invalid JSON: it is nested too deeply") from error
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, dict) for item in items):
            found += [(item, place) for item in items]
        if len(found) > MOST_OBJECTS:
            raise NoAnswer(f"there are more than {MOST_OBJECTS} JSON objects in it")
    return found


def unwrapped(item: dict, schema: type[BaseModel]) -> dict:
    """The object inside of objects with a single key that is no field, as an object, a list of one, or a JSON string."""
    for _ in range(3):
        if len(item) != 1 or item.keys() & schema.model_fields.keys():
            break
        (inner,) = item.values()
        if isinstance(inner, str):
            objects = [value for value, _ in find_objects(inner)] if inner.strip().startswith("{") else []
            inner = objects[0] if len(objects) == 1 else inner
        if isinstance(inner, list) and len(inner) == 1:
            (inner,) = inner
        if not isinstance(inner, dict):
            break
        item = inner
    return item


def own_lines(question: str) -> list[dict]:
    """The objects that stand on a line of their own."""
    objects = []
    for line in question.splitlines():
        if line.strip().startswith("{"):
            try:
                objects.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
    return objects


def only_once(pairs: list[tuple[str, object]]) -> dict:
    """An object whose keys differ."""
    item = dict(pairs)
    if len(item) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(Counter(keys).most_common(1)[0][0])} stands twice")
    return item


def no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


DECODER = json.JSONDecoder(object_pairs_hook=only_once, parse_constant=no_number)


def describe_mistake(mistake: dict) -> str:
    """Formats one error from pydantic on one line."""
    place = ".".join(str(part) for part in mistake["loc"])
    return cut(f"{place}: {mistake['msg']}".removeprefix(": "))
