# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The part of the stand-in that speaks HTTP: reads requests, injects faults, writes answers."""

import json
import re
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class Request:
    """
    A request that arrived.

    Attributes:
        method (`str`):
            `"GET"`, `"HEAD"`, `"POST"`, `"PUT"` or `"DELETE"`.
        path (`str`):
            The path as it was sent, with what follows a question mark.
        status (`int` or `None`):
            Status of the answer; `None` where the connection was closed before there was one.
        headers (`dict[str, str]`):
            Headers by their names in small letters.
        body (`bytes`):
            What was sent.
        known (`bool`):
            Whether the stand-in has such an endpoint.
    """

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    known: bool = field(default=True, repr=False)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What a request gets: bytes, or something that becomes JSON."""

    content: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


class Refusal(Exception):
    """An answer that says no, with the headers that the client makes its exceptions of."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **content: str,
    ):
        super().__init__(message)
        headers = {"X-Error-Message": message, **(headers or {})}
        headers |= {"X-Error-Code": code} if code else {}
        self.answer = Answer({"error": message, **content}, status, headers)


@dataclass
class Fault:
    """What happens to the next `times` requests that match."""

    method: str
    path: re.Pattern
    status: int | None
    times: int
    headers: dict[str, str]
    cut_after: int | None
    lost: bool
    message: str | None


# What the Hub says with these statuses.
MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you don't have the required permissions",
    409: "Another conflicting operation is in progress",
    412: "A commit has happened since. Please refresh and try again.",
    429: "You have been rate-limited; you can retry in a few minutes",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Time-out",
}


def message(status: int, path: str) -> str:
    if status == 409 and path == "/api/repos/create":  # at this the client asks again, at once and for ever
        return "Cannot create repo: another conflicting operation is in progress"
    return MESSAGES[status]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Any  # the stand-in, set in a subclass for each server

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers=headers)
        fault = self.hub.take_request(request)
        cut_after = fault.cut_after if fault else None
        for piece in self.pieces():
            request.body += piece
            if cut_after is not None and len(request.body) >= cut_after:
                return self.cut()
        if cut_after is not None and request.body:
            return self.cut()
        if fault and fault.status:
            answer = Refusal(
                fault.status, fault.message or message(fault.status, self.path), headers=fault.headers
            ).answer
        else:
            answer = self.hub.answer(request)
        if fault and fault.lost:
            return self.cut()
        request.status = answer.status
        self.write(answer, cut_after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def pieces(self) -> Iterator[bytes]:
        """The body of the request, in pieces."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        remaining = int(self.headers.get("Content-Length") or 0)
        while remaining:
            piece = self.rfile.read1(min(remaining, 65536))
            if not piece:
                return
            remaining -= len(piece)
            yield piece

    def write(self, answer: Answer, cut_after: int | None) -> None:
        body = answer.body
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Type" not in answer.headers:
            is_data = isinstance(answer.content, bytes)
            self.send_header("Content-Type", "application/octet-stream" if is_data else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut_after])
        if cut_after is not None:
            self.wfile.flush()
            self.close_connection = True

    def cut(self) -> None:
        """Resets the connection, as a network does that fails under an upload."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class Server(ThreadingHTTPServer):
    """Answers on a free port of this machine, each connection in a thread of its own."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Any):
        self.hub = hub
        super().__init__(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is no mistake
            self.hub.errors.append(traceback.format_exc())


@dataclass
class Route:
    """An endpoint: a method, a pattern of paths, and what answers."""

    method: str
    path: re.Pattern
    answer: Callable
