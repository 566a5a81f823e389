# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A server on localhost with many ways of being wrong, each with what should come out of a request."""

import gzip
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


KEY = "sk-0123456789"
DOG = '{"instances": ["dog"]}'
EXAMPLE = '{"instances": ["eagle", "red car"]}'
MIB = 2**20


class WrongServer(ThreadingHTTPServer):
    """A server whose `reply` writes whatever it wants. `posts` are the payloads and headers that it got."""

    daemon_threads = True

    def __init__(self, reply: Callable[["Handler", dict], None]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.posts = reply, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Ignores clients that leave."""

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posts.append((payload, dict(self.headers), self.path))
        self.server.reply(self, payload)

    def send(self, status: int, body: bytes, length: int | None = None, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, start: bytes, seconds: float = 3.0):
        """Sends a byte each 0.05 seconds, for longer than any test waits."""
        self.close_connection = True
        self.wfile.write(start)
        for _ in range(int(seconds / 0.05)):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, format, *args):
        """Logs nothing."""


def completion(content, finish_reason="stop", **message) -> bytes:
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


@dataclass(frozen=True)
class Wrong:
    """A way of being wrong: what the server does, the labels or a part of the error, and how many requests it gets."""

    name: str
    reply: Callable[[Handler, dict], None]
    expected: list[str] | str
    posts: int
    raw: str | None = None
    settings: dict = field(default_factory=dict)


def says(status: int, body: bytes | str, length: int | None = None, **headers: str) -> Callable:
    content = body.encode() if isinstance(body, str) else body
    return lambda handler, payload: handler.send(status, content, length, **headers)


def closes(start: bytes) -> Callable:
    """Sends the beginning of a reply and closes the connection."""

    def reply(handler: Handler, payload: dict):
        handler.close_connection = True
        handler.wfile.write(start)

    return reply


def without_schemas(status: int, body: str) -> Callable:
    """Refuses requests with a schema."""

    def reply(handler: Handler, payload: dict):
        refused = "response_format" in payload
        handler.send(status if refused else 200, body.encode() if refused else completion(DOG))

    return reply


def echoes(handler: Handler, payload: dict):
    handler.send(401, f"no such key: {handler.headers['Authorization']}, {handler.path}".encode())


def to_itself(handler: Handler, payload: dict):
    if handler.path.endswith("/"):
        handler.send(200, completion(DOG))
    else:
        handler.send(307, b"", Location=handler.path + "/")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
QUOTA = '{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
CUT = "cut off after 512 tokens: allow more with `--vlm_max_new_tokens`"
THOUGHTS = f"<think>They want {EXAMPLE}. In the first image I"

WRONGS = [
    # answers
    Wrong("cut off, whole object", says(200, completion(DOG, "length")), CUT, 1, DOG),
    Wrong("cut off in thoughts", says(200, completion(THOUGHTS, "length")), CUT, 1, THOUGHTS),
    Wrong("cut off in thoughts, says stop", says(200, completion(THOUGHTS)), "within its thoughts", 2, THOUGHTS),
    Wrong("another word for cut off", says(200, completion(DOG, "MAX_TOKENS")), CUT, 1, DOG),
    Wrong(
        "stopped by a filter", says(200, completion(DOG, "content_filter")), "a content filter of the server", 1, DOG
    ),
    Wrong("a refusal", says(200, completion(None, refusal="I cannot help.")), "the model refuses: I cannot help.", 1),
    Wrong("a refusal as a part", says(200, completion([{"type": "refusal", "refusal": "No."}])), "refuses: No.", 1),
    Wrong("a tool", says(200, completion(None, "tool_calls", tool_calls=[{"id": "1"}])), "calls a tool", 1),
    Wrong("only thoughts, in their field", says(200, completion(None, reasoning_content=EXAMPLE)), "but no answer", 1),
    Wrong("only thoughts, in another field", says(200, completion("", reasoning=EXAMPLE)), "but no answer", 1),
    Wrong("thoughts in their field", says(200, completion(DOG, reasoning_content=EXAMPLE)), ["dog"], 1),
    Wrong("no text", says(200, completion(None)), "the answer is empty", 2),
    Wrong(
        "parts",
        says(200, completion([{"type": "text", "text": DOG[:9]}, {"type": "text", "text": DOG[9:]}])),
        ["dog"],
        1,
    ),
    Wrong(
        "parts with thoughts",
        says(200, completion([{"type": "thinking", "thinking": EXAMPLE}, {"type": "text", "text": DOG}])),
        ["dog"],
        1,
    ),
    Wrong("a broken answer", says(200, completion(DOG, "error")), "the server broke off its answer", 2),
    Wrong("half a character", says(200, completion("\ud83d")), "no JSON object", 2, "?"),
    Wrong("a reason that is a number", says(200, completion(DOG, 7)), ["dog"], 1),
    # no completions
    Wrong("HTML", says(200, "<html>Welcome</html>"), "is not a chat completion: <html>Welcome</html>", 2),
    Wrong("nothing", says(200, b""), "is not a chat completion", 2),
    Wrong("no content", says(204, b""), "is not a chat completion", 2),
    Wrong("no choices", says(200, '{"choices": []}'), "is not a chat completion", 2),
    Wrong("a choice that is a number", says(200, '{"choices": [1]}'), "is not a chat completion", 2),
    Wrong("a number as content", says(200, completion(5)), "is not a chat completion", 2),
    Wrong("numbers as parts", says(200, completion([1, None])), "the answer is empty", 2),
    Wrong("a stream", says(200, b"data: " + completion(DOG) + b"\n\n"), "is not a chat completion: data:", 2),
    Wrong("not UTF-8", says(200, b'{"choices": "\xff\xfe"}'), "is not a chat completion", 2),
    Wrong("too deep", says(200, b"[" * 100_000), "is not a chat completion", 2),
    Wrong("too many digits", says(200, b'{"choices": ' + b"9" * 5000 + b"}"), "is not a chat completion", 2),
    Wrong("an error with 200", says(200, '{"error": {"message": "no such model"}}'), "no such model", 2),
    Wrong("an error with 200 and a code", says(200, '{"error": {"code": 404, "message": "gone"}}'), "answers 404", 1),
    # connections
    Wrong("closed at once", closes(b""), "the server does not answer: RemoteProtocolError", 2),
    Wrong(
        "closed in the body", closes(HEAD + b"Content-Length: 999\r\n\r\n{"), "does not answer: RemoteProtocolError", 2
    ),
    Wrong("no HTTP", closes(b"220 mail.example.org ESMTP\r\n"), "does not answer: RemoteProtocolError", 2),
    Wrong("a length too short", says(200, completion(DOG), length=20), "does not answer: RemoteProtocolError", 2),
    Wrong("two lengths", closes(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"), "does not answer", 2),
    Wrong("drips its head", lambda h, _: h.drip(HEAD + b"X: "), "does not answer within 0.5 seconds", 2),
    Wrong(
        "drips its body", lambda h, _: h.drip(HEAD + b"Content-Length: 999\r\n\r\n"), "does not answer within 0.5 s", 2
    ),
    Wrong("says nothing", lambda h, _: time.sleep(1.5), "does not answer within 0.5 seconds (`--vlm_timeout`", 2),
    Wrong("too large", says(200, completion("x" * 6 * MIB)), "larger than 4 MiB", 1),
    Wrong("without an end", lambda h, _: h.send(200, b"x" * 5 * MIB, 2**40), "larger than 4 MiB", 1),
    Wrong("compressed", says(200, gzip.compress(completion(DOG)), Content_Encoding="gzip"), ["dog"], 1),
    Wrong(
        "a bomb", says(200, gzip.compress(b"[" * 300 * MIB, 9), Content_Encoding="gzip"), "is not a chat completion", 2
    ),
    Wrong("compressed and not", says(200, completion(DOG), Content_Encoding="gzip"), "is not a chat completion", 2),
    Wrong("another compression", says(200, b"123", Content_Encoding="br"), "nobody asked for br", 2),
    # redirects
    Wrong("to itself", to_itself, ["dog"], 2),
    Wrong("in circles", lambda h, _: h.send(307, b"", Location=h.path), "redirects in circles", 3),
    Wrong("to a page", says(302, b"", Location="/login"), "/login: name that address with `--vlm_base_url`", 1),
    Wrong(
        "to another server",
        says(307, b"", Location="http://localhost:9/v1"),
        "the server redirects to http://localhost:9",
        1,
    ),
    Wrong("to nowhere", says(307, b"", Location="http://[::1"), "the server answers 307", 1),
    Wrong("without an address", says(307, b"moved"), "the server answers 307: moved", 1),
    # refusals
    Wrong("the key in an error", echoes, "no such key: Bearer ***, ", 1),
    Wrong("a filter", says(400, '{"error": {"code": "content_filter"}}'), "a content filter of the server refuses", 1),
    Wrong(
        "a parameter", says(400, "Unsupported parameter: 'max_tokens'"), "(`--vlm_request` changes or leaves out", 2
    ),
    Wrong("an image", says(400, "the image is too small"), "the server answers 400: the image is too small", 2),
    Wrong("many words", says(404, "no\n such " * 9999), "the server answers 404: no such no such", 1),
    Wrong("too much", says(413, "too large, response_format"), "the server answers 413", 1),
    Wrong("no schemas, 400", without_schemas(400, "unknown field"), ["dog"], 2),
    Wrong("no schemas, 404", without_schemas(404, "response_format is not known"), ["dog"], 2),
    Wrong("no schemas, 415", without_schemas(415, ""), ["dog"], 2),
    Wrong("no schemas, 422", without_schemas(422, "extra inputs"), ["dog"], 2),
    Wrong("no schemas, 500", without_schemas(500, "guided decoding is not available"), ["dog"], 2),
    Wrong("no schemas, 501", without_schemas(501, ""), ["dog"], 2),
    Wrong("no schemas, 500 without words", without_schemas(500, ""), ["dog"], 3, settings={"max_tries": 3}),
    # quotas
    Wrong("payment", says(402, "Insufficient Balance"), "quota is used up: Insufficient Balance", 1),
    Wrong("quota", says(429, QUOTA), "quota is used up: ", 1),
    Wrong("billing", says(403, "billing is not active"), "quota is used up: billing", 1),
    Wrong("quota with 200", says(200, QUOTA), "quota is used up: ", 1),
    Wrong(
        "quota of a minute", says(429, "quota exceeded", Retry_After="1"), "answers 429: quota exceeded (2 tries)", 2
    ),
]
