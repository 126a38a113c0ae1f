"""Serves Git LFS uploads: the batch call, the storage that takes objects whole or in parts, and the check."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any

from qhub.testing.hub.replies import HubError, Reply, json_reply
from qhub.testing.hub.requests import Request
from qhub.testing.hub.store import Repo

__all__ = ["ROUTES", "STORAGE_ROUTES"]

_MEDIA = "application/vnd.git-lfs+json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def batch(request: Request, kind: str | None, repo_id: str) -> Reply:
    """Say how to upload each object; one that the repository has already gets no upload action."""
    repo = request.repo(kind or "models", repo_id, write=True)
    payload = request.json()
    if payload.get("operation") != "upload":
        raise HubError(422, "Only the LFS operation 'upload' is served: download files by their address")
    multipart = "multipart" in payload.get("transfers", [])
    objects = [_object(request, repo, entry, multipart=multipart) for entry in payload.get("objects", [])]
    # Parts are used object by object, as the header of its upload action says; the real Hub does the same.
    return json_reply({"transfer": "multipart" if multipart else "basic", "objects": objects}, media=_MEDIA)


def verify(request: Request, kind: str | None, repo_id: str) -> Reply:
    """Check that an object arrived whole."""
    repo = request.repo(kind or "models", repo_id, write=True)
    payload = request.json()
    oid = str(payload.get("oid"))
    if oid not in repo.lfs_objects:
        raise HubError(404, f"LFS object {oid} was not uploaded")
    if request.state.store.blobs.lfs_file("", oid).size != payload.get("size"):
        raise HubError(422, f"LFS object {oid} does not have {payload.get('size')} bytes")
    return json_reply({}, media=_MEDIA)


def put_object(request: Request, oid: str) -> Reply:
    """Take a whole object."""
    query = request.signed("put")
    request.state.store.blobs.receive(request.body.pieces(), size=int(query["size"]), sha256=oid)
    _uploaded_to(request, query).lfs_objects.add(oid)
    return Reply(headers={"ETag": f'"{oid}"'})


def put_part(request: Request, oid: str, number: str) -> Reply:
    """Take one part of an object and answer its etag, which the client repeats to complete the upload."""
    query = request.signed("part")
    path, sha256 = request.state.store.blobs.receive(request.body.pieces(), size=int(query["size"]))
    path.replace(_part(path.parent, query, oid, int(number)))
    return Reply(headers={"ETag": f'"{sha256}"'})


def complete(request: Request, oid: str) -> Reply:
    """Put the parts of an object together and check it."""
    query = request.signed("complete")
    entries = request.json().get("parts", [])
    folder = request.state.store.blobs.incoming
    parts = [_part(folder, query, oid, number) for number in range(1, int(query["parts"]) + 1)]
    etags = {entry.get("partNumber"): str(entry.get("etag")).strip('"') for entry in entries}
    for number, part in enumerate(parts, start=1):
        if not part.exists() or hashlib.sha256(part.read_bytes()).hexdigest() != etags.get(number):
            raise HubError(400, f"part {number} of LFS object {oid} is missing or has another etag")
    request.state.store.blobs.receive(_contents(parts), size=int(query["size"]), sha256=oid)
    for part in parts:
        part.unlink()
    _uploaded_to(request, query).lfs_objects.add(oid)
    return json_reply({}, media=_MEDIA)


def _object(request: Request, repo: Repo, entry: Mapping[str, Any], *, multipart: bool) -> dict[str, Any]:
    oid, size = entry.get("oid"), entry.get("size")
    if not (isinstance(oid, str) and _SHA256.fullmatch(oid) and isinstance(size, int) and size >= 0):
        raise HubError(422, f"Malformed LFS object: {entry!r}")
    limits = request.state.limits
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if size > limits.object:
        return {**answer, "error": {"code": 422, "message": f"larger than the {limits.object} bytes allowed"}}
    if oid in repo.lfs_objects:
        return answer
    target: dict[str, str | int] = {"kind": repo.type, "repo": repo.id, "size": size}
    url = request.state.signed_url
    if multipart and size > limits.multipart:
        count = ceil(size / limits.part)
        header = {"chunk_size": str(limits.part)}
        for number in range(1, count + 1):
            length = min(limits.part, size - (number - 1) * limits.part)
            header[str(number)] = url("part", f"/objects/{oid}/parts/{number}", **{**target, "size": length})
        href = url("complete", f"/objects/{oid}/complete", **target, parts=count)
        upload = {"href": href, "header": header}
    else:
        upload = {"href": url("put", f"/objects/{oid}", **target)}
    prefix = "" if repo.type == "model" else f"{repo.type}s/"
    check = {"href": f"{request.state.endpoint}/{prefix}{repo.id}.git/info/lfs/verify"}
    return {**answer, "authenticated": True, "actions": {"upload": upload, "verify": check}}


def _uploaded_to(request: Request, query: Mapping[str, str]) -> Repo:
    repo = request.state.store.get(query["kind"], query["repo"])
    if repo is None:
        raise HubError(404, "Repository not found", code="RepoNotFound")
    return repo


def _part(folder: Path, query: Mapping[str, str], oid: str, number: int) -> Path:
    # The repository is in the name so that two uploads of one object do not share their parts.
    owner = hashlib.sha256(f"{query['kind']}/{query['repo']}".encode()).hexdigest()[:16]
    return folder / f"{oid}-{owner}-{number}"


def _contents(parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        yield part.read_bytes()


_GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs"
_OID = r"/objects/(?P<oid>[0-9a-f]{64})"
ROUTES = (
    ("POST", _GIT + r"/objects/batch", batch),
    ("POST", _GIT + r"/verify", verify),
)
STORAGE_ROUTES = (
    ("PUT", _OID, put_object),
    ("PUT", _OID + r"/parts/(?P<number>[0-9]+)", put_part),
    ("POST", _OID + r"/complete", complete),
)
