# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A model behind a server, over real HTTP: requests, answers and retries."""

import asyncio
import base64
import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.annotation import tiny_models
from tests.annotation.wrong_servers import KEY, WRONGS, WrongServer
from trl_diffusion.annotation import endpoint_vlm
from trl_diffusion.annotation.endpoint_vlm import EndpointVLM, data_url
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.judge import Judge, Verdict
from trl_diffusion.annotation.planner import Plan, Planner
from trl_diffusion.annotation.records import Instance, PairRecord
from trl_diffusion.annotation.transformers_vlm import TransformersVLM
from trl_diffusion.annotation.vlm import GenerationError, Request, ask, validate
from trl_diffusion.scripts.judges import VLMArguments, get_vlm


Reply = tuple[int, dict[str, str], str]
CLOSE, HANG = "close", "hang"  # what a server can do instead of a reply


def completion(text: str | None) -> Reply:
    """The response of an OpenAI-compatible server."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body)


def failure(status: int, body: str = "", **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


class Server(ThreadingHTTPServer):
    """A real local server. `script` maps a payload to a reply; `posts` are the received requests."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script: Callable[[dict], Reply | str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.posts, self.lock = script, [], threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Ignores errors of clients that disconnect, which some tests cause."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.lock:
            self.server.posts.append(SimpleNamespace(path=self.path, headers=headers, payload=payload))
        reply = self.server.script(payload)
        if reply == HANG:
            self.server.released.wait()
        if reply in (CLOSE, HANG):
            self.close_connection = True
            return
        status, headers, body = reply
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format, *args):
        """Logs nothing."""


@contextmanager
def serving(*replies: Reply | str, script: Callable[[dict], Reply | str] | None = None) -> Iterator[Server]:
    """A server that gives these replies in turn and then repeats the last one, or uses `script`."""
    left = list(replies)
    with Server(script or (lambda payload: left.pop(0) if len(left) > 1 else left[0])) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Records the client's waits in seconds, without waiting."""
    waits = []

    async def sleep(seconds: float):
        waits.append(seconds)

    monkeypatch.setattr(endpoint_vlm, "sleep", sleep)
    return waits


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def plan_request(text: str = "Which things are visible?", *sizes: tuple[int, int]) -> Request:
    return Request(text, tuple(tiny.image(seed, *size) for seed, size in enumerate(sizes)), Plan)


def text_of(payload: dict) -> str:
    return payload["messages"][0]["content"][-1]["text"]


def decoded(url: str) -> Image.Image:
    """Decodes the image of a data URL."""
    head, data = url.split(",", 1)
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == "JPEG"
    return image.convert("RGB")


def in_range(waits: list[float], expected: list[float]) -> bool:
    """Whether each wait is between 1 and 1.5 times its expected length."""
    return len(waits) == len(expected) and all(
        base <= wait <= 1.5 * base for wait, base in zip(waits, expected, strict=True)
    )


class TestRequests:
    def test_a_request_goes_out_in_the_form_of_openai(self):
        """A request is one POST with model, limit, temperature 0, seed, images before the text, and the schema of the
        answer."""
        request = plan_request("What is there? ü", (40, 32), (32, 48))
        with serving(completion('{"instances": []}')) as server:
            (text,) = EndpointVLM(server.url, "qwen", max_new_tokens=77).generate([request])
        assert text == '{"instances": []}'
        (post,) = server.posts
        assert post.path == "/v1/chat/completions" and post.headers["content-type"] == "application/json"
        (message,) = post.payload.pop("messages")
        *images, words = message["content"]
        assert message["role"] == "user" and words == {"type": "text", "text": "What is there? ü"}
        for part, image in zip(images, request.images, strict=True):
            assert part == {"type": "image_url", "image_url": {"url": data_url(image)}}
            assert decoded(data_url(image)).size == image.size
        post.payload.pop("stream", None)
        assert post.payload == {
            "model": "qwen",
            "max_tokens": 77,
            "temperature": 0.0,
            "seed": 0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": Plan.model_json_schema(), "strict": True},
            },
        }

    def test_pixels_arrive_as_they_are(self):
        """The data URL of a smooth image has a mean error of at most two levels, and a maximum of ten."""
        across, down = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 48))
        image = Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
        errors = np.abs(np.asarray(decoded(data_url(image)), int) - np.asarray(image, int))
        assert errors.mean() <= 2 and errors.max() <= 10

    def test_a_file_goes_out_as_it_is(self):
        """If a request has the JPEG file of an image, its bytes are sent; other images are encoded."""
        images, buffer = (tiny.image(0), tiny.image(1)), io.BytesIO()
        images[1].save(buffer, format="JPEG", quality=30)
        with serving(completion('{"instances": []}')) as server:
            EndpointVLM(server.url, "qwen").generate([Request("?", images, Plan, (None, buffer.getvalue()))])
        (post,) = server.posts
        first, second = (part["image_url"]["url"] for part in post.payload["messages"][0]["content"][:2])
        assert first == data_url(images[0])
        assert base64.b64decode(second.split(",")[1]) == buffer.getvalue()

    def test_an_image_is_encoded_once(self, monkeypatch):
        """Requests about the same images, such as the judge's in both orders, share their data URLs."""
        encoded = []
        monkeypatch.setattr(
            endpoint_vlm, "data_url", lambda image, file: encoded.append(image) or data_url(image, file)
        )
        a, b = tiny.image(0), tiny.image(1)
        with serving(completion('{"better": "A"}')) as server:
            EndpointVLM(server.url, "qwen").generate([Request("?", images, Verdict) for images in ((a, b), (b, a))])
        assert len(encoded) == 2
        urls = {
            tuple(part["image_url"]["url"] for part in post.payload["messages"][0]["content"][:2])
            for post in server.posts
        }
        assert urls == {(data_url(a), data_url(b)), (data_url(b), data_url(a))}

    @pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
    def test_the_path_is_completed(self, ending):
        """The address may end with the host or with its version."""
        with serving(completion("{}")) as server:
            EndpointVLM(f"http://127.0.0.1:{server.server_port}{ending}", "qwen").generate([plan_request()])
        assert [post.path for post in server.posts] == ["/v1/chat/completions"]

    @pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://server/v1", "http://", "http://server:80x/v1", ""])
    def test_an_address_that_is_none_is_refused(self, url):
        """An invalid address raises a ValueError with the address, before any request."""
        with pytest.raises(ValueError, match=re.escape(repr(url))):
            EndpointVLM(url, "qwen")

    def test_the_description_is_that_of_the_answers(self):
        """The description does not depend on the address, concurrency and retries, which do not change answers."""
        one = EndpointVLM("http://localhost:8000/v1", "qwen", concurrency=1, timeout=1, max_tries=1)
        assert one.describe() == EndpointVLM("https://server/v1", "qwen").describe()
        assert one.describe() != EndpointVLM("http://localhost:8000/v1", "qwen", max_new_tokens=9).describe()


class TestKeys:
    @pytest.fixture
    def hub_token(self, tmp_path, monkeypatch) -> str:
        """A Hub token that the client of the Hub finds."""
        token = "hf_secret"
        (tmp_path / "token").write_text(token)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        assert huggingface_hub.get_token() == token
        return token

    @pytest.mark.parametrize("key, sent", [(None, "Bearer none"), ("", "Bearer none"), ("sk-mine", "Bearer sk-mine")])
    def test_the_hub_token_is_never_sent(self, hub_token, monkeypatch, key, sent):
        """A server gets OPENAI_API_KEY if it is set, and never the user's Hub token, in any header."""
        if key is not None:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        with serving(completion("{}")) as server:
            EndpointVLM(server.url, "qwen").generate([plan_request()])
        (post,) = server.posts
        assert post.headers["authorization"] == sent
        assert hub_token not in json.dumps([post.headers, post.payload, post.path])


def test_a_server_is_asked_where_the_hub_may_not_be(monkeypatch):
    """HF_HUB_OFFLINE applies to the Hub only, not to a local server."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.constants.is_offline_mode()
    with serving(completion("fine")) as server:
        assert EndpointVLM(server.url, "qwen", max_tries=1).generate([plan_request()]) == ["fine"]


class TestConcurrency:
    @pytest.mark.parametrize("concurrency, rounds", [(1, 3), (4, 3), (120, 1)])
    def test_as_many_requests_are_under_way_as_allowed(self, concurrency, rounds):
        """A server that waits for `concurrency` requests answers all of them, in order."""
        together = threading.Barrier(concurrency, timeout=20)
        in_flight = []

        def script(payload: dict) -> Reply:
            together.wait()
            in_flight.append(together.parties)
            return completion(f"answer to {text_of(payload)}")

        requests = [plan_request(f"question {index}", (8, 8)) for index in range(concurrency * rounds)]
        with serving(script=script) as server:
            texts = EndpointVLM(server.url, "qwen", concurrency=concurrency, max_tries=1).generate(requests)
        assert texts == [f"answer to question {index}" for index in range(len(requests))]
        assert len(server.posts) == len(requests)

    def test_no_more_requests_are_under_way_than_allowed(self):
        """With a concurrency of three, the server never has four open requests."""
        lock, open_now, most = threading.Lock(), 0, 0

        def script(payload: dict) -> Reply:
            nonlocal open_now, most
            with lock:
                open_now, most = open_now + 1, max(most, open_now + 1)
            time.sleep(0.02)
            with lock:
                open_now -= 1
            return completion("fine")

        with serving(script=script) as server:
            EndpointVLM(server.url, "qwen", concurrency=3).generate([plan_request()] * 12)
        assert most == 3

    def test_answers_keep_their_order_whichever_comes_first(self):
        """The first request is answered last, and its text is still the first."""
        others = threading.Semaphore(0)

        def script(payload: dict) -> Reply:
            if text_of(payload) == "question 0":
                for _ in range(3):
                    assert others.acquire(timeout=20)
            else:
                others.release()
            return completion(text_of(payload))

        with serving(script=script) as server:
            texts = EndpointVLM(server.url, "qwen").generate([plan_request(f"question {i}") for i in range(4)])
        assert texts == [f"question {index}" for index in range(4)]


class TestTries:
    def ask(self, server: Server, max_tries: int = 6, timeout: float = 20) -> str | GenerationError:
        (answer,) = EndpointVLM(server.url, "qwen", max_tries=max_tries, timeout=timeout).generate([plan_request()])
        return answer

    def test_a_busy_server_is_given_the_time_that_it_asks_for(self, waits):
        """After 429 with Retry-After, the client waits at least that long, and retries once."""
        with serving(failure(429, Retry_After="7"), completion("fine")) as server:
            assert self.ask(server) == "fine"
        assert len(server.posts) == 2 and in_range(waits, [7])

    @pytest.mark.parametrize(
        "asked, expected",
        [
            ("3600", 60),
            ("9" * 400, 60),
            ("0", 0),
            ("-5", 0),
            ("2.5", 2.5),
            ("Wed, 21 Oct 2065 07:28:00 GMT", 60),
            ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
            ("nan", 1),
            ("soon", 1),
            ("", 1),
        ],
    )
    def test_odd_wishes_are_met_half_way(self, waits, asked, expected):
        """A Retry-After of an hour is limited to a minute, a past date and a negative number are no wait; a word is
        ignored."""
        with serving(failure(503, Retry_After=asked), completion("fine")) as server:
            assert self.ask(server) == "fine"
        assert in_range(waits, [expected])

    @pytest.mark.parametrize("trouble", [failure(500, "oops"), failure(529), failure(408), failure(502), CLOSE])
    def test_a_server_that_recovers_is_asked_until_then(self, waits, trouble):
        """Two failures cause two waits, of one and two seconds, and the request succeeds."""
        with serving(trouble, trouble, completion("fine")) as server:
            assert self.ask(server) == "fine"
        assert len(server.posts) == 3 and in_range(waits, [1, 2])

    def test_a_server_that_stays_broken_is_left_alone(self, waits):
        """After `max_tries` requests, the answer is an error with the server's message; waits double up to a
        minute."""
        with serving(failure(500, "CUDA\n  out of memory")) as server:
            answer = self.ask(server, max_tries=9)
        assert isinstance(answer, GenerationError)
        assert str(answer) == "the server answers 500: CUDA out of memory (9 tries)"
        assert len(server.posts) == 9 and in_range(waits, [1, 2, 4, 8, 16, 32, 60, 60])

    @pytest.mark.parametrize(
        "body",
        [
            "<html><body>Welcome to nginx!</body></html>",
            "",
            "null",
            "[]",
            '"fine"',
            '{"error": {"message": "no such model"}}',
            '{"choices": null}',
            '{"choices": []}',
            '{"choices": [{"index": 0}]}',
            '{"choices": [{"index": 0, "message": null}]}',
        ],
    )
    def test_what_is_no_completion_is_tried_again(self, waits, body):
        """Status 200 without a completion is a failure like others: it is retried, and becomes an error in the end."""
        with serving(failure(200, body), completion("fine")) as server:
            assert self.ask(server) == "fine"
        assert len(server.posts) == 2 and in_range(waits, [1])
        with serving(failure(200, body)) as server:
            answer = self.ask(server, max_tries=2)
        assert isinstance(answer, GenerationError) and len(server.posts) == 2
        said = "the server answers 500" if "error" in body else "the server's answer is not a chat completion"
        assert str(answer) == f"{said}{': ' if body else ''}{body} (2 tries)"

    def test_a_completion_without_words_is_an_empty_text(self, waits):
        """An empty answer of the model is a success."""
        with serving(completion(None)) as server:
            assert self.ask(server) == ""
        assert len(server.posts) == 1 and waits == []

    def test_a_silent_server_is_asked_again_after_the_timeout(self, waits):
        """A server that does not answer is retried after `timeout` seconds, and becomes an error in the end."""
        with serving(HANG, completion("fine")) as server:
            start = time.monotonic()
            assert self.ask(server, timeout=0.3) == "fine"
            assert 0.3 <= time.monotonic() - start < 10
        assert in_range(waits, [1])
        with serving(HANG) as server:
            answer = self.ask(server, max_tries=2, timeout=0.2)
        assert isinstance(answer, GenerationError) and "the server does not answer within 0.2 seconds" in str(answer)

    def test_no_server_at_all_is_an_error_with_a_reason(self, waits):
        """A port without a server is retried as often as any server."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
            answers = EndpointVLM(url, "qwen", max_tries=3).generate([plan_request(), plan_request()])
        assert ["the server does not answer: ConnectError" in str(answer) for answer in answers] == [True, True]
        assert len(waits) == 4

    @pytest.mark.parametrize("status", [401, 403, 404, 413])
    def test_a_refusal_is_not_tried_again(self, waits, status):
        """A wrong key, a wrong name or a request that is too large fails immediately, with status and message of the
        server."""
        with serving(failure(status, '{"error": "not for you"}')) as server:
            answer = self.ask(server)
        assert isinstance(answer, GenerationError)
        assert str(answer) == f'the server answers {status}: {{"error": "not for you"}}'
        assert len(server.posts) == 1 and waits == []

    def test_one_failure_among_others_is_one_error(self, waits):
        """Each request has its own attempts, and the others get their answers, in order."""

        def script(payload: dict) -> Reply:
            return failure(404, "gone") if text_of(payload) == "question 1" else completion(text_of(payload))

        with serving(script=script) as server:
            first, second, third = EndpointVLM(server.url, "qwen").generate(
                [plan_request(f"question {index}") for index in range(3)]
            )
        assert (first, str(second), third) == ("question 0", "the server answers 404: gone", "question 2")


class TestSchemas:
    @pytest.mark.parametrize("status", [400, 422])
    @pytest.mark.parametrize("max_tries", [1, 6])
    def test_a_server_without_schemas_is_asked_without(self, waits, status, max_tries):
        """A server that refuses `response_format` immediately gets the same request, and all later ones, without
        it."""

        def script(payload: dict) -> Reply:
            return failure(status, "unknown field") if "response_format" in payload else completion(text_of(payload))

        with serving(script=script) as server:
            vlm = EndpointVLM(server.url, "qwen", max_tries=max_tries)
            assert vlm.generate([plan_request("first")]) == ["first"]
            assert ["response_format" in post.payload for post in server.posts] == [True, False]
            assert vlm.generate([plan_request(text) for text in "abc"]) == ["a", "b", "c"]
        assert ["response_format" in post.payload for post in server.posts] == [True] + [False] * 4
        assert waits == []

    def test_a_failure_among_answers_costs_no_schemas(self, waits):
        """A server that has answered a request with a schema is asked with one, also after a 400 that it takes back."""
        replies = [completion("one"), failure(400, "try later"), completion("two"), completion("three")]
        with serving(*replies) as server:
            vlm = EndpointVLM(server.url, "qwen", concurrency=1)
            assert vlm.generate([plan_request()] * 3) == ["one", "two", "three"]
        assert ["response_format" in post.payload for post in server.posts] == [True, True, False, True]

    @pytest.mark.parametrize("trouble", [failure(500), failure(503, "busy"), failure(429, "slow down"), CLOSE])
    def test_a_server_in_trouble_keeps_its_schemas(self, waits, trouble):
        """Failures that pass say nothing about schemas."""
        with serving(trouble, completion("one"), completion("two")) as server:
            vlm = EndpointVLM(server.url, "qwen", concurrency=1)
            assert vlm.generate([plan_request()] * 2) == ["one", "two"]
        assert all("response_format" in post.payload for post in server.posts) and len(server.posts) == 3

    def test_many_rows_cost_few_requests_with_schemas(self, waits):
        """At most as many requests as are under way at the same time find out that there are no schemas."""

        def script(payload: dict) -> Reply:
            refused = "response_format" in payload
            return failure(501, "response_format") if refused else completion("fine")

        with serving(script=script) as server:
            assert EndpointVLM(server.url, "qwen", concurrency=4).generate([plan_request()] * 40) == ["fine"] * 40
        assert sum("response_format" in post.payload for post in server.posts) <= 4

    def test_a_request_that_is_bad_for_another_reason_costs_no_schemas(self, waits):
        """A request that fails with and without a schema is an error, and the next one has its schema again."""

        def script(payload: dict) -> Reply:
            return failure(400, "image too small") if text_of(payload) == "bad" else completion("fine")

        with serving(script=script) as server:
            vlm = EndpointVLM(server.url, "qwen")
            (answer,) = vlm.generate([plan_request("bad")])
            assert str(answer) == "the server answers 400: image too small"
            assert vlm.generate([plan_request("good")]) == ["fine"]
        assert ["response_format" in post.payload for post in server.posts] == [True, False, True]


@pytest.mark.parametrize("wrong", WRONGS, ids=[wrong.name for wrong in WRONGS])
def test_wrong_servers(waits, monkeypatch, wrong):
    """Whatever a server does, a request ends within its deadline, with the right object or with a reason on one line, the
    text is kept, and no key is in the result."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    request = plan_request("Which?", (8, 8))
    with WrongServer(wrong.reply) as server:
        vlm = EndpointVLM(server.url, "qwen", **{"max_tries": 2, "timeout": 0.5, **wrong.settings})
        start = time.monotonic()
        (text,) = vlm.generate([request])
        assert time.monotonic() - start < 2.5
        answer = validate(text, Plan)
        if not isinstance(text, GenerationError) and answer.error:
            vlm.generate([request])  # the second request of `ask`
    if isinstance(wrong.expected, list):
        assert (answer.value, answer.error) == (Plan(instances=wrong.expected), None)
    else:
        assert answer.value is None and wrong.expected in answer.error
        assert "\n" not in answer.error and len(answer.error) < 450
    assert len(server.posts) == wrong.posts
    assert wrong.raw is None or answer.raw == wrong.raw
    assert KEY not in f"{answer}"


class TestSecrets:
    def test_a_redirect_takes_nothing_along(self, waits, monkeypatch):
        """Another server gets neither the key nor a request."""
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with serving(completion("fine")) as other, serving(failure(307, Location=other.url)) as server:
            (answer,) = EndpointVLM(server.url, "qwen").generate([plan_request()])
        assert f"redirects to {other.url}" in str(answer) and other.posts == []

    def test_what_an_address_holds_is_in_no_message(self, waits, caplog):
        """User, password and query of an address reach the server, and no message, log line, text or description."""
        secrets = ("somebody", "pass word", "query+key")
        coded = base64.b64encode(b"somebody:pass word").decode()
        with serving(script=lambda payload: failure(400, echo())) as server, caplog.at_level(logging.DEBUG):

            def echo() -> str:
                post = server.posts[-1]
                return json.dumps({"path": post.path, "headers": post.headers, "said": secrets})

            url = server.url.replace("http://", "http://somebody:pass%20word@") + "?key=query%2Bkey"
            vlm = EndpointVLM(url, "qwen")
            (answer,) = vlm.generate([plan_request()])
        assert server.posts[0].path == "/v1/chat/completions?key=query%2Bkey"
        assert server.posts[0].headers["authorization"] == f"Basic {coded}"
        for secret in (*secrets, coded, "query%2Bkey", "pass%20word"):
            assert secret not in f"{answer} {answer.raw} {caplog.text} {vlm.describe()}"

    @pytest.mark.parametrize("url", ["http://me:secret@server:80x/v1", "ftp://me:secret@server/v1?key=secret"])
    def test_a_wrong_address_is_told_without_its_password(self, url):
        """The message about an address has no password and no query."""
        with pytest.raises(ValueError, match="The server's address") as caught:
            EndpointVLM(url, "qwen")
        assert "secret" not in str(caught.value)

    def test_a_key_in_an_answer_is_hidden(self, waits, monkeypatch):
        """A model that writes the key, also in JSON's escapes, does not get it into a row."""
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        status, headers, body = completion(f"your key is {KEY}")
        with serving((status, headers, body.replace("sk-", "\\u0073k-"))) as server:
            assert EndpointVLM(server.url, "qwen").generate([plan_request()]) == ["your key is ***"]

    @pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-ключ"])
    def test_a_key_that_is_none_is_refused_without_showing_it(self, monkeypatch, key):
        """A key that no header can hold raises a ValueError that names the variable."""
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="`OPENAI_API_KEY` holds characters") as caught:
            EndpointVLM("http://localhost:9/v1", "qwen").generate([plan_request()])
        assert "sk-" not in str(caught.value)

    def test_white_space_around_a_key_is_no_part_of_it(self, monkeypatch):
        """A key from a file with a line break at its end is sent without it."""
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        with serving(completion("{}")) as server:
            EndpointVLM(server.url, "qwen").generate([plan_request()])
        assert server.posts[0].headers["authorization"] == f"Bearer {KEY}"


class TestParameters:
    def sent(self, **request) -> dict:
        with serving(completion("{}")) as server:
            EndpointVLM(server.url, "qwen", max_new_tokens=77, request=request).generate([plan_request()])
        return server.posts[0].payload

    def test_parameters_are_changed_added_and_left_out(self):
        """A value replaces or adds a parameter, and `None` leaves it out."""
        payload = self.sent(
            max_tokens=None,
            max_completion_tokens=512,
            temperature=None,
            seed=3,
            chat_template_kwargs={"enable_thinking": False},
        )
        payload.pop("messages")
        assert payload.pop("response_format")["type"] == "json_schema"
        assert payload == {
            "model": "qwen",
            "max_completion_tokens": 512,
            "seed": 3,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        assert "response_format" not in self.sent(response_format=None)
        assert self.sent(response_format={"type": "json_object"})["response_format"] == {"type": "json_object"}

    def test_answers_depend_on_them(self):
        """Changed parameters are part of the description, and without any it is as it always was."""
        plain = EndpointVLM("http://localhost:8000/v1", "qwen").describe()
        changed = EndpointVLM("http://localhost:8000/v1", "qwen", request={"temperature": None}).describe()
        assert changed == {**plain, "changed_parameters": {"temperature": None}}

    @pytest.mark.parametrize(
        "request_, message",
        [
            ({"model": "other"}, "cannot change model"),
            ({"messages": [], "n": 2}, "cannot change messages, n"),
            ({"stream": True}, "cannot change stream"),
            ({"top_p": float("nan")}, "must be a JSON object"),
            ({"stop": {1, 2}}, "must be a JSON object"),
            (["temperature"], "must be a JSON object"),
            ({"extra": {"api_key": "x"}}, "`--vlm_request` holds a key"),
            ({"Authorization": "Bearer x"}, "`--vlm_request` holds a key"),
            ({"user": KEY}, "`--vlm_request` holds a key"),
        ],
    )
    def test_what_cannot_be_sent_is_refused(self, monkeypatch, request_, message):
        """Parameters that are ours, that are not JSON, or that hold a key raise a ValueError."""
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with pytest.raises(ValueError, match=message) as caught:
            EndpointVLM("http://localhost:8000/v1", "qwen", request=request_)
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize("value", ['{"temperature": null, "top_p": 0.5}', {"temperature": None, "top_p": 0.5}])
    def test_the_flag_takes_json_or_a_dictionary(self, value):
        """`--vlm_request` is JSON on the command line and a dictionary in a YAML file."""
        args = VLMArguments(vlm="qwen", vlm_base_url="http://localhost:8000/v1", vlm_request=value)
        assert get_vlm(args).request == {"temperature": None, "top_p": 0.5}

    def test_mistakes_in_the_flags(self):
        """A flag that is no JSON, has no server, or allows no time raises a ValueError that names it."""
        url = "http://localhost:8000/v1"
        for changes, message in (
            ({"vlm_base_url": url, "vlm_request": "{"}, "`--vlm_request` is not valid JSON"),
            ({"vlm_base_url": url, "vlm_request": "[1]"}, "`--vlm_request` must be a JSON object"),
            ({"vlm_request": "{}"}, "`--vlm_request` is for a server"),
            ({"vlm_base_url": url, "vlm_timeout": 0.0}, "`--vlm_timeout` must be a positive number"),
            ({"vlm_base_url": url, "vlm_timeout": float("nan")}, "`--vlm_timeout` must be a positive number"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                get_vlm(VLMArguments(vlm="qwen", **changes))


class TestQuotas:
    def test_the_rest_of_a_batch_is_not_sent(self, waits):
        """After a quota error, no request waits or is sent any more, and `ask` stops with the server's words."""
        with serving(failure(402, "Insufficient Balance")) as server:
            vlm = EndpointVLM(server.url, "qwen", concurrency=2)
            answers = vlm.generate([plan_request()] * 20)
            assert len(server.posts) == 2 and waits == []
            assert {str(answer) for answer in answers} == {
                "the server answers 402, its quota is used up: Insufficient Balance"
            }
            with pytest.raises(ValueError, match="^Stopped: the server answers 402.*Insufficient Balance.* continues"):
                ask(vlm, [plan_request()] * 3)


def test_a_notebook_may_ask():
    """Requests are answered where an event loop runs already."""

    async def cell() -> list:
        return EndpointVLM(server.url, "qwen").generate([plan_request()])

    with serving(completion("fine")) as server:
        assert asyncio.run(cell()) == ["fine"]


IMAGES_ONLY = """
from transformers import Qwen2_5_VLProcessor


class ImagesOnly(Qwen2_5_VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    return tiny_models.taught_once(tmp_path_factory)


@pytest.fixture(scope="module")
def transformers_server(taught, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """`transformers serve` with the taught model: its address, and the name of the model."""
    root = tmp_path_factory.mktemp("serve")
    # The server loads processors with AutoProcessor, which needs torchvision for videos. A custom processor in the folder
    # has no video part.
    folder = shutil.copytree(taught, root / "model")
    (folder / "images_only.py").write_text(IMAGES_ONLY)
    names = {"processor_class": "ImagesOnly", "auto_map": {"AutoProcessor": "images_only.ImagesOnly"}}
    (folder / "processor_config.json").write_text(json.dumps(names))
    command = [Path(sys.executable).with_name("transformers"), "serve", folder]
    options = ["--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--port", "0", "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    log = root / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"running on (http://\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"{found[1]}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


def test_a_server_of_transformers_answers_as_the_model_in_this_process(taught, transformers_server):
    """Through `transformers serve`, requests get the same texts as from the model in this process, for the same
    JPEGs."""
    url, model = transformers_server
    local = TransformersVLM(str(taught), dtype="float32", device="cpu", max_new_tokens=64)
    lessons = tiny_models.Lessons(local)
    asked = [make() for make in (lessons.plan, lessons.inspection) + (lessons.verdict,) * 8]
    requests = [request for request, _ in asked]
    texts = EndpointVLM(url, model, concurrency=4, max_new_tokens=64).generate(requests)
    sent = [
        Request(request.text, tuple(decoded(data_url(image)) for image in request.images), request.schema)
        for request in requests
    ]
    assert texts == local.generate(sent)
    assert [json.loads(text) for text in texts] == [answer for _, answer in asked]


def test_roles_work_through_a_server_of_transformers(transformers_server):
    """Planner and judge work over HTTP, and a verdict that depends on the pixels holds in both orders."""
    url, model = transformers_server
    vlm = EndpointVLM(url, model, max_new_tokens=64)
    rng = np.random.default_rng(5)
    pairs = []
    for bright in ((True, False), (False, True), (True, True)):
        chosen, rejected = (StoredImage.read(tiny_models.shade(rng, light, 64, 48)) for light in bright)
        pairs.append(PairRecord("x", "a cow", chosen=chosen, rejected=rejected))
    Planner(vlm)(pairs)
    assert [pair.labels for pair in pairs] == [tiny_models.LABELS] * 3
    for pair in pairs:
        pair.instances = [Instance("cow", [0.2, 0.2, 0.8, 0.8], [0.1, 0.3, 0.7, 0.9], 1.0, 1.0)]
    Judge(vlm, crop_size=28)(pairs)
    assert [pair.instances[0].preference for pair in pairs] == ["chosen", "rejected", "tie"]
