"""Serves downloads: a file's address on the Hub, and the storage an LFS file's address redirects to."""

from __future__ import annotations

import re
from urllib.parse import quote

from qhub.testing.hub.replies import FileSlice, HubError, Reply
from qhub.testing.hub.repos import check_gate
from qhub.testing.hub.requests import Request
from qhub.testing.hub.store import StoredFile

__all__ = ["ROUTES", "STORAGE_ROUTES"]

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def resolve(request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Reply:
    """Answer the bytes of a regular file, or where the storage has those of an LFS file."""
    repo = request.repo(kind or "models", repo_id)
    check_gate(request, repo)
    commit = request.commit(repo, revision)
    about = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    file = commit.files.get(path)
    if file is None:
        # The commit goes with it: the client remembers for which one the file is known to be missing.
        raise HubError(404, f"Entry not found: {path}", code="EntryNotFound", headers=about)
    if not file.lfs:
        return _slice(request, file, {**about, "ETag": f'"{file.etag}"'})
    location = request.state.signed_url("get", f"/objects/{file.sha256}", file=path)
    linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    return Reply(302, headers={**about, **linked, "Location": location})


def get_object(request: Request, oid: str) -> Reply:
    """Answer the bytes of an LFS object to whoever has its signed address."""
    file = request.state.store.blobs.lfs_file(request.signed("get")["file"], oid)
    return _slice(request, file, {"Accept-Ranges": "bytes", "ETag": f'"{oid}"'})


def _slice(request: Request, file: StoredFile, headers: dict[str, str]) -> Reply:
    name = quote(file.path.rsplit("/", 1)[-1])
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"inline; filename*=UTF-8''{name}; filename=\"{name}\";",
        **headers,
    }
    wanted = request.headers.get("Range")
    if wanted is None:
        return Reply(200, FileSlice(file.source, file.path, 0, file.size), headers)
    start, end = _wanted_range(wanted, file.size)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    return Reply(206, FileSlice(file.source, file.path, start, end - start), headers)


def _wanted_range(header: str, size: int) -> tuple[int, int]:
    match = _RANGE.fullmatch(header.replace(" ", ""))
    first, last = match.groups() if match else ("", "")
    if first:
        start, end = int(first), min(int(last) + 1 if last else size, size)
    else:
        start, end = max(size - int(last or 0), 0), size
    if start >= end:
        unsatisfied = {"Content-Range": f"bytes */{size}"}
        raise HubError(416, f"The range {header!r} is not in {size} bytes", headers=unsatisfied)
    return start, end


_PLACE = r"(?P<repo_id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES = (("GET", r"/(?:(?P<kind>datasets|spaces)/)?" + _PLACE, resolve),)
STORAGE_ROUTES = (("GET", r"/objects/(?P<oid>[0-9a-f]{64})", get_object),)
