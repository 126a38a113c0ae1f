"""Writes GGUF files, one tensor in memory at a time, beside the target and then renamed over it.

Data is padded to the alignment after every tensor, the last one included, as gguf-py and llama.cpp do; an unchanged
file is written byte for byte.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qhub.errors import CheckpointError
from qhub_gguf.container.parsing import DEFAULT_ALIGNMENT, MAGIC
from qhub_gguf.container.reader import GgufFile
from qhub_gguf.container.splits import SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, part_path
from qhub_gguf.container.tensors import TensorSource
from qhub_gguf.container.values import Kind, Value, pack_string
from qhub_gguf.types import type_of

__all__ = ["write", "write_like", "write_split"]

_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class _Piece:
    """Is one physical file to write."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorSource]
    version: int = 3
    pad_end: bool = True


def write(path: str | os.PathLike[str], metadata: Mapping[str, Value], tensors: Mapping[str, TensorSource]) -> Path:
    """Write one GGUF file; ``metadata`` and ``tensors`` in the order given. Returns its path.

    The alignment is ``general.alignment`` of the metadata, or 32. Written beside, flushed to disk and renamed: a
    failure leaves what was there. Raises :class:`CheckpointError` naming a tensor whose data is not what its type and
    shape say.
    """
    target = Path(path)
    _write_all([_Piece(target, metadata, tensors)])
    return target


def write_split(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value],
    tensors: Mapping[str, TensorSource],
    max_bytes: int,
) -> list[Path]:
    """Write a model as files of about ``max_bytes`` of tensors each: ``path`` is ``model.gguf``, the files are named
    ``model-00001-of-00003.gguf``; one file keeps the plain name. Returns the paths.

    The first file has the metadata; all have ``split.no``, ``split.count`` and ``split.tensors.count``, as
    llama-gguf-split writes them.
    """
    target = Path(path)
    groups = list(_groups(tensors, max_bytes))
    if len(groups) <= 1:
        return [write(target, metadata, tensors)]
    pieces = []
    for number, names in enumerate(groups):
        head = dict(metadata) if number == 0 else {}
        head[SPLIT_NUMBER] = Value.of(Kind.UINT16, number)
        head[SPLIT_COUNT] = Value.of(Kind.UINT16, len(groups))
        head[SPLIT_TENSORS] = Value.of(Kind.INT32, len(tensors))
        pieces.append(_Piece(part_path(target, number, len(groups)), head, {name: tensors[name] for name in names}))
    _write_all(pieces)
    return [piece.path for piece in pieces]


def write_like(
    path: str | os.PathLike[str],
    source: GgufFile,
    changed: Mapping[str, TensorSource] | None = None,
    metadata: Mapping[str, Value] | None = None,
) -> list[Path]:
    """Write ``source`` again with some tensors and values replaced; without changes the bytes are the same.

    ``changed``: by name, of tensors that ``source`` has. ``metadata``: instead of the first file's. A split model is
    written as the same parts; ``path`` is then ``model.gguf`` and names them as in :func:`write_split`. Writing over
    the source itself is fine. Returns the paths.
    """
    changed = changed or {}
    unknown = sorted(set(changed) - set(source.tensors))
    if unknown:
        raise CheckpointError(f"cannot replace tensors {unknown[:5]}: {source.path} does not have them")
    count = len(source.headers)
    pieces = []
    for number, header in enumerate(source.headers):
        target = Path(path) if count == 1 else part_path(Path(path), number, count)
        tensors = {name: changed.get(name) or _same(source, name) for name in header.tensors}
        head = metadata if metadata is not None and number == 0 else header.metadata
        if metadata is not None and number == 0 and count > 1:
            head = {**metadata, **{key: header.metadata[key] for key in (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)}}
        pieces.append(_Piece(target, head, tensors, header.version, header.padded))
    _write_all(pieces)
    return [piece.path for piece in pieces]


def _same(source: GgufFile, name: str) -> TensorSource:
    info = source.tensors[name]
    return TensorSource(info.type.name, info.shape, lambda: source.tensor(name))


def _groups(tensors: Mapping[str, TensorSource], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, source in tensors.items():
        nbytes = source.nbytes(name)
        if names and size + nbytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    if names:
        yield names


def _write_all(pieces: Sequence[_Piece]) -> None:
    """Write every file beside its target before the first is renamed."""
    heads = [_head(piece) for piece in pieces]
    finished: list[tuple[Path, Path]] = []
    try:
        for piece, head in zip(pieces, heads, strict=True):
            with _beside(piece.path) as (handle, temporary):
                finished.append((temporary, piece.path))
                handle.write(head)
                _write_tensors(handle, piece)
        for temporary, target in finished:
            temporary.replace(target)
    except BaseException:
        for temporary, _ in finished:
            temporary.unlink(missing_ok=True)
        raise
    for folder in {piece.path.parent for piece in pieces}:
        _flush_folder(folder)


@contextmanager
def _beside(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    with os.fdopen(descriptor, "wb") as handle:
        yield handle, Path(name)
        handle.flush()
        os.fsync(handle.fileno())
        # mkstemp makes files that only their owner may read.
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)


def _flush_folder(folder: Path) -> None:
    """Make the renames durable where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment")
    return DEFAULT_ALIGNMENT if value is None else int(value.data)


def _head(piece: _Piece) -> bytes:
    """Return everything before the data: counts, metadata, the tensor table, padding."""
    alignment = _alignment(piece.metadata)
    out = bytearray(MAGIC + struct.pack("<IQQ", piece.version, len(piece.tensors), len(piece.metadata)))
    for key, value in piece.metadata.items():
        out += pack_string(key)
        out += value.packed()
    offset = 0
    for name, source in piece.tensors.items():
        kind = type_of(source.type)
        nbytes = source.nbytes(name)
        assert kind is not None  # nbytes has refused unknown types.
        out += pack_string(name)
        out += struct.pack(f"<I{len(source.shape)}QIQ", len(source.shape), *reversed(source.shape), kind.id, offset)
        offset += nbytes + -nbytes % alignment
    out += bytes(-len(out) % alignment)
    return bytes(out)


def _write_tensors(handle: BinaryIO, piece: _Piece) -> None:
    alignment, last = _alignment(piece.metadata), len(piece.tensors) - 1
    for number, (name, source) in enumerate(piece.tensors.items()):
        nbytes = source.nbytes(name)
        data = source.data if isinstance(source.data, Tensor) else source.data()
        for chunk in _chunks(data, source, nbytes, f"cannot write tensor {name!r} to {piece.path}"):
            handle.write(chunk)
        if number < last or piece.pad_end:
            handle.write(bytes(-nbytes % alignment))


def _chunks(data: Tensor, source: TensorSource, nbytes: int, where: str) -> Iterator[memoryview]:
    kind = type_of(source.type)
    assert kind is not None
    wanted = kind.dtype or torch.uint8
    if data.dtype != wanted or data.numel() * data.element_size() != nbytes:
        raise CheckpointError(
            f"{where}: {kind.name} of shape {source.shape} takes {nbytes} bytes of {wanted}, given were "
            f"{data.numel() * data.element_size()} bytes of {data.dtype}, shape {tuple(data.shape)}"
        )
    flat = data.detach().cpu().contiguous().view(-1).view(torch.uint8)
    for start in range(0, nbytes, _CHUNK):
        yield flat[start : start + _CHUNK].numpy().data
