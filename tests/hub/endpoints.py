# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the stand-in answers: one function for each endpoint of the Hub that the clients call."""

import base64
import json
import re
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import yaml

from tests.hub.card_rules import check_card, split_card
from tests.hub.files import date, list_tree, paths_information, raw, resolve, revision_of, stored
from tests.hub.large_files import ROUTES as LARGE_FILE_ROUTES
from tests.hub.repositories import GIT_ATTRIBUTES, Blob, Commit, Repository
from tests.hub.server import Answer, Refusal, Request, Route


KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
EXPANDABLE = {"lastModified", "createdAt", "private", "gated", "disabled", "downloads", "likes", "sha", "author"}
EXPANDABLE |= {"tags", "cardData", "siblings", "library_name", "pipeline_tag", "usedStorage", "model-index"}


def branch_of(repository: Repository, branch: str) -> Commit:
    if branch not in repository.branches:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return repository.branches[branch]


# Accounts


def who_am_i(hub, request: Request) -> Answer:
    account = hub.account(request)
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    organizations = [{"type": "org", "name": name, "roleInOrg": account.role} for name in account.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
    return Answer(
        {"type": "user", "id": account.name, "name": account.name, "fullname": account.name, "orgs": organizations}
        | {"isPro": False, "auth": token}
    )


def check_access(hub, request: Request, kind: str, id: str, write: str | None) -> Answer:
    hub.repository(request, kind, id, write=bool(write))
    return Answer({})


# Repositories


def create_repository(hub, request: Request) -> Answer:
    asked = request.json
    kind = asked.get("type") or "model"
    account = hub.account(request)
    owner = asked.get("organization") or (account.name if account else "")
    hub.check_write(account, owner, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
    id = f"{owner}/{asked['name']}"
    url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{id}"
    if (kind, id) in hub.contents:
        raise Refusal(409, f"You already created this {kind} repo", url=url)
    repository = Repository(kind, id, private=asked.get("visibility") == "private")
    repository.commit("main", {".gitattributes": Blob(GIT_ATTRIBUTES, False)}, "initial commit", "", account.name)
    hub.contents[kind, id] = repository
    return Answer({"url": url, "name": id, "id": id})


def delete_repository(hub, request: Request) -> Answer:
    asked = request.json
    kind = asked.get("type") or "model"
    owner = asked.get("organization") or hub.account(request).name
    repository = hub.repository(request, kind, f"{owner}/{asked['name']}", write=True)
    del hub.contents[kind, repository.id]
    return Answer({})


def move_repository(hub, request: Request) -> Answer:
    asked = request.json
    repository = hub.repository(request, asked["type"], asked["fromRepo"], write=True)
    owner = asked["toRepo"].split("/")[0]
    hub.check_write(hub.account(request), owner, f"You don't have the rights to move a repo to {owner!r}")
    del hub.contents[asked["type"], repository.id]
    hub.contents[asked["type"], asked["toRepo"]] = replace(repository, id=asked["toRepo"])
    return Answer({})


def change_settings(hub, request: Request, kind: str, id: str) -> Answer:
    repository = hub.repository(request, kind, id, write=True)
    if "visibility" in request.json:
        repository.private = request.json["visibility"] == "private"
    return Answer({"private": repository.private})


def information(repository: Repository, commit: Commit, with_blobs: bool) -> dict[str, Any]:
    card = commit.files.get("README.md")
    data = (split_card(card.content.decode())[0] if card else None) or {}
    is_pipeline = repository.kind == "model" and "model_index.json" in commit.files
    library = data.get("library_name") or ("diffusers" if is_pipeline else None)
    tags = [library, data.get("pipeline_tag"), *(data.get("tags") or [])]
    tags += [f"license:{data['license']}"] if isinstance(data.get("license"), str) else []
    bases = data.get("base_model") or []
    tags += [f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases)]
    siblings = []
    for path, blob in sorted(commit.files.items()):
        sibling = {"rfilename": path}
        if with_blobs:
            sibling |= {"blobId": blob.git_id, "size": len(blob.content)}
            if blob.is_large:
                sibling["lfs"] = {
                    "sha256": blob.sha256,
                    "size": len(blob.content),
                    "pointerSize": len(blob.pointer),
                }
        siblings.append(sibling)
    return {
        "_id": repository.id,
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.owner,
        "sha": commit.sha,
        "lastModified": date(commit.date),
        "createdAt": date(repository.created),
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
        "library_name": library,
        "pipeline_tag": data.get("pipeline_tag"),
        "model-index": data.get("model-index"),
        "cardData": data or None,
        "siblings": siblings,
        "usedStorage": sum(len(content) for content in repository.large_files.values()),
    }


def repository_information(hub, request: Request, kind: str, id: str, revision: str | None) -> Answer:
    repository = hub.repository(request, kind, id)
    commit = revision_of(repository, revision or "main")
    facts = information(repository, commit, with_blobs="blobs" in request.query)
    wanted = request.query.get("expand", []) + request.query.get("expand[]", [])
    if unknown := set(wanted) - EXPANDABLE:
        raise Refusal(400, f"Invalid property to expand: {', '.join(sorted(unknown))}")
    if wanted:
        facts = {name: facts[name] for name in ["_id", "id", *wanted]}
    return Answer({name: value for name, value in facts.items() if value is not None})


def list_repositories(hub, request: Request, kinds: str) -> Answer:
    author, word = request.query.get("author", [""])[0], request.query.get("search", [""])[0]
    account = hub.account(request)
    return Answer(
        [
            information(repository, repository.branches["main"], with_blobs=False)
            for (kind, id), repository in sorted(hub.contents.items())
            if kind == KINDS[kinds] and word.lower() in id.lower() and author in ("", repository.owner)
            if hub.can_see(account, repository)
        ]
    )


# Commits, branches and tags


def list_references(hub, request: Request, kind: str, id: str) -> Answer:
    repository = hub.repository(request, kind, id)

    def named(names: dict[str, Commit], prefix: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": prefix + n, "targetCommit": c.sha} for n, c in names.items()]

    pulls = {name: commit for name, commit in repository.branches.items() if name.startswith("refs/pr/")}
    branches = {name: commit for name, commit in repository.branches.items() if name not in pulls}
    references = {"branches": named(branches, "refs/heads/"), "tags": named(repository.tags, "refs/tags/")}
    return Answer(references | {"converts": [], "pullRequests": named(pulls, "")})


def create_branch(hub, request: Request, kind: str, id: str, name: str) -> Answer:
    repository = hub.repository(request, kind, id, write=True)
    if name in repository.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repository.branches[name] = revision_of(repository, request.json.get("startingPoint", "main"))
    return Answer({})


def delete_branch(hub, request: Request, kind: str, id: str, name: str) -> Answer:
    repository = hub.repository(request, kind, id, write=True)
    if name == "main":
        raise Refusal(403, "Cannot delete the default branch")
    branch_of(repository, name)
    del repository.branches[name]
    return Answer({})


def create_tag(hub, request: Request, kind: str, id: str, name: str) -> Answer:
    repository = hub.repository(request, kind, id, write=True)
    tag = request.json["tag"]
    if tag in repository.tags:
        raise Refusal(409, f"Reference already exists: refs/tags/{tag}")
    repository.tags[tag] = revision_of(repository, name)
    return Answer({})


def delete_tag(hub, request: Request, kind: str, id: str, name: str) -> Answer:
    repository = hub.repository(request, kind, id, write=True)
    if name not in repository.tags:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repository.tags[name]
    return Answer({})


def list_commits(hub, request: Request, kind: str, id: str, revision: str) -> Answer:
    commits = revision_of(hub.repository(request, kind, id), revision).history
    return hub.page(
        request,
        [
            {"id": commit.sha, "title": commit.title, "message": commit.description, "date": date(commit.date)}
            | {"authors": [{"user": commit.author}]}
            for commit in commits
        ],
    )


def preupload(hub, request: Request, kind: str, id: str, revision: str) -> Answer:
    repository = hub.repository(request, kind, id, write=True)
    commit = branch_of(repository, revision)
    in_repository = commit.files[".gitignore"].content.decode() if ".gitignore" in commit.files else ""
    ignored = [
        line.strip().rstrip("/")
        for line in request.json.get("gitIgnore", in_repository).splitlines()
        if line.strip() and not line.startswith("#")
    ]
    files = []
    for file in request.json["files"]:
        path = file["path"]
        sample = base64.b64decode(file["sample"])
        is_large = repository.is_large(path, file["size"], sample, commit, hub.large_from)
        names = [path, *path.split("/")]
        files.append(
            {
                "path": path,
                "uploadMode": "lfs" if is_large else "regular",
                "shouldIgnore": any(fnmatch(name, pattern) for name in names for pattern in ignored),
                "oid": commit.files[path].etag if path in commit.files else None,
            }
        )
    return Answer({"files": files, "commitOid": commit.sha})


def commit(hub, request: Request, kind: str, id: str, revision: str) -> Answer:
    """Checks all operations, then makes the commit: all of it happens, or nothing."""
    repository = hub.repository(request, kind, id, write=True)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    before = branch_of(repository, revision)
    parent = header.get("parentCommit")
    if parent and not before.sha.startswith(parent):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(before.files)
    for line in lines[1:]:
        operation, value = line["key"], line["value"]
        path = value["path"]
        if operation == "file":
            files[path] = Blob(base64.b64decode(value["content"]), False)
        elif operation == "lfsFile":
            if value["oid"] not in repository.large_files:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path} ({value['oid']})")
            files[path] = Blob(repository.large_files[value["oid"]], True)
        elif operation == "deletedFile":
            if path not in files:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del files[path]
        elif operation == "deletedFolder":
            files = {name: blob for name, blob in files.items() if not name.startswith(path.rstrip("/") + "/")}
        else:
            raise Refusal(400, f"Unknown operation: {operation}")
    card = files.get("README.md")
    if card is not None and card != before.files.get("README.md"):
        errors, _ = check_card(card.content.decode(), kind)
        if errors:
            raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
    branch, pull = revision, None
    if "create_pr" in request.query:
        pull = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
        branch = f"refs/pr/{pull}"
        repository.branches[branch] = before
    account = hub.account(request)
    made = repository.commit(branch, files, header["summary"], header["description"], account.name)
    url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{id}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}", "hookOutput": ""}
    return Answer(answer | ({"pullRequestUrl": f"{url}/discussions/{pull}"} if pull else {}))


# Cards


def validate_card(hub, request: Request) -> Answer:
    try:
        errors, warnings = check_card(request.json["content"], request.json["repoType"])
    except yaml.YAMLError as error:
        errors, warnings = [str(error)], []
    content = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return Answer(content, 400 if errors else 200)


def agents(hub, request: Request) -> Answer:
    """The client asks which programs may call it, for its User-Agent header."""
    return Answer({"standardEnvVars": [], "harnesses": {}})


ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kinds>models|datasets|spaces)/{ID}"
PAGE = rf"/(?:(?P<kinds>datasets|spaces)/)?{ID}"
REVISION, NAME = r"(?P<revision>[^/]+)", r"(?P<name>.+)"

ROUTES = [
    *LARGE_FILE_ROUTES,
    *(
        Route(method, re.compile(path), answer)
        for method, path, answer in [
            ("GET", "/api/whoami-v2", who_am_i),
            ("GET", "/api/agent-harnesses", agents),
            ("POST", "/api/validate-yaml", validate_card),
            ("POST", "/api/repos/create", create_repository),
            ("DELETE", "/api/repos/delete", delete_repository),
            ("POST", "/api/repos/move", move_repository),
            ("GET", "/api/(?P<kinds>models|datasets|spaces)", list_repositories),
            ("PUT", f"{API}/settings", change_settings),
            ("GET", f"{API}/auth-check(?P<write>/write)?", check_access),
            ("GET", f"{API}/refs", list_references),
            ("POST", f"{API}/branch/{NAME}", create_branch),
            ("DELETE", f"{API}/branch/{NAME}", delete_branch),
            ("POST", f"{API}/tag/{NAME}", create_tag),
            ("DELETE", f"{API}/tag/{NAME}", delete_tag),
            ("GET", f"{API}/commits/{REVISION}", list_commits),
            ("POST", f"{API}/preupload/{REVISION}", preupload),
            ("POST", f"{API}/commit/{REVISION}", commit),
            ("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?", list_tree),
            ("POST", f"{API}/paths-info/{REVISION}", paths_information),
            ("GET", f"{API}(?:/revision/{REVISION})?", repository_information),
            ("GET", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)", resolve),
            ("GET", f"{PAGE}/raw/{REVISION}/(?P<path>.+)", raw),
            ("GET", "/store/(?P<key>.+)", stored),
        ]
    ),
]
