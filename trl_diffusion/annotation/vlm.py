# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Vision-language models: requests in, validated answers out.

A model is anything with `generate`, from requests to raw texts: one in this process, one behind an OpenAI-compatible
server, or a program that knows the answers. What it says is worth nothing until pydantic has validated it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path

import jinja2
import PIL.Image
from pydantic import BaseModel, ValidationError


RETRY = """{text}

Your last answer was:
{raw}

It could not be used: {error}
Answer again, with one JSON object and nothing else."""


@dataclass(frozen=True)
class Request:
    """
    What a model is asked.

    Args:
        text (`str`):
            The question. It tells the model to answer with JSON.
        images (`tuple[PIL.Image.Image, ...]`):
            The images that it is about, in their order.
        schema (`type[BaseModel]`):
            What the answer must validate as.
        files (`tuple[bytes | None, ...]`, *optional*):
            Of each image the JPEG file that shows just this, where there is one: it need not be encoded again.
    """

    text: str
    images: tuple[PIL.Image.Image, ...]
    schema: type[BaseModel]
    files: tuple[bytes | None, ...] = ()


@dataclass(frozen=True)
class Answer:
    """
    What came of a request.

    Args:
        raw (`str`):
            The last text of the model.
        value (`BaseModel`, *optional*):
            The validated answer; `None` where there is none.
        error (`str`, *optional*):
            Why there is none.
    """

    raw: str
    value: BaseModel | None = None
    error: str | None = None


class GenerationError(Exception):
    """A model gave no text at all: the server did not answer, or refused."""


class VLM(ABC):
    """A model that answers questions about images."""

    @abstractmethod
    def generate(self, requests: list[Request]) -> list[str | GenerationError]:
        """
        Answers requests.

        Args:
            requests (`list[Request]` of length `B`):
                The requests.

        Returns:
            `list[str | GenerationError]` of length `B`: the texts, or why there is none, in the order of the requests.
        """

    @abstractmethod
    def describe(self) -> dict:
        """What an answer depends on besides the request: `model`, `revision`, decoding parameters. For the manifest."""


def ask(vlm: VLM, requests: list[Request]) -> list[Answer]:
    """
    Asks a model, and once more wherever its answer does not validate, with the reason.

    Args:
        vlm ([`VLM`]):
            The model.
        requests (`list[Request]` of length `B`):
            The requests.

    Returns:
        `list[Answer]` of length `B`.
    """
    answers = [validate(text, request.schema) for text, request in zip(vlm.generate(requests), requests, strict=True)]
    again = [index for index, answer in enumerate(answers) if answer.error and answer.raw]
    if again:
        retries = [
            replace(
                requests[i], text=RETRY.format(text=requests[i].text, raw=answers[i].raw[:500], error=answers[i].error)
            )
            for i in again
        ]
        for index, text in zip(again, vlm.generate(retries), strict=True):
            answer = validate(text, requests[index].schema)
            answers[index] = replace(answer, raw=answer.raw or answers[index].raw)
    return answers


def validate(text: str | GenerationError, schema: type[BaseModel]) -> Answer:
    """
    Reads an answer.

    Args:
        text (`str` or `GenerationError`):
            What the model gave. JSON may stand in a code block or between other words.
        schema (`type[BaseModel]`):
            What it must validate as.

    Returns:
        [`Answer`]
    """
    if isinstance(text, GenerationError):
        return Answer("", error=str(text))
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        return Answer(text or " ", error="there is no JSON object in it")
    try:
        return Answer(text, value=schema.model_validate_json(text[start : end + 1]))
    except ValidationError as error:
        return Answer(text, error="; ".join(describe_mistake(mistake) for mistake in error.errors()[:3]))


def describe_mistake(mistake: dict) -> str:
    """One mistake that pydantic found, on one line."""
    place = ".".join(str(part) for part in mistake["loc"])
    return " ".join(f"{place}: {mistake['msg']}".removeprefix(": ").split())


class PromptTemplate:
    """
    A prompt in a file, with places for what differs from row to row.

    Args:
        name (`str`):
            Name of a prompt that the package ships: `"planner"`, `"judge"`, `"attribute_expert"`, `"things"`.
        path (`str` or `Path`, *optional*):
            A file to take in its place, a Jinja template with the same places.

    Raises:
        `ValueError`: If there is no such file, or it is no template.
    """

    def __init__(self, name: str, path: str | Path | None = None):
        if path is None:
            self.text = shipped_prompt(name)
        else:
            try:
                self.text = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"The prompt of the {name.replace('_', ' ')} cannot be read: {error}.") from error
        try:
            compiled(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{path}, line {error.lineno}: this is no Jinja template: {error.message}.") from error
        self.path = path

    def describe(self) -> dict:
        return {"sha256": sha256(self.text.encode()).hexdigest()[:16], "text": self.text}

    def render(self, **values) -> str:
        """
        Fills the places in.

        Args:
            values:
                What stands in each place.

        Returns:
            `str`: the text of a request.

        Raises:
            `ValueError`: If the template has a place that nothing is known for.
        """
        try:
            return compiled(self.text).render(values).strip()
        except jinja2.UndefinedError as error:
            raise ValueError(f"{self.path}: {error}; the places of this prompt are {', '.join(values)}.") from error


@cache
def shipped_prompt(name: str) -> str:
    return resources.files("trl_diffusion").joinpath("annotation", "prompts", f"{name}.md").read_text(encoding="utf-8")


@cache  # and not kept in the prompt: a template does not pickle
def compiled(text: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
