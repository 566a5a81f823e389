# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A vision-language model behind an OpenAI-compatible server, such as vLLM."""

import base64
import io
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import httpx2
import PIL.Image
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError

from .vlm import VLM, GenerationError, Request


JPEG_QUALITY = 95
LONGEST_WAIT = 60.0  # seconds between two tries
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # status codes of a server that may yet answer


class EndpointVLM(VLM):
    """
    A vision-language model that a server offers through OpenAI's chat completions, decoded at temperature 0.

    Args:
        base_url (`str`):
            The server, such as `"http://localhost:8000/v1"`.
        model (`str`):
            The model's name there.
        concurrency (`int`, *optional*, defaults to `32`):
            Requests that are under way at once.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that a request may take.
        max_tries (`int`, *optional*, defaults to `6`):
            How often a request is made before it counts as an error. Between tries of a server that is busy, out of order
            or silent, the wait doubles from a second, or is what the server asks for.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            An answer's longest length in tokens.
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
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The server's address must start with http:// or https://, got {base_url!r}.")
        self.base_url = base_url
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_tries = max_tries
        self.max_new_tokens = max_new_tokens
        self.offers_schemas = True  # until a request succeeds that failed with one

    def describe(self) -> dict:
        return {
            "model": self.model,
            "revision": "the server's",
            "server": self.base_url,
            "decoding": "temperature 0, seed 0, response_format json_schema where offered",
            "max_new_tokens": self.max_new_tokens,
            "images": f"JPEG, quality {JPEG_QUALITY}",
        }

    @cached_property
    def client(self) -> InferenceClient:
        # Without a key of its own the client would send the user's Hub token to any server.
        return ChatClient(
            base_url=self.base_url, timeout=self.timeout, api_key=os.environ.get("OPENAI_API_KEY", "none")
        )

    def generate(self, requests: list[Request]) -> list[str | GenerationError]:
        images = {id(image): image for request in requests for image in request.images}
        with ThreadPoolExecutor(self.concurrency) as pool:
            urls = dict(zip(images, pool.map(data_url, images.values()), strict=True))
            return list(pool.map(lambda request: self.answer(request, urls), requests))

    def answer(self, request: Request, urls: dict[int, str]) -> str | GenerationError:
        """Makes one request, as often as it takes."""
        content = [{"type": "image_url", "image_url": {"url": urls[id(image)]}} for image in request.images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": request.text}]}]
        problem, with_schema = "", self.offers_schemas
        for attempt in range(self.max_tries):
            try:
                completion = self.client.chat_completion(
                    messages,
                    model=self.model,
                    max_tokens=self.max_new_tokens,
                    temperature=0.0,
                    seed=0,
                    response_format=response_format(request) if with_schema else None,
                )
                text = completion.choices[0].message.content or ""
                self.offers_schemas = self.offers_schemas and with_schema
                return text
            except HfHubHTTPError as error:
                status = error.response.status_code
                problem = f"the server answers {status}: {' '.join(error.response.text.split())[:200]}"
                if status in (400, 422) and with_schema:
                    with_schema = False  # perhaps it offers none: the same again without
                    continue
                if status not in TRY_AGAIN:
                    return GenerationError(problem)
                wait = seconds_asked_for(error)
            except (InferenceTimeoutError, httpx2.TransportError) as error:
                problem, wait = f"the server does not answer: {type(error).__name__} {error}".strip(), None
            except (ValueError, TypeError, LookupError, AttributeError):  # what parsing raises
                problem, wait = "the server's answer is no chat completion", None
            if attempt + 1 < self.max_tries:
                time.sleep(min(2**attempt if wait is None else wait, LONGEST_WAIT) * random.uniform(0.75, 1.25))
        return GenerationError(f"{problem} ({self.max_tries} tries)")


class ChatClient(InferenceClient):
    """The client as it is, but that a JSON schema goes out in OpenAI's form; it would go out in an older server's."""

    def _inner_post(self, request_parameters, *, stream=False):
        payload = request_parameters.json
        if "value" in payload.get("response_format", {}):
            schema = payload["response_format"]["value"]
            payload["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
        return super()._inner_post(request_parameters, stream=stream)


def response_format(request: Request) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": request.schema.model_json_schema()}}


def data_url(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def seconds_asked_for(error: HfHubHTTPError) -> float | None:
    """How long the server asks to wait, in seconds, if it says so."""
    asked = error.response.headers.get("retry-after", "")
    return float(asked) if asked.isdecimal() else None
