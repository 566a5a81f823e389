# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Repositories as the Hub keeps them: commits that never change, branches and tags that name them."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property


# The beginning of what the Hub puts into a new repository: these files are large whatever their size.
GIT_ATTRIBUTES = b"".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n".encode()
    for pattern in (
        *("*.7z", "*.arrow", "*.bin", "*.ckpt", "*.gz", "*.h5", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.parquet"),
        *("*.pickle", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.tar", "*.tgz", "*.zip", "*.zst", "*tfevents*"),
    )
)


@dataclass(frozen=True)
class Blob:
    """A file's content, in git or beside it."""

    content: bytes
    is_large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def git_id(self) -> str:
        in_git = self.pointer if self.is_large else self.content
        return hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_id


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of the repository as they are after it."""

    sha: str
    parent: "Commit | None"
    title: str
    description: str
    author: str
    date: datetime
    files: dict[str, Blob]

    @property
    def paths(self) -> list[str]:
        """Paths that this commit added, changed or deleted, in their order."""
        before = self.parent.files if self.parent else {}
        return sorted(path for path in before.keys() | self.files.keys() if before.get(path) != self.files.get(path))

    @property
    def history(self) -> "list[Commit]":
        """This commit and its ancestors, the newest first."""
        commit, commits = self, []
        while commit:
            commits.append(commit)
            commit = commit.parent
        return commits

    def last_change(self, path: str) -> "Commit":
        """The newest commit that changed a file, or something in a folder."""
        inside = path + "/"
        return next(c for c in self.history if any(p == path or p.startswith(inside) for p in c.paths))


@dataclass
class Repository:
    """
    A repository.

    Args:
        kind (`str`):
            `"model"`, `"dataset"` or `"space"`.
        id (`str`):
            `"user/name"`.
        private (`bool`):
            Whether only its owner and members of its organisation see it.
    """

    kind: str
    id: str
    private: bool
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit's id means."""
        return self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)

    def commit(self, branch: str, files: dict[str, Blob], title: str, description: str, author: str) -> Commit:
        """Makes `files` all that is on a branch."""
        parent = self.branches.get(branch)
        digest = hashlib.sha1(repr((self.kind, self.id, parent and parent.sha, title, len(self.commits))).encode())
        for path, blob in sorted(files.items()):
            digest.update(f"{path}:{blob.git_id}".encode())
        commit = Commit(digest.hexdigest(), parent, title, description, author, datetime.now(UTC), dict(files))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit
        return commit

    def is_large(self, path: str, size: int, sample: bytes, commit: Commit, large_from: int) -> bool:
        """Whether a file is kept beside git: `.gitattributes` says so, it is too large for git, or it is no text."""
        if size >= large_from or b"\0" in sample:
            return True
        attributes = commit.files.get(".gitattributes")
        lines = attributes.content.decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        return any(fnmatch(path, pattern) or fnmatch(path.split("/")[-1], pattern) for pattern in patterns)
