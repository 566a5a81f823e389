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
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel

from ..messages import cut
from .answers import NoAnswer, read_answer, without_thoughts


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
    """
    The model gave no usable text: the server did not answer, the request was refused, or the text was cut off. It is not
    asked again.

    Args:
        reason (`str`):
            Why, on one line.
        raw (`str`, *optional*, defaults to `""`):
            The text, as far as there is one.
    """

    def __init__(self, reason: str, raw: str = ""):
        super().__init__(reason, raw)
        self.raw = raw

    def __str__(self) -> str:
        return self.args[0]


class OutOfQuota(GenerationError):
    """The server answers no more requests until the user pays or waits for long."""


def cut_off(tokens: int, raw: str) -> GenerationError:
    """The error of a text that ended at the largest number of tokens."""
    return GenerationError(f"the answer is cut off after {tokens} tokens: allow more with `--vlm_max_new_tokens`", raw)


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
        """
        Describes the model for the manifest.

        Returns:
            `dict`: everything that an answer depends on besides the request: `model`, `revision`, decoding.
        """


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

    Raises:
        `ValueError`: If the server answers no more requests because a quota is used up.
    """
    texts = vlm.generate(requests)
    answers = [validate(text, request.schema, request.text) for text, request in zip(texts, requests, strict=True)]
    again = [i for i, text in enumerate(texts) if answers[i].error and not isinstance(text, GenerationError)]
    if again:
        retried = vlm.generate([retry(requests[i], answers[i]) for i in again])
        for index, text in zip(again, retried, strict=True):
            answer = validate(text, requests[index].schema, requests[index].text)
            answers[index] = replace(answer, raw=answer.raw or answers[index].raw)
        texts = [*texts, *retried]
    if stop := next((text for text in texts if isinstance(text, OutOfQuota)), None):
        raise ValueError(f"Stopped: {stop}. Once that is settled, the same command continues.")
    return answers


def validate(text: str | GenerationError, schema: type[BaseModel], question: str = "") -> Answer:
    """
    Parses and validates an answer, see [`annotation.answers.read_answer`].

    Args:
        text (`str` or `GenerationError`):
            Output of the model.
        schema (`type[BaseModel]`):
            Schema of the answer.
        question (`str`, *optional*, defaults to `""`):
            Text of the request.

    Returns:
        [`Answer`]
    """
    if isinstance(text, GenerationError):
        return Answer(text.raw, error=str(text))
    try:
        return Answer(text, value=read_answer(text, schema, question))
    except NoAnswer as error:
        return Answer(text, error=str(error))


def retry(request: Request, answer: Answer) -> Request:
    """The request once more, with the beginning of the last answer, without its thoughts, and what is wrong with it."""
    try:
        raw = without_thoughts(answer.raw).strip()[:500]
    except NoAnswer:
        raw = ""
    return replace(request, text=RETRY.format(text=request.text, raw=raw or "(nothing)", error=answer.error))


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
        except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError) as error:
            raise ValueError(
                f"{self.path}: {cut(str(error))}; the variables of this prompt are {', '.join(values)}."
            ) from error


@cache
def shipped_prompt(name: str) -> str:
    return resources.files("trl_diffusion").joinpath("annotation", "prompts", f"{name}.md").read_text(encoding="utf-8")


@cache  # instead of an attribute of the prompt, because a template does not pickle
def compiled(text: str) -> jinja2.Template:
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
