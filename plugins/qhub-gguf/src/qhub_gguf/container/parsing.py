"""Parses the header of one physical GGUF file; nothing that the file merely claims is allocated.

Every length is held against the bytes that are there before anything is made from it. Source: docs/gguf.md of ggml;
what is refused beyond that follows gguf.cpp, which refuses it too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod

from qhub.errors import CheckpointError
from qhub_gguf.container.tensors import MAX_DIMS, TensorInfo, tensor_bytes
from qhub_gguf.container.values import FORMATS, LENGTH, Kind, Value
from qhub_gguf.types import REMOVED, type_of

__all__ = ["DEFAULT_ALIGNMENT", "MAGIC", "Header", "parse"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_VERSIONS = (2, 3)
# The least that a tensor's entry takes (name length, number of dimensions, type, offset), and a metadata entry's.
_LEAST_TENSOR, _LEAST_ENTRY = 8 + 4 + 4 + 8, 8 + 4 + 1


@dataclass(frozen=True)
class Header:
    """Holds what one physical file says. ``padded``: whether the last tensor's data is filled up to the alignment."""

    version: int
    alignment: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    data_start: int
    padded: bool


def parse(data: memoryview, path: str, part: int = 0) -> Header:
    """Read the header of the mapped file ``data``; :class:`CheckpointError` names the file and the tensor or key."""
    reader = _Cursor(data, path)
    if bytes(data[:4]) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it begins with {bytes(data[:4])!r} and not with {MAGIC!r}")
    reader.position = 4
    version = reader.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{path} is a big-endian GGUF file (version 0x{version:08x}); only little-endian files can be read. "
            "Convert it with gguf-convert-endian of gguf-py."
        )
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} can be read"
        )
    tensor_count = reader.number("Q", "the number of tensors")
    entry_count = reader.number("Q", "the number of metadata entries")
    reader.claim(tensor_count, _LEAST_TENSOR, "tensors")
    reader.claim(entry_count, _LEAST_ENTRY, "metadata entries")
    metadata = _metadata(reader, entry_count)
    alignment = _alignment(metadata, path)
    entries = _tensor_table(reader, tensor_count)
    data_start = reader.position + -reader.position % alignment
    tensors = _located(entries, data_start, alignment, len(data), path, part)
    end = max((info.offset + info.nbytes for info in tensors.values()), default=data_start)
    padded = len(data) >= end + (data_start - end) % alignment
    return Header(version, alignment, metadata, tensors, data_start, padded)


class _Cursor:
    """Takes numbers and strings from the mapped file, one after the other, and never beyond its end."""

    def __init__(self, data: memoryview, path: str) -> None:
        self.data, self.path, self.position = data, path, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def claim(self, count: int, least: int, what: str) -> None:
        """Refuse a number of things that cannot fit in what is left of the file."""
        if count * least > self.left:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: at byte {self.position} it claims {count} {what}, which take at "
                f"least {count * least} bytes, and {self.left} are left"
            )

    def number(self, letter: str, what: str) -> int:
        layout = struct.Struct("<" + letter)
        if self.left < layout.size:
            raise CheckpointError(f"{self.path} is truncated: it ends at byte {len(self.data)}, in {what}")
        value = layout.unpack_from(self.data, self.position)[0]
        self.position += layout.size
        return int(value)

    def bytes(self, length: int, what: str) -> memoryview:
        if length > self.left:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: {what} at byte {self.position} claims {length} bytes, and "
                f"{self.left} are left"
            )
        self.position += length
        return self.data[self.position - length : self.position]

    def name(self, what: str) -> str:
        length = self.number("Q", what)
        raw = bytes(self.bytes(length, what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {raw[:60]!r}") from error


def _metadata(reader: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for number in range(count):
        key = reader.name(f"the key of metadata entry {number}")
        if key in metadata:
            raise CheckpointError(f"{reader.path} has the metadata key {key!r} twice")
        metadata[key] = _value(reader, key)
    return metadata


def _kind(reader: _Cursor, what: str) -> Kind:
    number = reader.number("I", what)
    try:
        return Kind(number)
    except ValueError:
        raise CheckpointError(f"{reader.path}: {what} has the unknown value type {number}") from None


def _value(reader: _Cursor, key: str) -> Value:
    what = f"metadata key {key!r}"
    kind = _kind(reader, what)
    if kind is Kind.STRING:
        return Value(kind, bytes(_string(reader, what)))
    if kind is not Kind.ARRAY:
        raw = bytes(reader.bytes(struct.calcsize("<" + FORMATS[kind]), what))
        if kind is Kind.BOOL and raw not in (b"\x00", b"\x01"):
            raise CheckpointError(f"{reader.path}: {what} is a bool and holds {raw!r}")
        return Value(kind, raw)
    element = _kind(reader, f"the elements of {what}")
    count = reader.number("Q", what)
    if element is Kind.ARRAY:
        raise CheckpointError(f"{reader.path}: {what} is an array of arrays, which no GGUF file of a model holds")
    if element is not Kind.STRING:
        size = struct.calcsize("<" + FORMATS[element])
        reader.claim(count, size, f"elements of {what}")
        return Value(kind, reader.bytes(count * size, what), element, count)
    reader.claim(count, LENGTH.size, f"strings of {what}")
    return Value(kind, _strings(reader, count, what), element, count)


def _string(reader: _Cursor, what: str) -> memoryview:
    """Take one string, its length included."""
    start = reader.position
    reader.bytes(reader.number("Q", what), what)
    return reader.data[start : reader.position]


def _strings(reader: _Cursor, count: int, what: str) -> memoryview:
    """Walk over ``count`` strings, checking each length, and take them together."""
    data, end, start, position = reader.data, len(reader.data), reader.position, reader.position
    unpack = LENGTH.unpack_from
    for number in range(count):
        if position + LENGTH.size > end:
            raise CheckpointError(f"{reader.path} is truncated: it ends in string {number} of {what}")
        length = unpack(data, position)[0]
        position += LENGTH.size + length
        if position > end:
            raise CheckpointError(
                f"{reader.path} is truncated or damaged: string {number} of {what} claims {length} bytes, and "
                f"{end - position + length} are left"
            )
    reader.position = position
    return data[start:position]


def _alignment(metadata: dict[str, Value], path: str) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    alignment = value.data
    if value.kind is not Kind.UINT32 or alignment == 0 or alignment & (alignment - 1) or alignment > 2**20:
        raise CheckpointError(f"{path}: general.alignment must be a power of two below 2^20 as UINT32, found {value!r}")
    return int(alignment)


def _tensor_table(reader: _Cursor, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    entries: list[tuple[str, tuple[int, ...], int, int]] = []
    seen: set[str] = set()
    for number in range(count):
        name = reader.name(f"the name of tensor {number}")
        if name in seen:
            raise CheckpointError(f"{reader.path} has the tensor {name!r} twice")
        seen.add(name)
        what = f"tensor {name!r}"
        dims = reader.number("I", what)
        if dims > MAX_DIMS:
            raise CheckpointError(f"{reader.path}: {what} claims {dims} dimensions; GGUF knows at most {MAX_DIMS}")
        # ggml counts from the fastest dimension on, torch from the slowest.
        shape = tuple(reversed([reader.number("Q", what) for _ in range(dims)]))
        entries.append((name, shape, reader.number("I", what), reader.number("Q", what)))
    return entries


def _located(
    entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int, path: str, part: int
) -> dict[str, TensorInfo]:
    """Give each tensor its place, and refuse places that overlap, are misaligned or beyond the end."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape, number, offset in entries:
        where = f"{path}: tensor {name!r}"
        kind = type_of(number)
        if kind is None:
            known = f" ({REMOVED[number]}, which llama.cpp has given up)" if number in REMOVED else ""
            raise CheckpointError(f"{where} has the unknown ggml type {number}{known}")
        nbytes = tensor_bytes(kind, shape, where)
        if offset % alignment:
            raise CheckpointError(f"{where} begins at {offset}, which is no multiple of the alignment {alignment}")
        if start + offset + nbytes > size:
            raise CheckpointError(
                f"{where} ({kind.name}, shape {shape}) needs the bytes up to {start + offset + nbytes}, and the file "
                f"ends at {size}: it is truncated or damaged"
            )
        tensors[name] = TensorInfo(name, kind, shape, start + offset, nbytes, part)
    previous: TensorInfo | None = None
    for info in sorted((info for info in tensors.values() if prod(info.shape)), key=lambda info: info.offset):
        if previous is not None and info.offset < previous.offset + previous.nbytes:
            raise CheckpointError(f"{path}: tensors {previous.name!r} and {info.name!r} overlap")
        previous = info
    return tensors
