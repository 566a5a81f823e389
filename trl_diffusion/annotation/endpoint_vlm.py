# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A vision-language model behind an OpenAI-compatible server, such as vLLM."""

import base64
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property

import httpx2
import PIL.Image
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status
from pydantic import BaseModel

from ..batching import in_threads
from .vlm import VLM, GenerationError, Request


JPEG_QUALITY = 95
LONGEST_WAIT = 60.0  # seconds between two attempts, before the random factor
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # status codes after which the server may answer a retry


class EndpointVLM(VLM):
    """
    A vision-language model behind a server with OpenAI's chat completions API, decoded at temperature 0.

    Args:
        base_url (`str`):
            Address of the server, such as `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the model on the server.
        concurrency (`int`, *optional*, defaults to `32`):
            Number of concurrent requests.
        timeout (`float`, *optional*, defaults to `120.0`):
            Timeout of a request in seconds.
        max_tries (`int`, *optional*, defaults to `6`):
            Attempts per request before it counts as an error. After a failed attempt, the wait is the time that the
            server asks for, or starts at one second and doubles with each attempt. A random factor of up to 1.5
            spreads the retries.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Maximum length of an answer in tokens.

    Raises:
        `ValueError`: If `base_url` is not an HTTP address.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        concurrency: int = 32,
        timeout: float = 120.0,
        max_tries: int = 6,
        max_new_tokens: int = 512,
    ):
        try:
            url = httpx2.URL(base_url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"The server's address {base_url!r} is not a valid URL: {error}.") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(
                f"The server's address must be like 'http://localhost:8000/v1' or 'https://server/v1', got {base_url!r}."
            )
        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_tries = max_tries
        self.max_new_tokens = max_new_tokens
        self.offers_schemas = True  # until a request fails with a schema and succeeds without one

    def describe(self) -> dict:
        return {
            "model": self.model,
            "revision": "the server's",
            "decoding": "temperature 0, seed 0, response_format json_schema where offered",
            "max_new_tokens": self.max_new_tokens,
            "images": f"JPEG, quality {JPEG_QUALITY} where the file is not one",
        }

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "client"}  # connections do not pickle

    @cached_property
    def client(self) -> InferenceClient:
        # Without a key, or with an empty one, the client would send the user's Hub token to any server.
        return ChatClient(
            base_url=self.base_url, timeout=self.timeout, api_key=os.environ.get("OPENAI_API_KEY") or "none"
        )

    def generate(self, requests: list[Request]) -> list[str | GenerationError]:
        images = {id(image): image for request in requests for image in request.images}
        files = {id(image): file for request in requests for image, file in zip(request.images, request.files)}
        encoded = in_threads(lambda key: data_url(images[key], files.get(key)), images)
        urls = dict(zip(images, encoded, strict=True))
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda request: self.answer(request, urls, self.offers_schemas), requests))

    def answer(self, request: Request, urls: dict[int, str], with_schema: bool) -> str | GenerationError:
        """Sends one request, with up to `max_tries` attempts."""
        content = [{"type": "image_url", "image_url": {"url": urls[id(image)]}} for image in request.images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": request.text}]}]
        problem = ""
        for attempt in range(self.max_tries):
            try:
                completion = self.client.chat_completion(
                    messages,
                    model=self.model,
                    max_tokens=self.max_new_tokens,
                    temperature=0.0,
                    seed=0,
                    response_format=response_format(request.schema) if with_schema else None,
                )
                text = completion.choices[0].message.content or ""
                self.offers_schemas = self.offers_schemas and with_schema
                return text
            except HfHubHTTPError as error:
                status = error.response.status_code
                problem = f"the server answers {status}: {' '.join(error.response.text.split())[:200]}"
                if status in (400, 422) and with_schema:  # the server may not support schemas: retry without one
                    return self.answer(request, urls, with_schema=False)
                if status not in TRY_AGAIN:
                    return GenerationError(problem)
                wait = seconds_asked_for(error)
            except httpx2.RequestError as error:
                problem, wait = f"the server does not answer: {type(error).__name__} {error}".strip(), None
            except (ValueError, TypeError, LookupError, AttributeError):  # what parsing raises
                problem, wait = "the server's answer is not a chat completion", None
            if attempt + 1 < self.max_tries:
                time.sleep(min(2**attempt if wait is None else wait, LONGEST_WAIT) * random.uniform(1, 1.5))
        return GenerationError(f"{problem} ({self.max_tries} tries)")


class ChatClient(InferenceClient):
    """
    `InferenceClient` with two changes. It sends a JSON schema in OpenAI's format, not in that of an older server. And
    it opens its own connections: those shared with the Hub are limited to a hundred, and refuse every server, even
    localhost, when HF_HUB_OFFLINE is set.
    """

    @cached_property
    def connections(self) -> httpx2.Client:
        return httpx2.Client(timeout=self.timeout, limits=httpx2.Limits(max_connections=None), follow_redirects=True)

    def _inner_post(self, request_parameters, *, stream=False):
        payload = request_parameters.json
        if "value" in payload.get("response_format", {}):
            schema = payload["response_format"]["value"]
            payload["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
        response = self.connections.post(request_parameters.url, json=payload, headers=request_parameters.headers)
        hf_raise_for_status(response)
        return response.content


@cache
def response_format(schema: type[BaseModel]) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema.model_json_schema()}}


def data_url(image: PIL.Image.Image, file: bytes | None = None) -> str:
    """An image as a data URL, from its own JPEG file if it has one."""
    if file is None:
        # PIL releases the global interpreter lock only when it writes to a file on disk
        with tempfile.TemporaryFile() as written:
            image.save(written, format="JPEG", quality=JPEG_QUALITY)
            written.seek(0)
            file = written.read()
    return f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"


def seconds_asked_for(error: HfHubHTTPError) -> float | None:
    """The wait in seconds that the server asks for, if any."""
    asked = error.response.headers.get("retry-after", "")
    return float(asked) if asked.isdecimal() else None
