# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A folder that replaces the Hub, which `load_dataset` can read."""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects


REPO = "user/annotated"


class FakeHub:
    """
    Takes the place of every method of `HfApi` that a push calls; any other reaches for the network, and fails.

    Args:
        folder (`Path`):
            The repository.
        monkeypatch (`pytest.MonkeyPatch`):
            Puts things back in their places.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder / "hub"
        self.folder.mkdir()
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.created: list[dict] = []
        self.on_upload: Callable[[Path], None] = lambda path: None  # called with each file before its commit
        self.ahead: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        monkeypatch.setattr(tempfile, "tempdir", str(self.scratch))
        methods = (
            "create_repo",
            "preupload_lfs_files",
            "create_commit",
            "list_repo_files",
            "upload_folder",
            "upload_file",
        )
        for name in methods:
            monkeypatch.setattr(HfApi, name, self.checked(name, getattr(HfApi, name)))

    def checked(self, name: str, original: Callable) -> Callable:
        """Replaces the original method, and checks that the original accepts the arguments."""

        def call(api: HfApi, *args, **kwargs):
            bound = inspect.signature(original).bind(api, *args, **kwargs).arguments
            bound.pop("self")
            assert bound.pop("repo_id") == REPO and bound.pop("repo_type") == "dataset"
            return getattr(self, name)(**bound)

        return call

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def create_repo(self, **kwargs):
        assert kwargs["exist_ok"]
        self.created.append(kwargs)

    def list_repo_files(self, **kwargs) -> list[str]:
        return self.files

    def preupload_lfs_files(self, additions: list[CommitOperationAdd], **kwargs):
        for addition in additions:
            with addition.as_file() as file:
                self.ahead[addition.path_in_repo] = file.read()
            self.on_upload(Path(addition.path_or_fileobj))

    def create_commit(self, operations: list, **kwargs):
        self.commits.append([operation.path_in_repo for operation in operations])
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(exist_ok=True)
            if isinstance(operation, CommitOperationDelete):
                path.unlink()
            else:
                path.write_bytes(self.ahead.pop(operation.path_in_repo))

    def upload_folder(self, folder_path: Path, allow_patterns: list[str], delete_patterns: list[str], **kwargs):
        for name in filter_repo_objects(self.files, allow_patterns=delete_patterns):
            (self.folder / name).unlink()
        found = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(found, allow_patterns=allow_patterns):
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_bytes((Path(folder_path) / name).read_bytes())

    def upload_file(self, path_in_repo: str, path_or_fileobj: bytes, **kwargs):
        (self.folder / path_in_repo).parent.mkdir(exist_ok=True)
        (self.folder / path_in_repo).write_bytes(path_or_fileobj)
