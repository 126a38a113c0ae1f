"""Importance matrices: how large each input feature of a layer is, by the layer's name in the file.

llama.cpp writes them in two forms, a GGUF file (sums of squares and counts) and, before August 2025, a ``.dat`` file
(means times a number of calls); both are read and written. Source: ``save_imatrix``, ``save_imatrix_legacy``
(tools/imatrix) and ``common_imatrix_load`` (common/imatrix-loader.cpp) of llama.cpp.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qhub.errors import CheckpointError
from qhub_gguf.container import GgufFile, Kind, TensorSource, Value, write
from qhub_gguf.container.parsing import MAGIC
from qhub_gguf.names import Mapping as Names

__all__ = ["ImportanceMatrix"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_WHOLE = struct.Struct("<i")
# Tokens of a chunk, where a file does not say.
_CHUNK = 512


@dataclass
class ImportanceMatrix:
    """Holds the mean of x^2 per input feature.

    ``values``: by tensor name of the file (``blk.0.attn_q.weight``), float32 (K,), or (E, K) for experts; finite and
    not negative. ``counts``: by name, tokens seen, int64 () or (E,); 0 for an expert that saw none. ``datasets``: what
    it was measured on, in words. ``chunk``: tokens per chunk, which the files want to know.
    """

    values: dict[str, Tensor]
    counts: dict[str, Tensor]
    datasets: tuple[str, ...] = ()
    chunk: int = field(default=_CHUNK)

    def of(self, name: str, features: int) -> Tensor | None:
        """Return the importance of tensor ``name``, (K,) or (E, K), with ones for experts that saw nothing; None where
        it is not known. Raises :class:`CheckpointError` where it is not for ``features`` input features."""
        found = self.values.get(name)
        if found is None:
            return None
        if found.shape[-1] != features:
            raise CheckpointError(
                f"the importance matrix has {found.shape[-1]} features for {name!r}, and the tensor has {features}"
            )
        unseen = (self.counts[name] == 0).unsqueeze(-1)
        return torch.where(unseen, torch.ones_like(found), found)

    @classmethod
    def from_statistics(
        cls,
        mean_squares: Mapping[str, Tensor],
        tokens: Mapping[str, Tensor],
        names: Names,
        *,
        prefix: bool = True,
        datasets: tuple[str, ...] = (),
    ) -> ImportanceMatrix:
        """Make one from what qhub measured: by parameter of the model, the mean of x^2 (K,) or (E, K), and the tokens
        it is the mean of, () or (E,). A parameter that several tensors make up gives its importance to each."""
        values, counts = {}, {}
        for name, entries in names.of_model(mean_squares, prefix).items():
            for entry in entries:
                features = mean_squares[name].float()
                columns = entry.recipe.columns
                values[entry.ggml] = features if columns is None else features[..., torch.argsort(columns)]
                counts[entry.ggml] = tokens[name].to(torch.int64)
        return cls(values, counts, datasets)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ImportanceMatrix:
        """Read a file of either form. Raises :class:`CheckpointError` naming file and tensor for what does not add up:
        truncation, sizes, values that are negative or not finite."""
        path = Path(path)
        try:
            with path.open("rb") as handle:
                form = handle.read(4)
        except OSError as error:
            raise CheckpointError(f"cannot open the importance matrix {path}: {error.strerror or error}") from error
        found = _read_gguf(path) if form == MAGIC else _read_dat(path)
        for name, values in found.values.items():
            if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
                raise CheckpointError(f"{path}: the importance of {name!r} is not finite, or negative")
        return found

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it, as GGUF, or in the old form where the name ends in ``.dat``; beside and renamed."""
        path = Path(path)
        if path.suffix == ".dat":
            _write_dat(path, self)
        else:
            _write_gguf(path, self)

    @property
    def chunks(self) -> int:
        """Return the number of chunks that the most often used tensor saw."""
        most = max((int(count.max()) for count in self.counts.values()), default=0)
        return -(-most // self.chunk)


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GgufFile.open(path)
    if file.get("general.type") != "imatrix":
        raise CheckpointError(f"{path} is a GGUF file of type {file.get('general.type')!r} and no importance matrix")
    values, counts = {}, {}
    for tensor in file.tensors:
        if not tensor.endswith(_SUMS):
            continue
        name = tensor.removesuffix(_SUMS)
        if name + _COUNTS not in file.tensors:
            raise CheckpointError(f"{path}: tensor {name + _COUNTS!r} is missing beside {tensor!r}")
        sums, count = file.tensor(tensor), file.tensor(name + _COUNTS).flatten()
        if sums.dtype != torch.float32 or count.dtype != torch.float32 or sums.ndim > 2:
            raise CheckpointError(f"{path}: {tensor!r} and its counts must be F32 matrices")
        sums = sums.view(-1, sums.shape[-1])
        if len(count) != len(sums):
            raise CheckpointError(f"{path}: {tensor!r} has {len(sums)} rows and {len(count)} counts")
        means = torch.where(count.unsqueeze(-1) > 0, sums / count.unsqueeze(-1), torch.zeros_like(sums))
        alone = len(sums) == 1
        values[name] = means[0] if alone else means
        counts[name] = (count[0] if alone else count).round().to(torch.int64)
    datasets = file.get("imatrix.datasets", [])
    chunk = file.get("imatrix.chunk_size", _CHUNK)
    return ImportanceMatrix(values, counts, tuple(datasets), int(chunk) or _CHUNK)


def _write_gguf(path: Path, matrix: ImportanceMatrix) -> None:
    metadata = {
        "general.type": Value.of(Kind.STRING, "imatrix"),
        "imatrix.datasets": Value.of(Kind.ARRAY, list(matrix.datasets), Kind.STRING),
        "imatrix.chunk_count": Value.of(Kind.UINT32, matrix.chunks),
        "imatrix.chunk_size": Value.of(Kind.UINT32, matrix.chunk),
    }
    tensors: dict[str, TensorSource] = {}
    for name in sorted(matrix.values):
        means = matrix.values[name].float().view(-1, matrix.values[name].shape[-1])
        count = matrix.counts[name].float().view(-1, 1)
        tensors[name + _SUMS] = TensorSource("F32", tuple(means.shape), means * count)
        tensors[name + _COUNTS] = TensorSource("F32", tuple(count.shape), count)
    write(path, metadata, tensors)


def _read_dat(path: Path) -> ImportanceMatrix:
    reader = _Reader(path)
    entries = reader.number("the number of entries")
    if entries < 1 or entries * 12 > len(reader.data):
        raise CheckpointError(f"{path} is no importance matrix: it claims {entries} entries")
    values, calls = {}, {}
    for number in range(entries):
        name = reader.take(reader.number(f"entry {number}"), f"the name of entry {number}").decode("utf-8", "replace")
        called = reader.number(f"entry {name!r}")
        raw = reader.take(4 * reader.number(f"entry {name!r}"), f"the values of {name!r}")
        values[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32) / max(called, 1)
        calls[name] = torch.tensor(max(called, 1) * _CHUNK)
    datasets: tuple[str, ...] = ()
    if reader.left >= 8:
        reader.number("the number of calls")
        datasets = (reader.take(reader.number("the data set"), "the data set").decode("utf-8", "replace"),)
    return ImportanceMatrix(values, calls, datasets)


def _write_dat(path: Path, matrix: ImportanceMatrix) -> None:
    out = bytearray(_WHOLE.pack(len(matrix.values)))
    for name in sorted(matrix.values):
        encoded, count = name.encode(), matrix.counts[name]
        calls = max(1, -(-int(count.max()) // matrix.chunk))
        values = matrix.of(name, matrix.values[name].shape[-1])
        assert values is not None
        scaled = (values.float() * calls).flatten()
        out += _WHOLE.pack(len(encoded)) + encoded + _WHOLE.pack(calls) + _WHOLE.pack(scaled.numel())
        out += scaled.numpy().tobytes()
    dataset = (matrix.datasets[-1] if matrix.datasets else "").encode()
    out += _WHOLE.pack(matrix.chunks) + _WHOLE.pack(len(dataset)) + dataset
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(out)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class _Reader:
    """Takes numbers and bytes of a ``.dat`` file, never more than there are."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.position = path, path.read_bytes(), 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def number(self, what: str) -> int:
        return int(_WHOLE.unpack(self.take(4, what))[0])

    def take(self, length: int, what: str) -> bytes:
        if length < 0 or length > self.left:
            raise CheckpointError(
                f"{self.path} is a truncated or damaged importance matrix: {what} claims {length} bytes, and "
                f"{self.left} are left"
            )
        self.position += length
        return self.data[self.position - length : self.position]
