# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A folder that replaces the Hub, which `load_dataset` can read."""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl


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
        self.on_upload: Callable[[Path], None] = lambda path: (
            None
        )  # called with each file that may be deleted before its commit
        self.ahead: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        monkeypatch.setattr(tempfile, "tempdir", str(self.scratch))
        for name in ("create_repo", "create_branch", "preupload_lfs_files", "create_commit", "list_repo_files"):
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
        return RepoUrl(f"https://huggingface.co/datasets/{REPO}")

    def list_repo_files(self, **kwargs) -> list[str]:
        return self.files

    def preupload_lfs_files(self, additions: list[CommitOperationAdd], free_memory: bool = True, **kwargs):
        for addition in additions:
            with addition.as_file() as file:
                self.ahead[addition.path_in_repo] = file.read()
            if free_memory:
                self.on_upload(Path(addition.path_or_fileobj))
                addition.path_or_fileobj = b""

    def create_commit(self, operations: list, **kwargs):
        self.commits.append([operation.path_in_repo for operation in operations])
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(exist_ok=True)
            if isinstance(operation, CommitOperationDelete):
                path.unlink()
            elif operation.path_in_repo in self.ahead:
                path.write_bytes(self.ahead.pop(operation.path_in_repo))
            else:
                with operation.as_file() as file:
                    path.write_bytes(file.read())
        return CommitInfo(f"https://huggingface.co/datasets/{REPO}/commit/{len(self.commits)}", "", "", "0" * 40)
