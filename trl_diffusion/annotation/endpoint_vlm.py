# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A vision-language model behind an OpenAI-compatible server, such as vLLM."""

import asyncio
import base64
import json
import os
import random
import re
import tempfile
from asyncio import sleep
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any
from urllib.parse import quote, quote_plus

import httpx2
import PIL.Image
from pydantic import BaseModel

from ..batching import in_threads
from .completions import LARGEST, Failure, Reply, one_line, read_reply
from .vlm import VLM, GenerationError, OutOfQuota, Request


JPEG_QUALITY = 95
LONGEST_WAIT = 60.0  # seconds between two attempts, before the random factor
LONGEST_MESSAGE = 400  # characters of an error, most of which are the server's words
SHORTEST_SECRET = 6  # characters; shorter ones, such as "none" and "EMPTY", stand for no key
MAX_REDIRECTS = 3
WITHOUT_SCHEMA = {400, 415, 422, 501}  # status codes that may mean that the server offers no schemas
OURS = ("model", "messages", "stream", "n")  # parameters that are no matter of taste
KEYS = re.compile(r"api.?key|authorization|password|secret|(?:access|auth|bearer).?token", re.IGNORECASE)


class EndpointVLM(VLM):
    """
    A vision-language model behind a server with OpenAI's chat completions API, decoded at temperature 0. The server's key
    is read from the environment variable `OPENAI_API_KEY`, and is sent to this server only.

    Args:
        base_url (`str`):
            Address of the server, such as `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the model on the server.
        concurrency (`int`, *optional*, defaults to `32`):
            Number of concurrent requests.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that an attempt may take, from connecting to the last byte of the answer.
        max_tries (`int`, *optional*, defaults to `6`):
            Attempts per request before it counts as an error. After a failed attempt, the wait is the time that the
            server asks for, or starts at one second and doubles with each attempt, up to a minute. A random factor of up
            to 1.5 spreads the retries.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Maximum length of an answer in tokens.
        request (`dict[str, Any]`, *optional*):
            Parameters of the request that are added or changed, such as `{"max_tokens": None, "max_completion_tokens":
            512, "temperature": None}`. `None` leaves a parameter out. The defaults are `max_tokens` from `max_new_tokens`,
            `temperature` 0, `seed` 0, and the `response_format` with the schema of the answer.

    Raises:
        `ValueError`: If `base_url` is not an HTTP address, or `request` holds what is not to be changed, a key, or what is
            not JSON.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        concurrency: int = 32,
        timeout: float = 120.0,
        max_tries: int = 6,
        max_new_tokens: int = 512,
        request: dict[str, Any] | None = None,
    ):
        try:
            url = httpx2.URL(base_url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"The server's address {without_key(base_url)!r} is not a valid URL: {error}.") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(
                "The server's address must be like 'http://localhost:8000/v1' or 'https://server/v1', got "
                f"{without_key(base_url)!r}."
            )
        check_request(request or {})
        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_tries = max_tries
        self.max_new_tokens = max_new_tokens
        self.request = request or {}
        # Until a request fails with a schema and succeeds without one
        self.offers_schemas = self.request.get("response_format", {}) is not None
        self.has_used_schemas = False  # whether a request with a schema has been answered

    def describe(self) -> dict:
        described = {
            "model": self.model,
            "revision": "the server's",
            "decoding": "temperature 0, seed 0, response_format json_schema where offered",
            "max_new_tokens": self.max_new_tokens,
            "images": f"JPEG, quality {JPEG_QUALITY} where the file is not one",
        }
        return described | ({"changed_parameters": self.request} if self.request else {})

    def generate(self, requests: list[Request]) -> list[str | GenerationError]:
        images = {id(image): image for request in requests for image in request.images}
        files = {id(image): file for request in requests for image, file in zip(request.images, request.files)}
        encoded = in_threads(lambda key: data_url(images[key], files.get(key)), images)
        return run_async(self.answer_all(requests, dict(zip(images, encoded, strict=True))))

    async def answer_all(self, requests: list[Request], urls: dict[int, str]) -> list[str | GenerationError]:
        """Answers requests, `concurrency` at a time. When a quota is used up, the remaining ones are not sent."""
        server, places = Server(self.base_url, self.timeout), asyncio.Semaphore(self.concurrency)
        stop: OutOfQuota | None = None

        async def answer(request: Request) -> str | GenerationError:
            nonlocal stop
            async with places:
                text = stop or await self.answer(request, urls, server)
            if isinstance(text, OutOfQuota):
                stop = text
            return text

        async with server.client:
            return await asyncio.gather(*map(answer, requests))

    async def answer(self, request: Request, urls: dict[int, str], server: "Server") -> str | GenerationError:
        """Sends one request, with up to `max_tries` attempts. An attempt that shows that there are no schemas is extra."""
        with_schema, fallback, tries = self.offers_schemas, None, 0
        while True:
            result = await server.ask(self.payload(request, urls, with_schema), self.max_new_tokens, request.text)
            if not isinstance(result, Failure):
                self.has_used_schemas |= with_schema
                # Where requests with a schema are answered, one that failed may have failed for another reason
                if fallback and (fallback.names_schema or not self.has_used_schemas):
                    self.offers_schemas = False
                return result
            if with_schema and (result.names_schema or result.status in WITHOUT_SCHEMA):
                with_schema, fallback = False, result
                continue
            tries += 1
            if not result.again:
                return result.error
            if tries >= self.max_tries:
                return type(result.error)(f"{result.error} ({self.max_tries} tries)", result.error.raw)
            if with_schema and result.status == 500 and 1 < tries == self.max_tries - 1 and not self.has_used_schemas:
                with_schema, fallback = False, result  # a server may break at schemas
            wait = 2.0 ** min(tries - 1, 10) if result.wait is None else result.wait
            await sleep(min(wait, LONGEST_WAIT) * random.uniform(1, 1.5))

    def payload(self, request: Request, urls: dict[int, str], with_schema: bool) -> dict[str, Any]:
        """The body of a request."""
        content = [{"type": "image_url", "image_url": {"url": urls[id(image)]}} for image in request.images]
        payload = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": request.text}]}],
            "max_tokens": self.max_new_tokens,
            "temperature": 0.0,
            "seed": 0,
            "response_format": response_format(request.schema),
            **self.request,
        }
        if not with_schema:
            payload["response_format"] = None
        return {name: value for name, value in payload.items() if value is not None}


class Server:
    """
    Sends requests to one server, and to no other. Redirects are followed where they lead to the same server.

    Args:
        base_url (`str`):
            Its address.
        timeout (`float`):
            Seconds that a request may take in all.

    Raises:
        `ValueError`: If `OPENAI_API_KEY` holds what no key holds.
    """

    def __init__(self, base_url: str, timeout: float):
        url, self.timeout = httpx2.URL(base_url), timeout
        key = (os.environ.get("OPENAI_API_KEY") or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError("The environment variable `OPENAI_API_KEY` holds characters that no key has.")
        basic = base64.b64encode(f"{url.username}:{url.password}".encode()).decode() if url.userinfo else ""
        known = {key, url.username, url.password, basic, *(value for _, value in url.params.multi_items())}
        known = {secret for secret in known if len(secret) >= SHORTEST_SECRET}
        self.secrets = sorted(
            {form for secret in known for form in (secret, quote(secret), quote_plus(secret))}, key=len
        )
        path = url.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions" if re.search(r"/(v\d\w*|openai)$", path) else "/v1/chat/completions"
        self.target = url.copy_with(path=path, fragment=None).raw_path
        # The client logs this address, which therefore has no user and no query
        self.url = url.copy_with(path=path, fragment=None, query=None, userinfo=b"")
        self.headers = {
            "Authorization": f"Basic {basic}" if basic else f"Bearer {key or 'none'}",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
        }
        self.client = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=None))

    async def ask(
        self, payload: dict[str, Any], max_new_tokens: int, question: str
    ) -> str | GenerationError | Failure:
        """Makes one attempt. Whatever the server does, nothing is raised, and no key is in the result."""
        try:
            async with asyncio.timeout(self.timeout):
                reply = await self.post(json.dumps(payload).encode())
        except TimeoutError:
            within = f"within {self.timeout:g} seconds (`--vlm_timeout` allows more)"
            reply = Failure(GenerationError(f"the server does not answer {within}"), again=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            problem = one_line(f"the server does not answer: {type(error).__name__} {error}")
            reply = Failure(GenerationError(problem), again=True)
        result = read_reply(reply, max_new_tokens, question) if isinstance(reply, Reply) else reply
        if isinstance(result, str):
            return self.hidden(result)
        error = result.error if isinstance(result, Failure) else result
        error = type(error)(shortened(self.hidden(str(error))), self.hidden(error.raw))
        return replace(result, error=error) if isinstance(result, Failure) else error

    async def post(self, content: bytes) -> Reply | Failure:
        """Sends a request."""
        url, target = self.url, self.target
        for _ in range(MAX_REDIRECTS):
            request = self.client.build_request(
                "POST", url, content=content, headers=self.headers, extensions={"target": target}
            )
            response = await self.client.send(request, stream=True)
            try:
                if response.next_request is None:
                    return await read_body(response)
                there = response.next_request.url
                if response.status_code not in (307, 308) or origin(there) != origin(url):
                    problem = f"the server redirects to {there}: name that address with `--vlm_base_url`"
                    return Failure(GenerationError(problem))
                url, target = there.copy_with(query=None, userinfo=b""), there.raw_path
            finally:
                await response.aclose()
        return Failure(GenerationError("the server redirects in circles"))

    def hidden(self, text: str) -> str:
        """A text without keys and passwords."""
        for secret in reversed(self.secrets):
            text = text.replace(secret, "***")
        return text


async def read_body(response: httpx2.Response) -> Reply | Failure:
    """Reads a response, unless it is too large. It is not decompressed yet, because a small one may become very large."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > LARGEST:
            return Failure(GenerationError(f"the server's answer is larger than {LARGEST // 2**20} MiB"))
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, bytes(body))


def origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    """What makes two addresses the same server."""
    return url.scheme, url.host, url.port


def shortened(text: str) -> str:
    """A message, without what is beyond its longest length."""
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def without_key(url: str) -> str:
    """An address for a message: without user, password and query."""
    return re.sub(r"\?.*", "?***", re.sub(r"//.*@", "//***@", url))


def check_request(request: dict[str, Any]) -> None:
    """
    Checks parameters of requests.

    Args:
        request (`dict[str, Any]`):
            The parameters.

    Raises:
        `ValueError`: If they are not JSON, or hold a key or a parameter that is not to be changed.
    """
    example = 'such as `\'{"max_tokens": null, "max_completion_tokens": 512}\'`'
    try:
        text = json.dumps(request, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"`--vlm_request` must be a JSON object, {example}: {error}.") from error
    if not isinstance(request, dict):
        raise ValueError(f"`--vlm_request` must be a JSON object, {example}, got {text[:100]}.")
    if ours := [name for name in OURS if name in request]:
        raise ValueError(f"`--vlm_request` cannot change {', '.join(ours)}.")
    key = os.environ.get("OPENAI_API_KEY") or ""
    if KEYS.search(text) or (len(key) >= SHORTEST_SECRET and key in text):
        raise ValueError(
            "`--vlm_request` holds a key, and it is written to the manifest: set the environment variable `OPENAI_API_KEY` "
            "instead."
        )


def run_async(coroutine: Coroutine[Any, Any, list]) -> list:
    """Runs a coroutine, in a thread of its own where this thread runs one already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@cache
def response_format(schema: type[BaseModel]) -> dict:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema.model_json_schema(), "strict": True},
    }


def data_url(image: PIL.Image.Image, file: bytes | None = None) -> str:
    """An image as a data URL, from its own JPEG file if it has one."""
    if file is None:
        # PIL releases the global interpreter lock only when it writes to a file on disk
        with tempfile.TemporaryFile() as written:
            image.save(written, format="JPEG", quality=JPEG_QUALITY)
            written.seek(0)
            file = written.read()
    return f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"
