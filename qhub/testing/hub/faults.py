"""Keeps the failures a test has ordered, and hands each out when a matching request comes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["DownloadFault", "Faults"]


@dataclass(frozen=True)
class DownloadFault:
    """Says what goes wrong while the body of one download is sent.

    ``cut_after`` is the number of body bytes sent before the connection is cut; None does not cut it.
    ``reset`` cuts it with a TCP reset instead of an orderly close. ``corrupt`` holds the file offsets of
    bytes to flip.
    """

    cut_after: int | None = None
    reset: bool = False
    corrupt: frozenset[int] = frozenset()


@dataclass
class _Rule:
    kind: str
    pattern: str
    left: int
    number: int = 0
    method: str | None = None
    reset: bool = False


class Faults:
    """Holds failures to inject; each is used up by the requests it hits, in the order they were ordered.

    A ``file`` is the path of a file in its repository, or a pattern such as ``"*.safetensors"``.
    """

    def __init__(self) -> None:
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()

    def cut(self, file: str = "*", *, after: int, times: int = 1, reset: bool = False) -> None:
        """Cut the connection after ``after`` body bytes of ``file``, in each of its next ``times`` downloads.

        Downloads (ranges) no longer than ``after`` bytes go through and do not count. An orderly close, the
        default, reaches the client as a body that ends early; ``reset=True`` reaches it as a read error.
        """
        self._add(_Rule("cut", file, times, number=after, reset=reset))

    def cut_upload(self, *, after: int, times: int = 1) -> None:
        """Cut the connection after reading ``after`` bytes of each of the next ``times`` LFS uploads."""
        self._add(_Rule("cut_upload", "*", times, number=after))

    def corrupt(self, file: str = "*", *, at: int, times: int = 1) -> None:
        """Flip the bits of byte ``at`` of ``file`` in the next ``times`` downloads that contain it."""
        self._add(_Rule("corrupt", file, times, number=at))

    def unavailable(
        self,
        *,
        times: int = 1,
        status: int = 503,
        method: str | None = None,
        path: str = "*",
    ) -> None:
        """Answer ``status`` to the next ``times`` requests.

        ``method=None`` means any method. ``path`` is a pattern for the decoded path of the address, such as
        ``"*/commit/*"``.
        """
        self._add(_Rule("status", path, times, number=status, method=method))

    def clear(self) -> None:
        """Forget every failure that was ordered and not used."""
        with self._lock:
            self._rules.clear()

    def take_status(self, method: str, path: str) -> int | None:
        """Use up and return the status to answer instead of serving a request; None to serve it."""
        with self._lock:
            for rule in self._matching("status", path):
                if rule.method in (None, method):
                    return self._use(rule).number
        return None

    def take_upload_cut(self, length: int | None) -> int | None:
        """Use up and return after how many bytes to cut an upload; None lets it through.

        ``length`` is the upload's size; None means that the client did not state it.
        """
        with self._lock:
            for rule in self._matching("cut_upload", ""):
                if length is None or length > rule.number:
                    return self._use(rule).number
        return None

    def take_download(self, file: str, start: int, length: int) -> DownloadFault:
        """Use up and return what goes wrong in sending ``length`` bytes of ``file`` from offset ``start``."""
        with self._lock:
            flips = [r for r in self._matching("corrupt", file) if start <= r.number < start + length]
            corrupt = frozenset(self._use(rule).number for rule in flips)
            for rule in self._matching("cut", file):
                if length > rule.number:
                    self._use(rule)
                    return DownloadFault(rule.number, rule.reset, corrupt)
        return DownloadFault(corrupt=corrupt)

    def _add(self, rule: _Rule) -> None:
        if rule.left < 1 or rule.number < 0:
            raise ValueError(f"a fault needs times >= 1 and a number >= 0, got {rule.left} and {rule.number}")
        with self._lock:
            self._rules.append(rule)

    def _matching(self, kind: str, name: str) -> list[_Rule]:
        return [rule for rule in self._rules if rule.kind == kind and fnmatchcase(name, rule.pattern)]

    def _use(self, rule: _Rule) -> _Rule:
        rule.left -= 1
        if rule.left == 0:
            self._rules.remove(rule)
        return rule
