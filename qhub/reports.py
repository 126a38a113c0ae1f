"""Plain records that commands print: what the doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """Is one line of ``qhub doctor``.

    ``status``: ``"ok"``, ``"note"`` (works, could be better), ``"warning"`` (something will not work) or ``"error"``.
    ``subject``: what it is about. ``message``: what was found. ``remedy``: what to do about it; None when nothing.
    """

    status: Literal["ok", "note", "warning", "error"]
    subject: str
    message: str
    remedy: str | None = None
