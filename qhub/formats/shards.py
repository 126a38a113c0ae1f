"""Writes safetensors files one tensor at a time: room for the header is kept in front, and filled in at the end.

The container (safetensors' README, "Format"): 8 bytes with the header's length, the header as JSON, which may end in
spaces, then the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from qhub.errors import CheckpointError, ConfigError

__all__ = ["ShardWriter", "byte_count"]

# safetensors/src/tensor.rs, enum Dtype.
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_CHUNK = 1 << 24


def byte_count(size: int | str) -> int:
    """Return the bytes that ``size`` names: a number, or text with a unit (``"5GB"``, ``"60KB"``, ``"2GiB"``).

    Raises :class:`ConfigError` for any other text.
    """
    if isinstance(size, int):
        return size
    text = size.strip().upper().removesuffix("B")
    digits = text.rstrip("KMGTI")
    try:
        return math.ceil(float(digits) * _UNITS[text[len(digits) :]])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{size!r} is no size: give bytes, or a number with KB, MB, GB, KiB, ...") from error


class ShardWriter:
    """Writes tensors into numbered files of about ``max_bytes`` in ``folder``, and gives each its header when it ends.

    ``metadata``: what every header says besides its tensors. ``room``: bytes kept for the names of tensors; a file that
    needs more is ended and another begun. ``shards``: names of the tensors in each finished file.
    """

    def __init__(
        self, folder: Path, max_bytes: int, metadata: Mapping[str, str] | None = None, room: int = 1 << 20
    ) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.shards: dict[Path, list[str]] = {}
        # Sorted: the same model gives the same bytes.
        self._metadata = dict(sorted({"format": "pt", **(metadata or {})}.items()))
        self.room = room + len(json.dumps(self._metadata))
        self._most = room
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._length = self._used = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        elif self._file is not None:
            self._file.close()

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Append ``tensors``, all of them into one file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        words = sum(len(name.encode()) + 160 for name in tensors)
        full = self._length + size > self.max_bytes or self._used + words > self._most
        if self._file is not None and self._length and full:
            self.finish()
        for name, tensor in tensors.items():
            self._append(name, tensor)
        self._used += words

    def _append(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, which safetensors files do not have")
        if self._file is None:
            path = self.folder / f"shard-{len(self.shards):05d}.safetensors"
            self._file = path.open("wb")
            self._file.write(bytes(8 + self.room))
            self.shards[path] = []
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._length, self._length + flat.numel()],
        }
        for start in range(0, flat.numel(), _CHUNK):
            self._file.write(flat[start : start + _CHUNK].numpy().tobytes())
        self._length += flat.numel()
        self.shards[next(reversed(self.shards))].append(name)

    def finish(self) -> None:
        """Fill in the header of the file being written."""
        if self._file is None:
            return
        header = json.dumps({"__metadata__": self._metadata, **self._header}, separators=(",", ":")).encode()
        if len(header) > self.room:
            raise CheckpointError(f"the header of {self._file.name} needs {len(header)} bytes, kept were {self.room}")
        with self._file as file:
            file.seek(0)
            file.write(struct.pack("<Q", self.room) + header.ljust(self.room))
        self._file, self._header, self._length, self._used = None, {}, 0, 0
