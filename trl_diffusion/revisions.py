# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Revisions of models and files: the commit on the Hub, or a hash of a folder or file."""

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from .files import sha256_of


# Without it, transformers asks on the terminal whether to run code that a model brings
UNTRUSTED = {"trust_remote_code": False}


def resolve_revision(model_name_or_path: str, revision: str | None = None) -> str:
    """
    Resolves the revision of a model.

    Args:
        model_name_or_path (`str`):
            Hub id or folder.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Returns:
        `str`: the commit, or a hash `"sha256:..."` of all files of the folder.

    Raises:
        `ValueError`: If there is no such folder or repository, or the Hub cannot be reached and nothing is cached.
    """
    folder = Path(model_name_or_path)
    if folder.is_dir():
        return _digest_of_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    try:
        config = hf_hub_download(model_name_or_path, "config.json", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError) as error:
        raise ValueError(
            f"{model_name_or_path!r} is neither a folder nor a model on the Hub or in its cache: "
            f"{str(error).splitlines()[0]} Run `hf download {model_name_or_path}` on a machine with network access."
        ) from error
    return commit_of(Path(config), "config.json")


def commit_of(path: Path, filename: str) -> str:
    """The commit of a file in the Hub's cache, whose path is `.../snapshots/<commit>/<filename>`."""
    return path.parents[len(Path(filename).parts) - 1].name


def digest_of_file(path: Path) -> str:
    """The hash `"sha256:..."` of a file, which serves as its revision."""
    return f"sha256:{sha256_of(path)[:16]}"


def pinned(revision: str) -> dict[str, str]:
    """The keyword arguments of `from_pretrained` for a resolved revision. A folder needs none."""
    return {} if revision.startswith("sha256:") else {"revision": revision}


@cache
def package_digest() -> str:
    """A hash of the files of this package: its code, and the pipelines that come with it."""
    folder = Path(str(resources.files("trl_diffusion")))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return _digest_of_files(folder, files)


def _digest_of_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"
