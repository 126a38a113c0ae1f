"""Opens GGUF files: memory-mapped, so that opening costs the header and a tensor costs nothing until it is read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import CheckpointError
from qhub_gguf.container.parsing import Header, parse
from qhub_gguf.container.splits import SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, part_paths
from qhub_gguf.container.tensors import TensorInfo
from qhub_gguf.container.values import Value

__all__ = ["GgufFile"]


class GgufFile:
    """Is an open GGUF model: one file, or all the files of a split one.

    ``metadata``: of the first file, in its order; ``tensors``: of all files, in their order; ``alignment``: of the
    first file; ``paths`` and ``headers``: one per file. Tensors are views of a private, copy-on-write mapping: writing
    into one changes memory, never the file. They keep the mapping alive; the object itself may go. A file that is
    replaced meanwhile (renamed over, as writers do) stays readable as it was.
    """

    def __init__(self, paths: list[Path], headers: list[Header], maps: list[mmap.mmap | bytes]) -> None:
        self.paths, self.headers, self._maps = paths, headers, maps
        self.metadata: dict[str, Value] = headers[0].metadata
        self.alignment = headers[0].alignment
        self.tensors: dict[str, TensorInfo] = {}
        for path, header in zip(paths, headers, strict=True):
            for name, info in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{path}: tensor {name!r} is also in {paths[self.tensors[name].part]}")
                self.tensors[name] = info

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Map the file and check its header; ``path``: of a split model any part.

        Raises :class:`CheckpointError` that names file and tensor (or key) for whatever does not add up: magic,
        version, lengths, types, offsets, truncation, missing parts.
        """
        first = Path(path)
        mapped, header = _open(first, 0)
        count = _number(header, SPLIT_COUNT, first)
        if count <= 1:
            return cls([first], [header], [mapped])
        paths = part_paths(first, count)
        opened = [_open(other, part) for part, other in enumerate(paths)]
        for part, (other, (_, head)) in enumerate(zip(paths, opened, strict=True)):
            if (_number(head, SPLIT_NUMBER, other), _number(head, SPLIT_COUNT, other)) != (part, count):
                raise CheckpointError(
                    f"{other} should be part {part} of {count} and says {SPLIT_NUMBER} = "
                    f"{_number(head, SPLIT_NUMBER, other)}, {SPLIT_COUNT} = {_number(head, SPLIT_COUNT, other)}"
                )
        file = cls(paths, [head for _, head in opened], [data for data, _ in opened])
        total = _number(file.headers[0], SPLIT_TENSORS, paths[0])
        if total != len(file.tensors):
            raise CheckpointError(
                f"{paths[0]} says {SPLIT_TENSORS} = {total}; its {count} files hold {len(file.tensors)}"
            )
        return file

    @property
    def path(self) -> Path:
        """Return the path of the (first) file."""
        return self.paths[0]

    @property
    def nbytes(self) -> int:
        """Return the size of all files together."""
        return sum(len(data) for data in self._maps)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the metadata value of ``key`` as Python data, or ``default``."""
        value = self.metadata.get(key)
        return default if value is None else value.data

    def tensor(self, name: str) -> Tensor:
        """Return a tensor without a copy: uint8 (.., row bytes) for blocks, else of the type's dtype and its shape."""
        try:
            info = self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it has {len(self.tensors)} others") from None
        dtype = info.type.dtype or torch.uint8
        if info.nbytes == 0:
            return torch.empty(info.packed_shape, dtype=dtype)
        raw = torch.frombuffer(self._maps[info.part], dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        if info.offset % dtype.itemsize:
            raw = raw.clone()  # An alignment below the item's size: a view would be misaligned.
        return raw.view(dtype).view(info.packed_shape)

    def state(self) -> Mapping[str, Tensor]:
        """Return all tensors by name."""
        return {name: self.tensor(name) for name in self.tensors}


def _open(path: Path, part: int) -> tuple[mmap.mmap | bytes, Header]:
    try:
        with path.open("rb") as handle:
            # The mapping outlives the handle. ACCESS_COPY is a private mapping: writable, never written back.
            size = os.fstat(handle.fileno()).st_size
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    except OSError as error:
        raise CheckpointError(f"cannot open the GGUF file {path}: {error.strerror or error}") from error
    return data, parse(memoryview(data).toreadonly(), str(path), part)


def _number(header: Header, key: str, path: Path) -> int:
    value = header.metadata.get(key)
    if value is None:
        return 0
    number = value.data
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
        raise CheckpointError(f"{path}: {key} must be a count, found {value!r}")
    return number
