# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Servers: any bytes, any status, any headers, over real HTTP, and never a key to another place."""

import gzip
import json
import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.annotation.wrong_servers import DOG, HEAD, KEY, WrongServer, completion
from tests.fuzz.strategies import CONTROL, NASTY_TEXTS, few, json_values, lawful, many, texts, within
from trl_diffusion.annotation import endpoint_vlm
from trl_diffusion.annotation.completions import Failure, Reply, read_reply
from trl_diffusion.annotation.endpoint_vlm import EndpointVLM
from trl_diffusion.annotation.planner import Plan
from trl_diffusion.annotation.vlm import GenerationError, Request, ask


QUESTION = "Which things? Answer in JSON."
STATUSES = st.sampled_from(
    [200, 201, 204, 206, 301, 302, 307, 308, 400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 501, 503, 599, 999]
)
NAMES = ("content-type", "content-encoding", "retry-after", "location", "x", "set-cookie", "content-length")
HEADERS = st.dictionaries(
    st.sampled_from(NAMES),
    st.one_of(
        texts,
        st.sampled_from(
            ["gzip", "deflate", "br", "1e999", "-5", "nan", "Wed, 99 Xxx 9999 99:99:99 GMT", "text/html", "0x1"]
        ),
    ),
    max_size=3,
)
choices = st.fixed_dictionaries(
    {},
    optional={
        "message": st.one_of(
            json_values,
            st.fixed_dictionaries(
                {},
                optional={
                    "content": st.one_of(
                        json_values,
                        st.just(DOG),
                        st.lists(st.dictionaries(st.sampled_from(["type", "text", "refusal"]), texts)),
                    ),
                    "refusal": json_values,
                    "tool_calls": json_values,
                    "reasoning": json_values,
                    "reasoning_content": json_values,
                },
            ),
        ),
        "finish_reason": st.one_of(json_values, st.sampled_from(["stop", "length", "error", "content_filter"])),
        "error": json_values,
    },
)
bodies = st.one_of(
    st.binary(max_size=50),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {},
        optional={"choices": st.one_of(json_values, st.lists(choices, max_size=2)), "error": json_values, "id": texts},
    ).map(lambda value: json.dumps(value).encode()),
    texts.map(lambda text: completion(text)),
    texts.map(lambda text: gzip.compress(completion(text))),
)


def any_reply(status: int, headers: dict[str, str], body: bytes) -> None:
    with within():
        found = read_reply(Reply(status, headers, body), 512, QUESTION)
    if isinstance(found, str):
        found.encode()
        return
    error = found.error if isinstance(found, Failure) else found
    assert isinstance(error, GenerationError) and str(error)
    assert "\n" not in str(error) and not CONTROL.search(str(error))
    error.raw.encode()
    if isinstance(found, Failure) and found.wait is not None:
        assert found.wait >= 0


@few(300)
@given(STATUSES, HEADERS, bodies)
@example(429, {"retry-after": "\ud800"}, b"")
@example(200, {}, b'{"error": {"message": "\\u001b[2J"}}')
@example(200, {}, completion(None, refusal="no\x1b[2J"))
def test_any_reply(status, headers, body):
    """Any status, headers and body become a text or a failure that can be printed."""
    any_reply(status, headers, body)


@pytest.mark.slow
@many(10_000)
@given(STATUSES, HEADERS, bodies)
def test_many_replies(status, headers, body):
    """Any status, headers and body become a text or a failure that can be printed."""
    any_reply(status, headers, body)


@pytest.mark.parametrize("depth", [*range(300, 1000, 50), 985, 990, 995, 10_000, 1_000_000])
def test_deep_replies(depth):
    """JSON of any depth, as a body, an error, a choice's error and a message."""
    for start, end in (
        ('{"error": ', "}"),
        ("[", "]"),
        ('{"choices": [{"message": {"content": "x"}, "finish_reason": "error", "error": ', "}]}"),
    ):
        inner = "[" * depth + "]" * depth
        any_reply(200, {}, f"{start}{inner}{end}".encode())
        any_reply(400, {}, f"{start}{inner}{end}".encode())


@pytest.fixture
def hasty(monkeypatch):
    """The client does not wait between its attempts, and has a key."""

    async def sleep(seconds: float):
        assert 0 <= seconds <= 90

    monkeypatch.setattr(endpoint_vlm, "sleep", sleep)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def answer_of(reply, **settings):
    with WrongServer(reply) as server, within():
        (answer,) = ask(
            EndpointVLM(server.url, "m", **{"timeout": 1.0, "max_tries": 2} | settings), [Request(QUESTION, (), Plan)]
        )
    assert answer.value is not None or answer.error
    assert KEY not in f"{answer.error} {answer.raw}" and not CONTROL.search(answer.error or "")
    return answer


raw_responses = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(
                    HEAD,
                    b"HTTP/1.1 200 OK\r\n",
                    b"HTTP/1.0 200\r\n",
                    b"HTTP/9.9 999 \x1b[2J\r\n",
                    b"HTTP/1.1 100 Continue\r\n\r\n",
                    b"\r\n",
                ),
                *(
                    b"Content-Length: 5\r\n",
                    b"Content-Length: -1\r\n",
                    b"Content-Length: 1e9\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                ),
                *(
                    b"ffffffffffffffff\r\n",
                    b"5\r\nhello\r\n0\r\n\r\n",
                    b"Location: file:///etc/passwd\r\n",
                    b"Set-Cookie: a=\x1b\r\n",
                    b"X: \xff\r\n",
                ),
                *(
                    b"X" * 70_000,
                    b"HTTP/1.1 307 x\r\nLocation: http://\xff/\r\nContent-Length: 0\r\n\r\n",
                    b"\0",
                    b"Content-Encoding: gzip\r\n",
                ),
            ]
        ),
        st.binary(max_size=20),
        bodies,
    ),
    max_size=6,
).map(b"".join)


def any_bytes(data: bytes) -> None:
    def reply(handler, payload):
        handler.close_connection = True
        handler.wfile.write(data)

    answer_of(reply, max_tries=1)


@few(40)
@given(raw_responses)
def test_any_bytes(data):
    """Whatever a server sends instead of HTTP, the row has a reason."""
    logging.disable(logging.INFO)
    any_bytes(data)


@pytest.mark.slow
@many(1000)
@given(raw_responses)
def test_many_bytes(data):
    """Whatever a server sends instead of HTTP, the row has a reason."""
    logging.disable(logging.INFO)
    any_bytes(data)


@pytest.mark.parametrize(
    "location",
    [
        *(
            "file:///etc/passwd",
            "http://169.254.169.254/latest",
            "//127.0.0.2/v1",
            "ftp://127.0.0.1/",
            "gopher://127.0.0.1",
            "javascript:1",
        ),
        *(
            "http://user:secret@127.0.0.1:9/",
            "https://127.0.0.1:9/v1",
            "http://[::1",
            "http://127.0.0.1:99999/",
            "\\\\x",
            "http://xn--",
            "///",
        ),
        *("http:/x", "data:text/plain,x", "?", "#", "http://a\tb/", "h" * 10_000, "http://127.0.0.1:9/\x7f"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_lead_nowhere_else(hasty, status, location):
    """No redirect is followed to another server, scheme or file, so no key is sent there."""
    posts = []

    def reply(handler, payload):
        posts.append(handler.path)
        handler.send(status if len(posts) == 1 else 404, b"", Location=location)

    answer = answer_of(reply, max_tries=1)
    assert answer.value is None


def test_a_stream_without_end(hasty):
    """A body, or heads, that never end are given up in time, or where they are too large."""

    def chunks(handler, payload):
        handler.close_connection = True
        handler.wfile.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(300):
            handler.wfile.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")

    def heads(handler, payload):
        handler.close_connection = True
        for _ in range(100_000):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    assert "larger than 4 MiB" in answer_of(chunks).error
    assert "does not answer" in answer_of(heads, timeout=0.5).error


def test_other_ids_and_numbers_as_text(hasty):
    """The id of another request, and numbers as texts, change nothing; a label that is a number is refused."""
    body = json.loads(completion(DOG)) | {"id": "another", "created": "1", "usage": {"total_tokens": "nan"}}
    assert answer_of(lambda handler, payload: handler.send(200, json.dumps(body).encode())).value.instances == ["dog"]
    assert answer_of(lambda handler, payload: handler.send(200, completion('{"instances": [1]}'))).value is None


@pytest.mark.parametrize("text", ["insufficient_quota", "billing is not active", "quota exceeded", "more credits"])
@pytest.mark.parametrize("status", [400, 403, 404, 422, 429, 500])
def test_a_quoted_prompt_does_not_stop_the_run(hasty, status, text):
    """A server that quotes the request, in which a prompt speaks of quotas, fails that row and no other."""

    def reply(handler, payload):
        said = payload["messages"][0]["content"][-1]["text"]
        handler.send(status if text in said else 200, said.encode() if text in said else completion(DOG))

    with WrongServer(reply) as server, within():
        vlm = EndpointVLM(server.url, "m", timeout=2.0, max_tries=1, concurrency=1)
        answers = ask(vlm, [Request(question, (), Plan) for question in (f"{QUESTION} {text}", QUESTION, QUESTION)])
        assert vlm.offers_schemas
    assert answers[0].error and [answer.value.instances for answer in answers[1:]] == [["dog"], ["dog"]]


@pytest.mark.parametrize(
    "url",
    [*NASTY_TEXTS, "file:///etc/passwd", "http://", "http://[", "http://a:b", "http://\ud800", "http://x" * 1000],
)
def test_addresses_that_are_none(url):
    """What is no address of a server is refused, without its password."""
    lawful(lambda: EndpointVLM(url, "m"))
    lawful(lambda: EndpointVLM(f"http://user:{KEY}@{url}/", "m"))
