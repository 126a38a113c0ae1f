"""Serves the endpoints about whole repositories: who am I, create, describe, list, branch, tag, delete."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

from qhub.testing.hub.card import card_data, card_tags
from qhub.testing.hub.replies import HubError, Reply, json_reply
from qhub.testing.hub.requests import REPO_API, Request
from qhub.testing.hub.store import Commit, Repo, StoredFile

__all__ = ["ROUTES", "repo_url"]

_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_TYPES = ("model", "dataset", "space")


def whoami(request: Request) -> Reply:
    """Answer whose token the request carries."""
    user = request.need_user()
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return json_reply({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})


def create(request: Request) -> Reply:
    """Create a repository in the user's own namespace."""
    user = request.need_user()
    payload = request.json()
    repo_type, repo_id = _named(payload, user)
    owner, name = repo_id.split("/")
    if owner != user:
        raise HubError(403, f'You don\'t have the rights to create a {repo_type} in the namespace "{owner}"')
    if not _NAME.fullmatch(name):
        raise HubError(400, f"Invalid repository name: {name!r}")
    repo = request.state.store.create(repo_type, repo_id, private=_private(payload) or False)
    url = repo_url(request, repo_type, repo_id)
    if repo is None:
        # The client reads the address out of this answer when it was called with exist_ok.
        return json_reply({"error": f"You already created this {repo_type} repo", "url": url}, status=409)
    return json_reply({"url": url, "name": repo_id, "id": repo_id})


def delete(request: Request) -> Reply:
    """Delete a repository."""
    repo_type, repo_id = _named(request.json(), request.need_user())
    request.state.store.delete(request.repo(f"{repo_type}s", repo_id, write=True))
    return json_reply({})


def settings(request: Request, kind: str, repo_id: str) -> Reply:
    """Change who may see a repository, and whether it is gated."""
    repo = request.repo(kind, repo_id, write=True)
    payload = request.json()
    private = _private(payload)
    with repo.lock:
        repo.private = repo.private if private is None else private
        repo.gated = bool(payload.get("gated", repo.gated))
    return json_reply({"private": repo.private, "gated": repo.gated})


def auth_check(request: Request, kind: str, repo_id: str, write: str | None) -> Reply:
    """Answer whether the user may read (or write to) the files of a repository."""
    check_gate(request, request.repo(kind, repo_id, write=write is not None))
    return json_reply({})


def info(request: Request, kind: str, repo_id: str, revision: str | None) -> Reply:
    """Describe a repository at a revision: files, card, tags and visibility."""
    repo = request.repo(kind, repo_id)
    commit = request.commit(repo, revision or "main")
    card = card_data(commit.card)
    payload = {
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.oid,
        "createdAt": _date(repo.created),
        "lastModified": _date(commit.date),
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(card),
        "cardData": card,
        "siblings": [_sibling(file, blobs=request.flag("blobs")) for file in _sorted(commit)],
    }
    if repo.type == "model":
        payload["modelId"] = repo.id
        for key in ("library_name", "pipeline_tag"):
            if key in card:
                payload[key] = card[key]
    if wanted := request.query.get("expand"):
        payload = {key: value for key, value in payload.items() if key == "id" or key in wanted}
    return json_reply(payload)


def tree(request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Reply:
    """List files and folders of a commit, below ``folder`` or the root, one level deep or at all levels."""
    commit = request.commit(request.repo(kind, repo_id), revision)
    base = PurePosixPath(folder or ".")
    entries = [
        entry
        for entry in _entries(commit)
        if (base in PurePosixPath(entry["path"]).parents)
        and (request.flag("recursive") or PurePosixPath(entry["path"]).parent == base)
    ]
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {revision}", code="EntryNotFound")
    return json_reply(entries)


def paths_info(request: Request, kind: str, repo_id: str, revision: str) -> Reply:
    """Describe the files and folders asked for; paths that do not exist are left out."""
    commit = request.commit(request.repo(kind, repo_id), revision)
    form = parse_qs(request.body.read_all(request.state.limits.request).decode())
    wanted = {path.strip("/") for path in form.get("paths", [])}
    return json_reply([entry for entry in _entries(commit) if entry["path"] in wanted])


def refs(request: Request, kind: str, repo_id: str) -> Reply:
    """List branches, tags and pull requests."""
    repo = request.repo(kind, repo_id)

    def under(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in sorted(repo.refs.items())
            if ref.startswith(prefix)
        ]

    lists = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "pullRequests": under("refs/pr/")}
    return json_reply({**lists, "converts": []})


def commits(request: Request, kind: str, repo_id: str, revision: str) -> Reply:
    """List the commits of a revision, the newest first."""
    repo = request.repo(kind, repo_id)
    return json_reply(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": _date(commit.date),
            }
            for commit in repo.log(request.commit(repo, revision))
        ]
    )


def create_branch(request: Request, kind: str, repo_id: str, branch: str) -> Reply:
    """Create a branch at a revision, by default at main."""
    revision = str(request.json().get("startingPoint", "main"))
    return _create_ref(request, kind, repo_id, f"refs/heads/{branch}", revision)


def create_tag(request: Request, kind: str, repo_id: str, revision: str) -> Reply:
    """Create a git tag at a revision."""
    return _create_ref(request, kind, repo_id, f"refs/tags/{request.json().get('tag')}", revision)


def no_xet(request: Request, kind: str, repo_id: str) -> Reply:
    """Refuse Xet tokens: a client that asks for one was not told to upload with plain LFS."""
    raise HubError(404, "This test server has no Xet: set HF_HUB_DISABLE_XET=1 for its clients")


def check_gate(request: Request, repo: Repo) -> None:
    """Raise HubError GatedRepo unless the user may read the files of a gated repository."""
    if repo.gated and request.user != repo.owner:
        status = 401 if request.user is None else 403
        message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated."
        raise HubError(status, message, code="GatedRepo")


def repo_url(request: Request, repo_type: str, repo_id: str) -> str:
    """Return the web address of a repository, from which the client reads type and id."""
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    return f"{request.state.endpoint}/{prefix}{repo_id}"


def _create_ref(request: Request, kind: str, repo_id: str, ref: str, revision: str) -> Reply:
    repo = request.repo(kind, repo_id, write=True)
    with repo.lock:
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = request.commit(repo, revision).oid
    return json_reply({})


def _named(payload: Mapping[str, Any], user: str) -> tuple[str, str]:
    repo_type = payload.get("type") or "model"
    if repo_type not in _TYPES:
        raise HubError(400, f"Unknown repository type {repo_type!r}")
    return repo_type, f"{payload.get('organization') or user}/{payload.get('name')}"


def _private(payload: Mapping[str, Any]) -> bool | None:
    # Older clients send "private", newer ones "visibility"; None means that neither was sent.
    if "visibility" in payload:
        return payload["visibility"] != "public"
    return payload.get("private")


def _sorted(commit: Commit) -> list[StoredFile]:
    return [commit.files[path] for path in sorted(commit.files)]


def _sibling(file: StoredFile, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": file.path}
    sibling: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return sibling


def _entries(commit: Commit) -> list[dict[str, Any]]:
    folders = {parent for path in commit.files for parent in PurePosixPath(path).parents}
    entries = [
        {"type": "directory", "path": str(folder), "size": 0, "oid": _folder_oid(commit, folder)}
        for folder in sorted(folders - {PurePosixPath(".")})
    ]
    return entries + [_entry(file) for file in _sorted(commit)]


def _entry(file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": file.path, "size": file.size, "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return entry


def _folder_oid(commit: Commit, folder: PurePosixPath) -> str:
    # Not git's tree id, but like it the same exactly when the folder's content is.
    inside: Iterable[StoredFile] = (f for f in _sorted(commit) if folder in PurePosixPath(f.path).parents)
    listing = repr([(file.path, file.oid) for file in inside])
    return hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


ROUTES = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("DELETE", r"/api/repos/delete", delete),
    ("PUT", REPO_API + r"/settings", settings),
    ("GET", REPO_API + r"/auth-check(?P<write>/write)?", auth_check),
    ("GET", REPO_API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", tree),
    ("POST", REPO_API + r"/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", REPO_API + r"/refs", refs),
    ("GET", REPO_API + r"/commits/(?P<revision>[^/]+)", commits),
    ("POST", REPO_API + r"/branch/(?P<branch>[^/]+)", create_branch),
    ("POST", REPO_API + r"/tag/(?P<revision>[^/]+)", create_tag),
    ("GET", REPO_API + r"/xet-(?:read|write)-token/[^/]+", no_xet),
    # The last, because its pattern also fits the shorter ones of the addresses above.
    ("GET", REPO_API + r"(?:/revision/(?P<revision>[^/]+))?", info),
)
