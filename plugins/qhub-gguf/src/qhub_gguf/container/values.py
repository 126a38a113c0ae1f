"""Metadata values of a GGUF file, kept as the file has them so that they can be written back byte for byte.

An array stays in the mapped file until it is asked for: the vocabulary of a small model takes as much memory as a tenth
of its weights. Source: docs/gguf.md of ggml, ``gguf_metadata_value_type``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from qhub.errors import ConfigError

__all__ = ["FORMATS", "Kind", "Value", "pack_string", "unpack_strings"]

LENGTH = struct.Struct("<Q")


class Kind(IntEnum):
    """Numbers the kinds of values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct's letters, little-endian.
FORMATS = {
    Kind.UINT8: "B", Kind.INT8: "b", Kind.UINT16: "H", Kind.INT16: "h", Kind.UINT32: "I", Kind.INT32: "i",
    Kind.FLOAT32: "f", Kind.BOOL: "?", Kind.UINT64: "Q", Kind.INT64: "q", Kind.FLOAT64: "d",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Value:
    """Holds one value: its kind, for an array also the kind and number of its elements, and its bytes.

    ``raw``: the bytes after the kind (and after element kind and count), maybe a view of a mapped file. Two values are
    equal when a file would hold the same bytes for them.
    """

    kind: Kind
    raw: bytes | memoryview
    element: Kind | None = None
    count: int = 0

    @classmethod
    def of(cls, kind: Kind, data: Any, element: Kind | None = None) -> Value:
        """Make a value of ``kind`` from Python data; ``element``: the kind of an array's elements.

        Raises :class:`ConfigError` for data that the kind cannot hold.
        """
        try:
            if kind is not Kind.ARRAY:
                return cls(kind, pack_string(data) if kind is Kind.STRING else struct.pack("<" + FORMATS[kind], data))
            if element is None or element is Kind.ARRAY:
                raise TypeError("an array needs an element kind, and arrays of arrays are not written")
            if element is Kind.STRING:
                return cls(kind, b"".join(map(pack_string, data)), element, len(data))
            return cls(kind, struct.pack(f"<{len(data)}{FORMATS[element]}", *data), element, len(data))
        except (struct.error, TypeError, OverflowError, AttributeError) as error:
            of = f" of {element.name}" if element is not None else ""
            raise ConfigError(
                f"a GGUF value of kind {kind.name}{of} cannot hold {str(data)[:80]!r}: {error}"
            ) from error

    @classmethod
    def infer(cls, data: Any) -> Value:
        """Make a value from Python data as convert_hf_to_gguf does: str, bool, int (UINT32, or INT32 and the 64-bit
        kinds where that does not fit), float (FLOAT32), and lists of them (ints as INT32)."""
        if isinstance(data, str):
            return cls.of(Kind.STRING, data)
        if isinstance(data, bool):
            return cls.of(Kind.BOOL, data)
        if isinstance(data, int):
            return cls.of(_integer(data, Kind.UINT32), data)
        if isinstance(data, float):
            return cls.of(Kind.FLOAT32, data)
        if isinstance(data, Sequence) and data:
            first = data[0]
            if isinstance(first, str):
                return cls.of(Kind.ARRAY, data, Kind.STRING)
            if isinstance(first, bool):
                return cls.of(Kind.ARRAY, data, Kind.BOOL)
            if all(isinstance(number, int) for number in data):
                return cls.of(
                    Kind.ARRAY, data, max((_integer(number, Kind.INT32) for number in data), default=Kind.INT32)
                )
            return cls.of(Kind.ARRAY, data, Kind.FLOAT32)
        raise ConfigError(f"GGUF metadata cannot hold {str(data)[:80]!r} ({type(data).__name__})")

    @property
    def data(self) -> Any:
        """Return the value as a str, bool, int, float or list; an array is decoded anew at each call.

        Bytes that are not UTF-8 are kept as lone surrogates (``surrogateescape``), so they survive a round trip.
        """
        if self.kind is Kind.STRING:
            return bytes(self.raw[LENGTH.size :]).decode("utf-8", "surrogateescape")
        if self.kind is not Kind.ARRAY:
            return struct.unpack("<" + FORMATS[self.kind], self.raw)[0]
        assert self.element is not None
        if self.element is Kind.STRING:
            return unpack_strings(self.raw, self.count)
        return list(struct.unpack(f"<{self.count}{FORMATS[self.element]}", self.raw))

    def packed(self) -> bytes:
        """Return the bytes of a file for this value, its kind included."""
        head = struct.pack("<I", self.kind)
        if self.kind is Kind.ARRAY:
            assert self.element is not None
            head += struct.pack("<IQ", self.element, self.count)
        return head + bytes(self.raw)

    def __eq__(self, other: object) -> bool:
        """Return whether a file would hold the same bytes."""
        return isinstance(other, Value) and self.packed() == other.packed()

    def __hash__(self) -> int:
        """Return a hash that equal values share."""
        return hash((self.kind, self.element, self.count, len(self.raw)))

    def __repr__(self) -> str:
        """Show the kind and the beginning of the data."""
        what = f"{self.count} x {self.element.name}" if self.element is not None else repr(self.data)[:60]
        return f"Value({self.kind.name}, {what})"


def pack_string(text: str) -> bytes:
    """Return a GGUF string: its length in bytes as UINT64, then UTF-8."""
    encoded = text.encode("utf-8", "surrogateescape")
    return LENGTH.pack(len(encoded)) + encoded


def unpack_strings(raw: bytes | memoryview, count: int) -> list[str]:
    """Return ``count`` strings that lie one after the other in ``raw``, whose lengths were checked before."""
    data = bytes(raw)
    strings, position = [], 0
    for _ in range(count):
        start = position + LENGTH.size
        position = start + LENGTH.unpack_from(data, position)[0]
        strings.append(data[start:position].decode("utf-8", "surrogateescape"))
    return strings


def _integer(number: int, preferred: Kind) -> Kind:
    bounds = {Kind.UINT32: (0, 2**32), Kind.INT32: (-(2**31), 2**31)}
    for kind in (preferred, Kind.INT32):
        if bounds[kind][0] <= number < bounds[kind][1]:
            return kind
    return Kind.INT64 if -(2**63) <= number < 2**63 else Kind.UINT64
