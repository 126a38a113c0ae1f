"""What a GGUF file says of one tensor, and what a writer is given for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from qhub.errors import CheckpointError
from qhub_gguf.types import GgmlType, type_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_DIMS", "TensorInfo", "TensorSource", "tensor_bytes"]

# GGML_MAX_DIMS of ggml.h.
MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Describes a stored tensor: ``shape`` in torch's order (K last), ``offset`` from the beginning of its file,
    ``part``: which file of a split one."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor that holds it: (.., row bytes) for blocks, else ``shape``."""
        if self.type.dtype is not None:
            return self.shape
        return (*self.shape[:-1], self.type.row_bytes(self.shape[-1]))


@dataclass(frozen=True)
class TensorSource:
    """Says what to write for one tensor.

    ``type``: a name of :data:`qhub_gguf.types.TYPES`. ``shape``: of the weights, torch's order. ``data``: uint8
    (.., row bytes) for blocks, the type's own dtype else, or a function that gives it: called when its turn comes, so
    that one tensor is in memory at a time.
    """

    type: str
    shape: tuple[int, ...]
    data: Tensor | Callable[[], Tensor]

    def nbytes(self, name: str) -> int:
        """Return the bytes it will take; raises :class:`CheckpointError` for an unknown type or an odd shape."""
        kind = type_of(self.type)
        if kind is None:
            raise CheckpointError(f"cannot write tensor {name!r}: there is no ggml type {self.type!r}")
        return tensor_bytes(kind, self.shape, f"cannot write tensor {name!r}")


def tensor_bytes(kind: GgmlType, shape: tuple[int, ...], where: str) -> int:
    """Return the bytes of a tensor of ``shape`` (K last); :class:`CheckpointError`, beginning with ``where``, where the
    type cannot hold that shape."""
    if len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: it has {len(shape)} dimensions; GGUF knows at most {MAX_DIMS}")
    elements = prod(shape)
    if elements >= 2**63:
        raise CheckpointError(f"{where}: its shape {shape} has more elements than any file can hold")
    row = shape[-1] if shape else 1
    if row % kind.count:
        raise CheckpointError(
            f"{where}: its rows have {row} weights, which is no multiple of {kind.name}'s blocks of {kind.count}"
        )
    return elements // kind.count * kind.size
