"""Holds what all requests to one hub server share: repositories, tokens, limits, faults and a log."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from qhub.testing.hub.faults import Faults
from qhub.testing.hub.replies import HubError
from qhub.testing.hub.store import Store

__all__ = ["HubState", "Limits", "Served"]

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds what a client may send, and says from which size on a file goes another way.

    ``multipart`` is the size above which an LFS object is uploaded in parts, ``part`` the size of a part.
    """

    lfs: int = 10 * MIB
    multipart: int = 64 * MIB
    part: int = 16 * MIB
    request: int = 128 * MIB
    object: int = 8192 * MIB


@dataclass(frozen=True)
class Served:
    """Records one answered request.

    ``path`` is decoded and without its query; ``status`` is 0 when a fault cut the upload before an answer;
    ``user`` is None without a valid token; ``file`` is the file whose bytes were served, None for all other
    answers; ``range`` is the Range header, None without one.
    """

    method: str
    path: str
    status: int
    user: str | None
    file: str | None
    range: str | None


@dataclass
class HubState:
    """Holds the shared state; ``endpoint`` and ``storage`` are set once the ports are known."""

    store: Store
    tokens: Mapping[str, str]
    limits: Limits
    endpoint: str = ""
    storage: str = ""
    faults: Faults = field(default_factory=Faults)
    served: list[Served] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def user_of(self, authorization: str | None) -> str | None:
        """Return whose token the header holds; None without one. Raises HubError 401 for an unknown token."""
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        user = self.tokens.get(token.strip()) if scheme.lower() == "bearer" else None
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def signed_url(self, action: str, path: str, **query: str | int) -> str:
        """Build a storage URL that works without a token for one action, as the Hub's presigned ones do."""
        values = {"action": action, **{key: str(value) for key, value in query.items()}}
        return f"{self.storage}{path}?{urlencode({**values, 'signature': self._sign(path, values)})}"

    def check_signature(self, action: str, path: str, query: Mapping[str, str]) -> None:
        """Raise HubError 403 unless ``signed_url`` made this query for this action and path."""
        values = {key: value for key, value in query.items() if key != "signature"}
        signed = hmac.compare_digest(self._sign(path, values).encode(), query.get("signature", "").encode())
        if not signed or values.get("action") != action:
            raise HubError(403, "The request signature does not match")

    def _sign(self, path: str, values: Mapping[str, str]) -> str:
        text = repr((path, sorted(values.items())))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()
