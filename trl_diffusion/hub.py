# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Names of the Hub, and pushing to it: repositories, commits that are repeated, and what a failure says."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .safe_names import check_relative_path


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

NO_TOKEN = "There is no token: run `hf auth login`, or set the environment variable HF_TOKEN."
WAITS = (1, 2, 4, 8)  # seconds before the second try, the third, ...
LONGEST_WAIT = 300  # seconds: the Hub counts requests in windows of five minutes
# Of a commit, 409 and 412 say that another one came in between. Files are pushed whole, so that it can follow that one
TRANSIENT_STATUS = {408, 409, 412, 425, 429, *range(500, 600)}
TRANSIENT_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
NO_ANSWER = (json.JSONDecodeError, KeyError)  # that the client reads: a page of a proxy
# `huggingface_hub` raises OSError with a status, ValueError for names and metadata, RuntimeError around a file that failed
PUSH_ERRORS = (OSError, httpx2.HTTPError, RuntimeError, ValueError, KeyError)

WAYS_OUT = {
    401: "The token is not valid, or sees no such repository: make one that may write at https://huggingface.co/settings/tokens and "
    "run `hf auth login`.",
    403: "The token may not write there: make one that may at https://huggingface.co/settings/tokens, or name a repository of yours.",
    404: "Check the names of the repository and of the branch, and that the token sees them.",
}


def hub_id(name: str | None) -> str | None:
    """The name, unless it is a folder or a file of this machine, which means nothing to anybody else."""
    return name if name and not os.path.exists(name) and not os.path.isabs(name) else None


def has_token(token: str | None = None) -> bool:
    """Whether a token is given, or known from `hf auth login` or the variable HF_TOKEN."""
    return bool(token or get_token())


def check_repository_name(name: str, what: str = "The repository") -> None:
    """
    Refuses a name that no repository of the Hub can have.

    Args:
        name (`str`):
            The name.
        what (`str`, *optional*):
            What the name was given as, for the message.

    Raises:
        `ValueError`: If it is neither `"name"` nor `"user/name"` of the Hub's letters.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{what} {name!r} is no name on the Hub: that is `name` or `user/name`, of letters, digits, `-`, `_` and `.`, at most 96 "
            "each, without `-` or `.` at an end, `--`, `..` or `.git`. Choose another name."
        ) from error


# ----- what failed -----


@contextmanager
def pushing(saved: str, token: str | None = None) -> Iterator[None]:
    """
    Turns what can fail on the way to the Hub into an error that says what is safe.

    Args:
        saved (`str`):
            A sentence that says where the result is.
        token (`str`, *optional*):
            A token that was given.

    Raises:
        `ValueError`: If the Hub cannot be reached or refuses, for example because there is no token.
    """
    try:
        yield
    except PUSH_ERRORS as error:
        reason, way_out = describe_failure(error, token)
        raise ValueError(f"The push to the Hub failed: {reason}. {saved} {way_out}") from _shown(error, token)


def describe_failure(error: BaseException, token: str | None = None) -> tuple[str, str]:
    """
    Says in one line why a push failed, and what to do. A token is never in it.

    Args:
        error (`BaseException`):
            One of `PUSH_ERRORS`.
        token (`str`, *optional*):
            A token that was given.

    Returns:
        `tuple[str, str]`: the reason, without a full stop, and the way out.
    """
    found = _beneath(error)
    if isinstance(found, HfHubHTTPError):
        reason = f"{found.response.status_code} {found.response.reason_phrase}: {found.server_message or ''}".strip(
            ": "
        )
        if (wait := _asked_wait(found)) is not None:
            reason += f" (it asks to wait for {wait:.0f} seconds)"
    elif isinstance(found, OfflineModeIsEnabled | HFValidationError):
        reason = str(found)
    elif isinstance(found, httpx2.HTTPError):
        reason = f"the Hub cannot be reached ({str(found) or type(found).__name__})"
    elif isinstance(found, NO_ANSWER):
        reason = "the Hub's answer cannot be read"
    else:
        reason = str(found) or type(found).__name__
    way_out = "Push again when this is mended."
    if not has_token(token):
        way_out = NO_TOKEN
    elif isinstance(found, HfHubHTTPError):
        way_out = WAYS_OUT.get(found.response.status_code, way_out)
    return without_token(" ".join(reason.split()), token).rstrip("."), way_out


def without_token(text: str, token: str | None = None) -> str:
    """The text, without the token that was given or is known, and without what looks like one."""
    for secret in (token, get_token()):
        text = text.replace(secret.strip(), "<token>") if secret and secret.strip() else text
    return re.sub(r"\bhf_\w{8,}", "<token>", text)


def is_temporary(error: BaseException) -> bool:
    """Whether the same push may succeed later: the Hub was not reached, was busy, or another commit came in between."""
    error = _beneath(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    return isinstance(error, (*TRANSIENT_ERRORS, *NO_ANSWER))


def _beneath(error: BaseException) -> BaseException:
    """What made `huggingface_hub` raise a RuntimeError about one of several files."""
    return _beneath(error.__cause__) if isinstance(error, RuntimeError) and error.__cause__ else error


def _shown(error: BaseException, token: str | None) -> BaseException | None:
    """The error as the cause that a traceback shows, unless it shows the token, as that of a token with a line break does."""
    found: BaseException | None = error
    while found is not None:
        if without_token(str(found), token) != str(found):
            return None
        found = found.__cause__ or found.__context__
    return error


def _asked_wait(error: BaseException) -> float | None:
    """The seconds that the Hub asks to wait for."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    # r requests are left in a window that ends in t seconds
    limit = dict(re.findall(r"\b([rt])=(\d+)", headers.get("RateLimit", "")))
    if error.response.status_code == 429 and limit.get("r") == "0" and "t" in limit:
        return float(limit["t"]) + 1
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(parsedate_to_datetime(asked).timestamp() - time.time(), 0)
    except ValueError:
        return None


def _patiently(call: Callable[[], Result], what: str, token: str | None) -> Result:
    """Calls again, at most four times, after waits that are said, as long as what failed may succeed later."""
    for wait in WAITS:
        try:
            return call()
        except PUSH_ERRORS as error:
            asked = _asked_wait(_beneath(error))
            wait = wait if asked is None else asked
            if not is_temporary(error) or wait > LONGEST_WAIT:
                raise
            reason, _ = describe_failure(error, token)
            logger.warning(f"{what} failed: {reason}. It is tried again in {wait:.0f} seconds.")
        time.sleep(wait)
    return call()


# ----- repositories and commits -----


def list_files(
    repo_id: str, revision: str | None = None, token: str | None = None, repo_type: str = "model"
) -> list[str]:
    """The paths of the files in a repository."""
    api = HfApi(token=token)
    return _patiently(
        lambda: api.list_repo_files(repo_id, revision=revision, repo_type=repo_type),
        f"Listing the files of {repo_id}",
        token,
    )


def create_repository(
    repo_id: str,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Creates a repository where there is none, and the branch to push to, and checks that the token may write there.

    Args:
        repo_id (`str`):
            `"user/name"`, or `"name"` for a repository of the token's user.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to what its owner has set.
        revision (`str`, *optional*):
            The branch.
        token (`str`, *optional*):
            A token with the right to write. Defaults to that of `hf auth login` or HF_TOKEN.

    Returns:
        `str`: the whole name, `"user/name"`.

    Raises:
        `ValueError`: If no repository can have this name.
    """
    check_repository_name(repo_id)
    api = HfApi(token=token)

    def create() -> str:
        return api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id

    def create_branch() -> None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)

    repo_id = _patiently(create, f"Creating the repository {repo_id}", token)
    try:
        api.auth_check(repo_id, repo_type=repo_type, write=True)  # a repository that exists was not created
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
    except (OSError, httpx2.HTTPError):
        pass  # the push itself will say it
    if revision and not revision.startswith("refs/"):
        _patiently(create_branch, f"Creating the branch {revision} of {repo_id}", token)
    return repo_id


def push_files(
    files: dict[str, Path | bytes],
    repo_id: str,
    *,
    commit_message: str,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | None = None,
    delete: Iterable[str] = (),
    uploaded: Iterable[CommitOperationAdd] = (),
) -> str:
    """
    Pushes files in one commit: all of them arrive, or none does. What may succeed later is tried again; a commit whose answer was
    lost is not made twice, because files that are there already are left out of it, and large ones are uploaded once.

    Args:
        files (`dict[str, Path | bytes]`):
            Files, or what they hold, by their paths in the repository.
        repo_id (`str`):
            The whole name of the repository, which exists.
        commit_message (`str`):
            Message of the commit.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.
        revision (`str`, *optional*):
            The branch, which exists.
        token (`str`, *optional*):
            A token with the right to write.
        delete (`Iterable[str]`, *optional*):
            Paths in the repository that the same commit deletes.
        uploaded (`Iterable[CommitOperationAdd]`, *optional*):
            Files that [`~huggingface_hub.HfApi.preupload_lfs_files`] has uploaded, which the same commit adds.

    Returns:
        `str`: the address of the commit, a [`~huggingface_hub.CommitInfo`].

    Raises:
        `ValueError`: If a path leads out of the repository.
    """
    for name in files:
        check_relative_path(name, "path in the repository")
    api = HfApi(token=token)
    deleted, added, is_repeated = list(delete), list(uploaded), False

    def commit() -> str:
        nonlocal deleted, added, is_repeated
        if is_repeated and (deleted or added):  # the answer to the try before may be all that was lost
            names = [*deleted, *(addition.path_in_repo for addition in added)]
            known = api.get_paths_info(repo_id, names, repo_type=repo_type, revision=revision)
            there = {file.path: getattr(file, "lfs", None) for file in known}  # a folder has none
            deleted = [name for name in deleted if name.rstrip("/") in there]
            added = [
                each
                for each in added
                if (lfs := there.get(each.path_in_repo)) is None or lfs.sha256 != each.upload_info.sha256.hex()
            ]
        is_repeated = True
        # Anew each time: an operation that was tried keeps what the Hub said of its file then
        operations = [
            *added,
            *(CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()),
            *(CommitOperationDelete(name) for name in deleted),
        ]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, repo_type=repo_type, revision=revision
        )

    return _patiently(commit, f"The push to {repo_id}", token)
