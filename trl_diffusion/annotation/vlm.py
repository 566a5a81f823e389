# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Vision-language models: sends requests and validates the answers.

A model is any object whose `generate` turns requests into raw texts: a model in this process, a model behind an
OpenAI-compatible server, or a program that knows the answers. Every answer is validated with pydantic.
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
    A request to a model.

    Args:
        text (`str`):
            The question. It tells the model to answer with JSON.
        images (`tuple[PIL.Image.Image, ...]`):
            The images of the question, in order.
        schema (`type[BaseModel]`):
            Schema of the answer.
        files (`tuple[bytes | None, ...]`, *optional*):
            For each image, a JPEG file with exactly its pixels, or `None`. Such an image is not encoded again.
    """

    text: str
    images: tuple[PIL.Image.Image, ...]
    schema: type[BaseModel]
    files: tuple[bytes | None, ...] = ()


@dataclass(frozen=True)
class Answer:
    """
    The answer to a request.

    Args:
        raw (`str`):
            The last text of the model.
        value (`BaseModel`, *optional*):
            The validated answer, or `None` if the text is not valid.
        error (`str`, *optional*):
            Why there is no valid answer.
    """

    raw: str
    value: BaseModel | None = None
    error: str | None = None


class GenerationError(Exception):
    """The model returned no text: the server did not answer, or the request was refused."""


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
            `list[str | GenerationError]` of length `B`: for each request, the text or the reason why there is none.
        """

    @abstractmethod
    def describe(self) -> dict:
        """Everything that an answer depends on besides the request (`model`, `revision`, decoding), for the manifest."""


def ask(vlm: VLM, requests: list[Request]) -> list[Answer]:
    """
    Sends requests to a model. If an answer is not valid, sends the request once more, with the answer and the reason.

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
    Parses and validates an answer.

    Args:
        text (`str` or `GenerationError`):
            Output of the model. The JSON object may be inside a code block or other text.
        schema (`type[BaseModel]`):
            Schema of the answer.

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
    """Formats one error from pydantic on one line."""
    place = ".".join(str(part) for part in mistake["loc"])
    return " ".join(f"{place}: {mistake['msg']}".removeprefix(": ").split())


class PromptTemplate:
    """
    A prompt as a Jinja template in a file.

    Args:
        name (`str`):
            Name of a prompt that the package ships: `"planner"`, `"judge"`, `"attribute_expert"`, `"things"`.
        path (`str` or `Path`, *optional*):
            File of a template with the same variables, used instead of the shipped prompt.

    Raises:
        `ValueError`: If the file cannot be read, or is not a template.
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
            raise ValueError(f"{path}, line {error.lineno}: not a valid Jinja template: {error.message}.") from error
        self.path = path

    def describe(self) -> dict:
        return {"sha256": sha256(self.text.encode()).hexdigest()[:16], "text": self.text}

    def render(self, **values) -> str:
        """
        Renders the template.

        Args:
            values:
                Values of the variables.

        Returns:
            `str`: the text of a request.

        Raises:
            `ValueError`: If the template uses an unknown variable.
        """
        try:
            return compiled(self.text).render(values).strip()
        except jinja2.UndefinedError as error:
            raise ValueError(f"{self.path}: {error}; the variables of this prompt are {', '.join(values)}.") from error


@cache
def shipped_prompt(name: str) -> str:
    return resources.files("trl_diffusion").joinpath("annotation", "prompts", f"{name}.md").read_text(encoding="utf-8")


@cache  # instead of an attribute of the prompt, because a template does not pickle
def compiled(text: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
