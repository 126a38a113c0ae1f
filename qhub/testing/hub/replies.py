"""Describes what an endpoint answers: a status, headers, and bytes or a slice of a stored file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FileSlice", "HubError", "Reply", "json_reply"]


@dataclass(frozen=True)
class FileSlice:
    """Names the bytes of a stored file that a reply carries.

    ``name`` is the path the file has in its repository: faults and the request log speak of files by it.
    """

    path: Path
    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Reply:
    """Holds one HTTP answer; the wire adds ``Content-Length`` and leaves out the body for HEAD."""

    status: int = 200
    body: bytes | FileSlice = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_reply(
    payload: Any,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    media: str = "application/json",
) -> Reply:
    """Build a JSON answer. ``headers=None`` adds none; values JSON lacks (YAML dates) become text."""
    body = json.dumps(payload, default=str).encode()
    return Reply(status, body, {"Content-Type": f"{media}; charset=utf-8", **(headers or {})})


class HubError(Exception):
    """Says that an endpoint refuses a request, in the words and headers the real Hub uses.

    ``code`` becomes ``X-Error-Code``, from which the client chooses the exception it raises; None sends none,
    and the client then goes by the status alone.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})

    def reply(self) -> Reply:
        """Turn the error into the answer to send."""
        # Header values travel as latin-1 on one line; the JSON body keeps the message as it is.
        flat = " ".join(self.message.split()).encode("latin-1", "replace").decode("latin-1")
        headers = {"X-Error-Message": flat, **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return json_reply({"error": self.message}, status=self.status, headers=headers)
