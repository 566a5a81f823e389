# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
A small stand-in of the Hugging Face Hub on this machine, that the genuine clients work with.

It keeps users, repositories, commits, branches and tags in memory, takes large files as git LFS does, whole or in parts,
and answers with the headers and errors of the Hub. Faults can be ordered: statuses, and connections that break.

Large files go by LFS and not by Xet: the client asks no server which of the two to take, so `HF_HUB_DISABLE_XET=1` must
be set, as `environment()` and the fixture `hub` do. A 401 for a missing or private repository carries `X-Error-Code`, as
the client guesses that meaning from the address otherwise, for https alone.
"""

import hashlib
import os
import re
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from tests.hub.endpoints import ROUTES
from tests.hub.repositories import Commit, Repository
from tests.hub.server import Answer, Fault, Refusal, Request, Server


@dataclass(frozen=True)
class Account:
    """What a token may do."""

    name: str
    orgs: tuple[str, ...]
    role: str


class CommitFacts(NamedTuple):
    """A commit as tests look at it."""

    message: str
    paths: list[str]
    description: str
    author: str
    sha: str


class RepositoryFacts(NamedTuple):
    """A repository as tests look at it."""

    id: str
    type: str
    private: bool


class StandIn:
    """
    The stand-in of the Hub.

    Args:
        large_from (`int`, *optional*, defaults to `10_000_000`):
            Size in bytes from which every file is large. Weights, Parquet and binary files always are.
        parts_from (`int`, *optional*, defaults to `5_000_000_000`):
            Size in bytes above which a large file is uploaded in parts.
        part_size (`int`, *optional*, defaults to `100_000_000`):
            Size of such a part in bytes.
        page_size (`int`, *optional*, defaults to `1000`):
            Entries on a page of files or commits.

    Attributes:
        url (`str`):
            Its address, for `HF_ENDPOINT`.
        requests (`list[Request]`):
            All requests: `method`, `path`, `status` (`None` where the connection was closed), `token`, `headers`, `body`.
        unknown (`list[Request]`):
            Those of them that the stand-in has no endpoint for. They get a 404.
        errors (`list[str]`):
            Tracebacks of mistakes in the stand-in itself.
        faults (`list[Fault]`):
            What `fail` ordered; `faults.clear()` lets everything work again.
        waits (`list[float]`):
            Seconds that clients of this process would have slept before they tried again, in the fixture `hub`.
        uploaded_files, uploaded_bytes (`int`):
            Large files that arrived whole, and bytes of large files and of parts that did.
    """

    def __init__(
        self,
        large_from: int = 10_000_000,
        parts_from: int = 5_000_000_000,
        part_size: int = 100_000_000,
        page_size: int = 1000,
    ):
        self.large_from, self.parts_from, self.part_size, self.page_size = large_from, parts_from, part_size, page_size
        self.accounts: dict[str, Account] = {}
        self.contents: dict[tuple[str, str], Repository] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.uploaded_files = self.uploaded_bytes = 0
        self.waits: list[float] = []
        self.secret = os.urandom(8).hex()
        self.lock = threading.RLock()
        self.server: Server | None = None

    def start(self) -> "StandIn":
        self.server = Server(self)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> "StandIn":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    # What tests order and look at

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def unknown(self) -> list[Request]:
        return [request for request in self.requests if not request.known]

    @property
    def repositories(self) -> list[RepositoryFacts]:
        return [RepositoryFacts(id, kind, repository.private) for (kind, id), repository in self.contents.items()]

    def add_user(self, name: str, token: str, orgs: tuple[str, ...] = (), role: str = "write") -> None:
        """
        Adds a token of a user. One user can have several.

        Args:
            name (`str`):
                The user.
            token (`str`):
                The token.
            orgs (`tuple[str, ...]`, *optional*):
                Organisations that the token may act for. Without them it is like a fine-grained token of the user's own
                repositories.
            role (`str`, *optional*, defaults to `"write"`):
                `"write"` or `"read"`.
        """
        self.accounts[token] = Account(name, tuple(orgs), role)

    def fail(
        self,
        method: str,
        path: str,
        status: int | None = None,
        times: int = 1,
        headers: dict[str, str] | None = None,
        cut_after: int | None = None,
        lost: bool = False,
        message: str | None = None,
    ) -> None:
        """
        Lets the next requests fail. Faults are used up in the order in which they were ordered.

        Args:
            method (`str`):
                Method of the request.
            path (`str`):
                Regular expression that is searched in its path. Large files are sent and fetched at `/store/`.
            status (`int`, *optional*):
                Status to answer with. Nothing happens to what is stored.
            times (`int`, *optional*, defaults to `1`):
                Number of requests. A client that retries needs more than one: `huggingface_hub` asks six times.
            headers (`dict[str, str]`, *optional*):
                Headers of the answer, like `{"Retry-After": "7"}`, or `{"X-Error-Code": "GatedRepo"}` with a 403.
            cut_after (`int`, *optional*):
                Bytes after which the connection is closed: of the request's body where it has one, and nothing happens
                to what is stored, else of the answer's.
            lost (`bool`, *optional*, defaults to `False`):
                Whether the request is carried out and the connection closed before the answer.
            message (`str`, *optional*):
                What the Hub says with that status. Defaults to what it mostly says.
        """
        self.faults.append(Fault(method, re.compile(path), status, times, headers or {}, cut_after, lost, message))

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """All files of a repository, with the `.gitattributes` that the Hub puts into each, by their paths."""
        return {path: blob.content for path, blob in sorted(self.find(repo_id, repo_type, revision).files.items())}

    def commits(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> list[CommitFacts]:
        """Commits of a branch, the oldest first; that is the Hub's own, "initial commit"."""
        history = self.find(repo_id, repo_type, revision).history[::-1]
        return [CommitFacts(c.title, c.paths, c.description, c.author, c.sha) for c in history]

    def find(self, repo_id: str, repo_type: str, revision: str) -> Commit:
        """The commit that a revision means."""
        repository = self.contents.get((repo_type, repo_id))
        commit = repository and repository.find(revision)
        if commit is None:
            raise KeyError(f"no {repo_type} {repo_id} at {revision}, but {self.repositories}")
        return commit

    def environment(self, token: str | None = None, home: str | Path | None = None) -> dict[str, str]:
        """
        The environment of this process, with the variables that point a client in another process at the stand-in.

        Args:
            token (`str`, *optional*):
                The token.
            home (`str` or `Path`, *optional*):
                The folder for caches, `HF_HOME`.

        Returns:
            `dict[str, str]`: for the argument `env` of `subprocess.run`.
        """
        ours = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "DATASETS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept.pop("TRANSFORMERS_OFFLINE", None)
        return kept | variables(self.url, token, home)

    # What the server asks

    def take_request(self, request: Request) -> Fault | None:
        """Notes a request, and tells what is to happen to it."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and fault.method == request.method and fault.path.search(request.path):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        path = urlsplit(request.path).path
        with self.lock:
            try:
                for route in ROUTES:
                    found = route.path.fullmatch(path) if route.method == method else None
                    if found:
                        return route.answer(self, request, **arguments(found.groupdict()))
                request.known = False
                print(f"The stand-in of the Hub has no endpoint for {request.method} {request.path}", file=sys.stderr)
                return Refusal(404, "Sorry, we can't find the page you are looking for.").answer
            except Refusal as refusal:
                return refusal.answer
            except Exception:
                self.errors.append(traceback.format_exc())
                print(self.errors[-1], file=sys.stderr)
                return Refusal(500, "A mistake in the stand-in of the Hub").answer

    def account(self, request: Request) -> Account | None:
        """Whose token a request has; `None` without a token."""
        if request.token is None:
            return None
        if request.token not in self.accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.accounts[request.token]

    def can_see(self, account: Account | None, repository: Repository) -> bool:
        return not repository.private or (account is not None and repository.owner in (account.name, *account.orgs))

    def check_write(self, account: Account | None, owner: str, message: str) -> None:
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account.role != "write" or owner not in (account.name, *account.orgs):
            raise Refusal(403, message)

    def repository(self, request: Request, kind: str, id: str, write: bool = False) -> Repository:
        """The repository, if the request may see it, or change it."""
        account = self.account(request)
        repository = self.contents.get((kind, id))
        if repository is None or not self.can_see(account, repository):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if write:
            message = "Forbidden: you must use a write token to upload to a repository."
            self.check_write(account, repository.owner, message)
        return repository

    def page(self, request: Request, entries: list[Any]) -> Answer:
        """A page of entries, with a link to the next."""
        start = int(request.query.get("cursor", ["0"])[0])
        stop = start + int(request.query.get("limit", [self.page_size])[0])
        headers = {}
        if stop < len(entries):
            address = urlsplit(request.path)
            query = [(name, value) for name, value in parse_qsl(address.query) if name != "cursor"]
            link = f"{self.url}{address.path}?{urlencode([*query, ('cursor', stop)])}"
            headers["Link"] = f'<{link}>; rel="next"'
        return Answer(entries[start:stop], headers=headers)

    def signature(self, path: str) -> str:
        return hashlib.sha256((self.secret + path).encode()).hexdigest()[:20]

    def store_url(self, key: str) -> str:
        """A signed address in the store, which is another host, so that clients keep their token from it."""
        return f"http://localhost:{self.server.server_port}/store/{key}?signature={self.signature('/store/' + key)}"

    def check_signature(self, request: Request) -> None:
        if request.token:
            raise Refusal(400, "Only one auth mechanism allowed")
        if request.query.get("signature") != [self.signature(urlsplit(request.path).path)]:
            raise Refusal(403, "The request signature we calculated does not match the signature you provided")


def arguments(groups: dict[str, str | None]) -> dict[str, str | None]:
    """What a path says, as arguments of an endpoint: decoded, and the kind of a repository in the singular."""
    found = {name: value and unquote(value) for name, value in groups.items()}
    if "id" in found:
        found["kind"] = (found.pop("kinds") or "models").removesuffix("s")
    return found


def variables(url: str, token: str | None, home: str | Path | None) -> dict[str, str]:
    """Variables that point a client at an address."""
    local = "127.0.0.1,localhost"
    settings = {
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "NO_PROXY": local,
        "no_proxy": local,
    }
    settings |= {"HF_TOKEN": token} if token else {}
    return settings | ({"HF_HOME": str(home)} if home else {})
