# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Uploading of large files: the batch endpoint of git LFS, and a store that takes them whole or in parts."""

import hashlib
import re

from tests.hub.server import Answer, Refusal, Request, Route


def batch(hub, request: Request, kind: str, id: str) -> Answer:
    """Says for each file whether it is still needed, and where to send it."""
    repository = hub.repository(request, kind, id, write=True)
    objects = []
    for file in request.json["objects"]:
        oid, size = file["oid"], file["size"]
        if oid in repository.large_files:
            objects.append({"oid": oid, "size": size})
            continue
        key = f"{kind}/{id}/{oid}"
        verify = {"href": f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{id}.git/info/lfs/objects/verify"}
        if size > hub.parts_from:
            count = -(-size // hub.part_size)
            header = {str(n): hub.store_url(f"{key}/{n}") for n in range(1, count + 1)}
            header["chunk_size"] = str(hub.part_size)
            upload = {"href": hub.store_url(f"{key}/complete"), "header": header}
        else:
            upload = {"href": hub.store_url(key)}
        objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    return Answer({"transfer": "basic", "objects": objects})


def verify(hub, request: Request, kind: str, id: str) -> Answer:
    content = hub.repository(request, kind, id, write=True).large_files.get(request.json["oid"])
    if content is None or len(content) != request.json["size"]:
        raise Refusal(404, "The file was not uploaded")
    return Answer({})


def keep(hub, key: str, content: bytes) -> None:
    """Keeps a large file, if it is what its name says."""
    kind, owner, name, oid = key.split("/")
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, "BadDigest: The SHA256 you specified did not match the calculated checksum")
    hub.contents[kind, f"{owner}/{name}"].large_files[oid] = content
    hub.uploaded_files += 1


def receive(hub, request: Request, key: str) -> Answer:
    hub.check_signature(request)
    keep(hub, key, request.body)
    hub.uploaded_bytes += len(request.body)
    return Answer(b"")


def receive_part(hub, request: Request, key: str, number: str) -> Answer:
    hub.check_signature(request)
    hub.parts.setdefault(key, {})[int(number)] = request.body
    hub.uploaded_bytes += len(request.body)
    return Answer(b"", headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def complete(hub, request: Request, key: str) -> Answer:
    hub.check_signature(request)
    parts = hub.parts.pop(key)
    asked = [(part["partNumber"], part["etag"]) for part in request.json["parts"]]
    if asked != [(n, f'"{hashlib.md5(content).hexdigest()}"') for n, content in sorted(parts.items())]:
        raise Refusal(400, "InvalidPart: One or more of the specified parts could not be found")
    keep(hub, key, b"".join(content for _, content in sorted(parts.items())))
    return Answer({})


LFS = r"/(?:(?P<kinds>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects"
KEY = r"/store/(?P<key>[^/]+/[^/]+/[^/]+/[0-9a-f]{64})"

ROUTES = [
    Route("POST", re.compile(f"{LFS}/batch"), batch),
    Route("POST", re.compile(f"{LFS}/verify"), verify),
    Route("PUT", re.compile(KEY), receive),
    Route("PUT", re.compile(KEY + r"/(?P<number>\d+)"), receive_part),
    Route("POST", re.compile(f"{KEY}/complete"), complete),
]
