"""Reads one HTTP request for the endpoints: its address, query, user and body, and what the user may see."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from functools import cached_property
from io import BufferedIOBase
from typing import Any
from urllib.parse import parse_qs

from qhub.testing.hub.replies import HubError
from qhub.testing.hub.state import HubState
from qhub.testing.hub.store import Commit, Repo

__all__ = ["REPO_API", "ConnectionCutError", "Request", "RequestBody"]

# How the addresses of a repository's endpoints begin. Ids without a namespace exist on the Hub but not here;
# they are let through to be answered as missing repositories.
REPO_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+(?:/[^/]+)?)"

_PIECE = 1 << 16
_TRAILERS = 100
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


class ConnectionCutError(ConnectionError):
    """Says that the connection must end here: the client left, or a fault ordered it."""


class RequestBody:
    """Streams a request body, of a stated length or chunked.

    The standard library's server leaves both to its user, and httpx sends file objects chunked when it cannot
    tell their length. ``cut_after`` is the number of bytes after which to cut the connection; None does not.
    """

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self.cut_after: int | None = None
        self._stream = stream
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        length = headers.get("Content-Length", "0")
        if not length.isascii() or not length.isdigit():
            raise HubError(400, "Content-Length is not a number")
        self._length = int(length)
        self._pieces = self._cut(self._read_chunks() if self._chunked else self._read_exactly(self._length))

    @property
    def length(self) -> int | None:
        """Return the stated length; None for a chunked body."""
        return None if self._chunked else self._length

    def pieces(self) -> Iterator[bytes]:
        """Return what is left of the body, piece by piece. Raises ConnectionCutError when it ends early."""
        return self._pieces

    def read_all(self, limit: int) -> bytes:
        """Read what is left of the body. Raises HubError 413 when it is longer than ``limit``."""
        body = bytearray()
        for piece in self._pieces:
            body += piece
            if len(body) > limit:
                raise HubError(413, f"the request body is longer than {limit} bytes")
        return bytes(body)

    def drain(self, limit: int) -> bool:
        """Read and drop what is left, and tell whether that was all.

        A client that is still sending would miss an answer that comes with a closed connection.
        """
        left = limit
        for piece in self._pieces:
            left -= len(piece)
            if left < 0:
                return False
        return True

    def _cut(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        received = 0
        for piece in pieces:
            received += len(piece)
            if self.cut_after is not None and received > self.cut_after:
                raise ConnectionCutError("an ordered fault cut the upload")
            yield piece

    def _read_exactly(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self._stream.read(min(_PIECE, length))
            if not piece:
                raise ConnectionCutError("the client closed the connection inside a request body")
            length -= len(piece)
            yield piece

    def _read_chunks(self) -> Iterator[bytes]:
        while size := self._chunk_size():
            yield from self._read_exactly(size)
            self._stream.readline(_PIECE)
        # Trailers, of which none matter here, end at an empty line.
        for _ in range(_TRAILERS):
            if self._stream.readline(_PIECE) in (b"\r\n", b"\n", b""):
                return
        raise ConnectionCutError("the client sent too many trailers")

    def _chunk_size(self) -> int:
        digits = self._stream.readline(_PIECE).split(b";")[0].strip()
        if not _CHUNK_SIZE.fullmatch(digits):
            raise ConnectionCutError("the client sent a malformed chunk")
        return int(digits, 16)


@dataclass
class Request:
    """Gives an endpoint one request. ``path`` is decoded; ``query`` keeps every value of a repeated key."""

    state: HubState
    method: str
    path: str
    query_string: str
    headers: Message
    body: RequestBody
    user: str | None = None

    @cached_property
    def query(self) -> Mapping[str, list[str]]:
        """Return the decoded query."""
        return parse_qs(self.query_string, keep_blank_values=True)

    def flag(self, name: str) -> bool:
        """Tell whether a query value asks for something."""
        return self.query.get(name, [""])[-1].lower() in ("1", "true")

    def json(self) -> Mapping[str, Any]:
        """Read the body as a JSON object. Raises HubError 400 when it is none, 413 when it is too long."""
        try:
            payload = json.loads(self.body.read_all(self.state.limits.request) or b"{}")
        except ValueError as error:
            raise HubError(400, f"the body is not JSON: {error}") from error
        if not isinstance(payload, dict):
            raise HubError(400, "the body is not a JSON object")
        return payload

    def signed(self, action: str) -> dict[str, str]:
        """Return the query of a presigned address. Raises HubError 403 when it was not signed for this."""
        query = {key: values[-1] for key, values in self.query.items()}
        self.state.check_signature(action, self.path, query)
        return query

    def need_user(self) -> str:
        """Return the user. Raises HubError 401 without a token."""
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def repo(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        """Find the repository an address names (``kind`` is ``models``, ``datasets`` or ``spaces``).

        Raises HubError the way the Hub does: 401 RepoNotFound without a token, 404 RepoNotFound with one that
        may not see it (a private repository must look like a missing one), 403 when ``write`` is not allowed.
        """
        repo = self.state.store.get(kind.removesuffix("s"), repo_id)
        if repo is None or (repo.private and self.user != repo.owner):
            # The client would read a bare 401 as a missing repository only on https, so the code is stated.
            if self.user is None:
                raise HubError(401, "Invalid username or password.", code="RepoNotFound")
            raise HubError(404, "Repository not found", code="RepoNotFound")
        if write and self.user is None:
            raise HubError(401, "Invalid username or password.", code="RepoNotFound")
        if write and self.user != repo.owner:
            raise HubError(403, f"{self.user} has no right to write to {repo.id}")
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        """Find a commit of a repository. Raises HubError 404 RevisionNotFound."""
        commit = repo.at(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return commit
