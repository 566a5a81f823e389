# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Reads what a server with OpenAI's chat completions API replies. Whatever it is, it becomes a text or a [`Failure`]."""

import json
import math
import re
import time
import zlib
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from .vlm import GenerationError, OutOfQuota, cut_off


LARGEST = 4 * 2**20  # bytes of a reply
TRY_AGAIN = {408, 409, 425, 429}  # and all from 500 on but 501
NOT_THE_SCHEMA = {401, 402, 403, 408, 413, 429}  # the server may quote the request, but says something else
CUT_OFF = {"length", "max_tokens", "model_length"}
FILTERED = re.compile(
    r"content.?filter|content.?policy|content_management|data_inspection|moderation|safety", re.IGNORECASE
)
ABOUT_SCHEMA = re.compile(r"response.?format|schema|structured.?output|guided|grammar|json.?mode", re.IGNORECASE)
ABOUT_PARAMETERS = re.compile(r"parameter|max_tokens|max_completion_tokens|temperature|seed", re.IGNORECASE)
OUT_OF_QUOTA = re.compile(
    r"billing|quota|(?:insufficient|out of|no|low|more) (?:\w+ )?(?:balance|credits?|funds)", re.IGNORECASE
)
INSUFFICIENT = re.compile("insufficient_quota")


@dataclass(frozen=True)
class Reply:
    """
    A server's reply.

    Args:
        status (`int`):
            Status code.
        headers (`dict[str, str]`):
            Headers, with names in lower case.
        body (`bytes`):
            The body as it was sent.
    """

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Failure:
    """
    A failed attempt.

    Args:
        error (`GenerationError`):
            What went wrong.
        again (`bool`, *optional*, defaults to `False`):
            Whether the server may answer the same request later.
        wait (`float`, *optional*):
            Seconds that the server asks to wait.
        status (`int`, *optional*, defaults to `0`):
            Status code of the reply.
        names_schema (`bool`, *optional*, defaults to `False`):
            Whether the server's words are about the schema of the answer.
    """

    error: GenerationError
    again: bool = False
    wait: float | None = None
    status: int = 0
    names_schema: bool = False


def read_reply(reply: Reply, max_new_tokens: int, question: str = "") -> str | GenerationError | Failure:
    """
    Reads a reply.

    Args:
        reply ([`Reply`]):
            The reply.
        max_new_tokens (`int`):
            The largest length of an answer, for the message.
        question (`str`, *optional*, defaults to `""`):
            Text of the request, which a server may quote: its words say nothing about the server.

    Returns:
        `str | GenerationError | Failure`: the text of the model, or why it gave none, or why there is no completion.
    """
    try:
        body = json.loads(decompressed(reply))
    except (ValueError, RecursionError, zlib.error):  # also of numbers with too many digits
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    status = reply.status
    if error and 200 <= status < 300:  # as some routers do
        code = error.get("code") if isinstance(error, dict) else None
        status = code if type(code) is int and 400 <= code < 600 else 500
    said = words(reply, body)
    if 200 <= status < 300:
        choice = first_choice(body)
        if choice is None:
            return Failure(GenerationError(f"the server's answer is not a chat completion{said}"), again=True)
        return read_choice(choice, max_new_tokens)
    if FILTERED.search(said) and 400 <= status < 500:
        return Failure(GenerationError(f"a content filter of the server refuses the request: {status}{said}"))
    wait = seconds_asked_for(reply.headers.get("retry-after"))
    if is_out_of_quota(status, said, wait, question):
        return Failure(OutOfQuota(f"the server answers {status}, its quota is used up{said}"), status=status)
    again = status in TRY_AGAIN or (status >= 500 and status != HTTPStatus.NOT_IMPLEMENTED)
    names_schema = status not in NOT_THE_SCHEMA and speaks_of(ABOUT_SCHEMA, said, question)
    hint = ""
    if status in (400, 422) and ABOUT_PARAMETERS.search(said):
        hint = " (`--vlm_request` changes or leaves out parameters)"
    return Failure(GenerationError(f"the server answers {status}{hint}{said}"), again, wait, status, names_schema)


def first_choice(body: Any) -> dict | None:
    """The first choice of a chat completion, `None` if it is none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    is_text = isinstance(message, dict) and isinstance(message.get("content"), str | list | None)
    return choice if is_text else None


def read_choice(choice: dict, max_new_tokens: int) -> str | GenerationError | Failure:
    """Reads a choice, see [`annotation.completions.read_reply`]. Fields with thoughts are no part of the answer."""
    message, reason = choice["message"], choice.get("finish_reason")
    text, refusal = text_of(message.get("content"))
    refusal = clean(message["refusal"]) if isinstance(message.get("refusal"), str) else refusal
    if refusal.strip():
        return GenerationError(f"the model refuses: {one_line(refusal)}", text or refusal)
    if reason in ("error", "abort"):
        said = f": {one_line(json.dumps(choice['error'], ensure_ascii=False))}" if choice.get("error") else ""
        return Failure(GenerationError(f"the server broke off its answer{said}", text), again=True)
    if isinstance(reason, str) and FILTERED.search(reason):
        return GenerationError("a content filter of the server stopped the answer", text)
    if isinstance(reason, str) and reason.lower() in CUT_OFF:
        return cut_off(max_new_tokens, text)
    if not text.strip() and message.get("tool_calls"):
        return GenerationError("the model calls a tool instead of answering")
    if not text.strip() and (message.get("reasoning_content") or message.get("reasoning")):
        return GenerationError("there are thoughts, but no answer: allow more tokens with `--vlm_max_new_tokens`")
    return text


def text_of(content: str | list | None) -> tuple[str, str]:
    """The text of a message, whose parts may be listed, and its refusal. Other parts, such as thoughts, are left out."""
    texts, refusals = [], []
    for part in content if isinstance(content, list) else [content]:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(clean(part["text"]))
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            refusals.append(clean(part["refusal"]))
    return "".join(texts), "".join(refusals)


def clean(text: str) -> str:
    """A text that can be written: single surrogates, which are no characters, become question marks."""
    return text.encode("utf-8", "replace").decode()


def decompressed(reply: Reply) -> bytes:
    """The body of a reply, at most `LARGEST` bytes of it."""
    encoding = reply.headers.get("content-encoding", "identity").lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=47).decompress(reply.body, LARGEST)
    if encoding not in ("identity", ""):
        raise ValueError(f"nobody asked for {encoding}")
    return reply.body


def words(reply: Reply, body: Any) -> str:
    """The words of a server for a message, after a colon: `body` without escapes if it is JSON, else the text."""
    if body is None:
        try:
            text = decompressed(reply).decode("utf-8", "replace")
        except (ValueError, zlib.error) as error:
            text = str(error)
    else:
        text = json.dumps(body, ensure_ascii=False)
    text = one_line(text)
    return f": {text}" if text else ""


def one_line(text: str) -> str:
    """A text on one line, without control characters."""
    line = " ".join(clean(text[:100_000]).split())
    return "".join(letter for letter in line if letter.isprintable())


def speaks_of(subject: re.Pattern, said: str, question: str) -> bool:
    """Whether a server's words are about something, unless the request's words are as well and may be quoted."""
    return bool(subject.search(said)) and not subject.search(question)


def is_out_of_quota(status: int, said: str, wait: float | None, question: str) -> bool:
    """Whether a reply means that nothing will be answered before the user pays."""
    if status == HTTPStatus.PAYMENT_REQUIRED or speaks_of(INSUFFICIENT, said, question):
        return True
    limits_rate = status == HTTPStatus.TOO_MANY_REQUESTS and wait is not None
    return (
        status in (HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
        and not limits_rate
        and speaks_of(OUT_OF_QUOTA, said, question)
    )


def seconds_asked_for(retry_after: str | None) -> float | None:
    """The wait in seconds that a header asks for, as a number or as a date, `None` if it asks for none."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return max(0.0, seconds) if not math.isnan(seconds) else None
