# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Names of the Hub, and pushing to it: the token, and what a failure leaves."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token


NO_TOKEN = "There is no token: run `hf auth login`, or set the environment variable HF_TOKEN."


def hub_id(name: str | None) -> str | None:
    """The name, unless it is a folder or a file of this machine, which means nothing to anybody else."""
    return name if name and not os.path.exists(name) and not os.path.isabs(name) else None


def has_token(token: str | None = None) -> bool:
    """Whether a token is given, or known from `hf auth login` or the variable HF_TOKEN."""
    return bool(token or get_token())


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
    except (OSError, httpx2.HTTPError) as error:  # among the former all of `huggingface_hub`
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        way_out = "Push again when this is mended." if has_token(token) else NO_TOKEN
        raise ValueError(f"The push to the Hub failed: {reason.rstrip('.')}. {saved} {way_out}") from error


def create_repository(
    repo_id: str,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Creates a repository where there is none, and the branch to push to.

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
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
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
) -> str:
    """
    Pushes files in one commit: all of them arrive, or none does.

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

    Returns:
        `str`: the address of the commit.
    """
    operations = [
        CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in delete]
    commit = HfApi(token=token).create_commit(
        repo_id, operations, commit_message=commit_message, repo_type=repo_type, revision=revision
    )
    return commit.commit_url
