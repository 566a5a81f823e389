# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Files of repositories: lists of them, and what they hold."""

import re
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, quote

from tests.hub.repositories import Blob, Commit, Repository
from tests.hub.server import Answer, Refusal, Request


def date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def revision_of(repository: Repository, revision: str) -> Commit:
    commit = repository.find(revision)
    if commit is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def blob_of(commit: Commit, path: str) -> Blob:
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    return commit.files[path]


def described(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """A file or a folder as the Hub describes it."""
    if path in commit.files:
        blob = commit.files[path]
        entry = {"type": "file", "oid": blob.git_id, "size": len(blob.content), "path": path}
        if blob.is_large:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
        if expand:
            scans = {"avScan": None, "pickleImportScan": None}
            entry["securityFileStatus"] = {"status": "safe"} | scans
    else:
        entry = {"type": "directory", "oid": commit.sha, "size": 0, "path": path}
    if expand:
        last = commit.last_change(path)
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": date(last.date)}
    return entry


def folders_of(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def is_true(values: list[str]) -> bool:
    return any(value.lower() in ("true", "1") for value in values)


def list_tree(hub, request: Request, kind: str, id: str, revision: str, path: str | None) -> Answer:
    commit = revision_of(hub.repository(request, kind, id), revision)
    folder = (path or "").strip("/")
    inside = folder + "/" if folder else ""
    files = [name for name in commit.files if name.startswith(inside)]
    if folder and not files:
        message = f"{folder} does not exist on {revision!r}"
        raise Refusal(404, message, "EntryNotFound", {"X-Repo-Commit": commit.sha})
    names = {name for file in files for name in [file, *folders_of(file)] if name.startswith(inside)}
    if not is_true(request.query.get("recursive", [])):
        names = {name for name in names if "/" not in name.removeprefix(inside)}
    expand = is_true(request.query.get("expand", []))
    return hub.page(request, [described(commit, name, expand) for name in sorted(names)])


def paths_information(hub, request: Request, kind: str, id: str, revision: str) -> Answer:
    commit = revision_of(hub.repository(request, kind, id), revision)
    form = parse_qs(request.body.decode())
    known = set(commit.files) | {folder for file in commit.files for folder in folders_of(file)}
    expand = is_true(form.get("expand", []))
    return Answer([described(commit, path, expand) for path in form.get("paths", []) if path in known])


def part_of(content: bytes, asked: str | None, headers: dict[str, str]) -> Answer:
    """A file, or the part of it that a Range header asks for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if not found or not any(found.groups()):
        return Answer(content, headers=headers)
    first, last = found.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        raise Refusal(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return Answer(content[start:stop], 206, headers)


def resolve(hub, request: Request, kind: str, id: str, revision: str, path: str) -> Answer:
    """A file: what is in git at once, what is beside it from a store that lets in whoever has the signed address."""
    commit = revision_of(hub.repository(request, kind, id), revision)
    blob = blob_of(commit, path)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.git_id}"'}
    if blob.is_large:
        headers |= {
            "X-Linked-Size": str(len(blob.content)),
            "X-Linked-ETag": f'"{blob.sha256}"',
            "Location": hub.store_url(f"{kind}/{id}/{blob.sha256}"),
        }
        return Answer({}, 302, headers)
    name = quote(path.split("/")[-1])
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
    return part_of(blob.content, request.headers.get("range"), headers)


def raw(hub, request: Request, kind: str, id: str, revision: str, path: str) -> Answer:
    """A file as git has it: of a large one its pointer."""
    commit = revision_of(hub.repository(request, kind, id), revision)
    blob = blob_of(commit, path)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.git_id}"', "Content-Type": "text/plain"}
    return Answer(blob.pointer if blob.is_large else blob.content, headers=headers)


def stored(hub, request: Request, key: str) -> Answer:
    """A large file from the store."""
    hub.check_signature(request)
    kind, owner, name, oid = key.split("/")
    content = hub.contents[kind, f"{owner}/{name}"].large_files[oid]
    return part_of(content, request.headers.get("range"), {"ETag": f'"{oid}"'})
