"""Serves the endpoints that change files: check a card, choose how each file travels, make a commit."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from qhub.testing.hub.card import card_problems
from qhub.testing.hub.replies import HubError, Reply, json_reply
from qhub.testing.hub.repos import repo_url
from qhub.testing.hub.requests import REPO_API, Request
from qhub.testing.hub.store import LFS_PATTERNS, Commit, Repo, StoredFile

__all__ = ["ROUTES", "check_path", "uses_lfs"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_path(path: Any) -> str:
    """Return a path that is safe in a repository. Raises HubError 400 for any other."""
    text = path if isinstance(path, str) else ""
    parts = text.split("/")
    if not text.isprintable() or "\\" in text or any(part in ("", ".", "..", ".git") for part in parts):
        raise HubError(400, f"Invalid path in the repository: {path!r}")
    return text


def uses_lfs(path: str, size: int, threshold: int) -> bool:
    """Tell whether a file is stored with LFS: by its name, as in ``.gitattributes``, or for its size."""
    name = path.rsplit("/", 1)[-1]
    return size > threshold or any(fnmatchcase(name, pattern) for pattern in LFS_PATTERNS)


def validate_yaml(request: Request) -> Reply:
    """Check a model card."""
    errors, warnings = card_problems(str(request.json().get("content", "")))
    payload = {key: [{"message": m} for m in v] for key, v in (("errors", errors), ("warnings", warnings))}
    return json_reply(payload, status=400 if errors else 200)


def preupload(request: Request, kind: str, repo_id: str, revision: str) -> Reply:
    """Say for each file whether it goes through LFS, and what is there now under its path."""
    repo = _repo_to_change(request, kind, repo_id)
    commit = request.commit(repo, revision)
    answers = []
    for file in request.json().get("files", []):
        path = check_path(file.get("path"))
        lfs = uses_lfs(path, int(file.get("size", 0)), request.state.limits.lfs)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in commit.files:
            # The client compares it with its own hash and leaves unchanged files out of the commit.
            answer["oid"] = commit.files[path].etag
        answers.append(answer)
    return json_reply({"files": answers, "commitOid": commit.oid})


def commit(request: Request, kind: str, repo_id: str, revision: str) -> Reply:
    """Make one commit of all the operations in an NDJSON body, on a branch or as a new pull request."""
    repo = _repo_to_change(request, kind, repo_id)
    header: Mapping[str, Any] = {}
    operations = []
    for key, value in _lines(request):
        if key == "header":
            header = value
        else:
            operations.append((key, value))
    if not header.get("summary"):
        raise HubError(400, "The commit has no summary")
    with repo.lock:
        parent = request.commit(repo, revision)
        ref = repo.branch(revision)
        if request.flag("create_pr"):
            ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
        elif ref is None:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        if not parent.oid.startswith(header.get("parentCommit") or ""):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        done = repo.commit(
            _apply(request, repo, parent, operations),
            title=str(header["summary"]),
            message=str(header.get("description", "")),
            author=request.need_user(),
            parent=parent.oid,
            ref=ref,
        )
    url = repo_url(request, repo.type, repo.id)
    payload = {"success": True, "commitOid": done.oid, "commitUrl": f"{url}/commit/{done.oid}"}
    if ref.startswith("refs/pr/"):
        payload["pullRequestUrl"] = f"{url}/discussions/{ref.rsplit('/', 1)[-1]}"
    return json_reply(payload)


def _repo_to_change(request: Request, kind: str, repo_id: str) -> Repo:
    # Who can read a repository can propose a change to it.
    repo = request.repo(kind, repo_id, write=not request.flag("create_pr"))
    request.need_user()
    return repo


def _lines(request: Request) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for line in request.body.read_all(request.state.limits.request).splitlines():
        try:
            entry = json.loads(line)
            yield str(entry["key"]), dict(entry["value"])
        except (ValueError, KeyError, TypeError) as error:
            raise HubError(400, f"Malformed line in the commit: {error}") from error


def _apply(
    request: Request, repo: Repo, parent: Commit, operations: list[tuple[str, Mapping[str, Any]]]
) -> dict[str, StoredFile]:
    files = dict(parent.files)
    for key, value in operations:
        path = check_path(str(value.get("path", "")).rstrip("/"))
        if key == "file":
            files[path] = request.state.store.blobs.add_regular(path, _content(request, path, value))
            if path == "README.md" and (
                errors := card_problems(files[path].read_bytes().decode("utf-8", "replace"))[0]
            ):
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        elif key == "lfsFile":
            oid = str(value.get("oid", ""))
            if not _SHA256.fullmatch(oid) or oid not in repo.lfs_objects:
                raise HubError(400, f"{path} points to an LFS object that was not uploaded: {oid!r}")
            files[path] = request.state.store.blobs.lfs_file(path, oid)
        elif key in ("deletedFile", "deletedFolder"):
            inside = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
            if not inside:
                raise HubError(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
            for name in inside:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {key!r}")
    return files


def _content(request: Request, path: str, value: Mapping[str, Any]) -> bytes:
    try:
        content = base64.b64decode(value["content"], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise HubError(400, f"{path} has no base64 content") from error
    # An empty file cannot be uploaded with LFS; the client sends it here whatever its name is.
    if content and uses_lfs(path, len(content), request.state.limits.lfs):
        raise HubError(400, f"{path} must be uploaded with LFS")
    return content


ROUTES = (
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", REPO_API + r"/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", REPO_API + r"/commit/(?P<revision>[^/]+)", commit),
)
