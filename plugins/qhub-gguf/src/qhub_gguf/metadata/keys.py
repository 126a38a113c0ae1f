"""Collects metadata entries in the order in which they are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qhub_gguf.container.values import Kind, Value

__all__ = ["Entries"]


class Entries:
    """Is a dict of values under construction; ``prefix`` is put before the keys that are an architecture's own."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.values: dict[str, Value] = {}

    def own(self, key: str, data: Any, kind: Kind | None = None) -> None:
        """Set ``{prefix}.{key}``; None leaves it out. ``kind``: of the value, or of an array's elements; None: UINT32,
        FLOAT32, BOOL or STRING after the data's type."""
        self.set(f"{self.prefix}.{key}", data, kind)

    def set(self, key: str, data: Any, kind: Kind | None = None) -> None:
        """Set ``key``; None leaves it out."""
        if data is None:
            return
        if isinstance(data, Sequence) and not isinstance(data, str):
            self.values[key] = Value.infer(data) if kind is None else Value.of(Kind.ARRAY, data, kind)
        else:
            self.values[key] = Value.infer(data) if kind is None else Value.of(kind, data)

    def real(self, key: str, data: float | None) -> None:
        """Set ``{prefix}.{key}`` as FLOAT32, also where the number is an int."""
        if data is not None:
            self.own(key, float(data), Kind.FLOAT32)

    def update(self, other: Mapping[str, Value]) -> None:
        """Add entries that are made already."""
        self.values.update(other)
