"""A quantized weight as one run of bytes that can be cut anywhere, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qhub.layouts import Layout
from qhub.merging import AdapterPolicy
from qhub.tensor import QuantizedTensor

__all__ = ["Recipe"]

# Each part begins where its widest element, and a vector register, may be read.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Recipe:
    """Says how a run of bytes is a quantized weight again.

    ``slots``: (part, dtype, shape, first byte), in order. ``length``: of the run. ``shape``: of the dense weight.
    """

    layout: Layout
    slots: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute_dtype: torch.dtype | None
    policy: AdapterPolicy
    transposed: bool

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Recipe:
        """Return the recipe of ``weight``."""
        slots, at = [], 0
        for name, spec in weight.quant_layout.part_specs().items():
            if spec.batched:
                part = weight.parts[name]
                slots.append((name, part.dtype, tuple(part.shape), at))
                at += _aligned(part.numel() * part.element_size())
        return cls(
            weight.quant_layout,
            tuple(slots),
            at,
            tuple(weight.shape),
            weight.dtype,
            weight.compute_dtype,
            weight.policy,
            weight.transposed,
        )

    def share(self, rows: int) -> int:
        """Return the bytes of a piece when the first process holds ``rows`` rows of the weight.

        A process that gets no row gets no byte either: FSDP copies nothing to it.
        """
        return _aligned(-(-self.length // max(1, -(-self.shape[0] // max(1, rows)))))

    def cut(self, weight: QuantizedTensor, start: int, size: int) -> Tensor:
        """Return bytes [start, start + size) of the run, with zeros after its end."""
        piece = torch.zeros(size, dtype=torch.uint8, device=weight.device)
        for name, _, _, at in self.slots:
            part = weight.parts[name].detach().contiguous().reshape(-1).view(torch.uint8)
            first, last = max(start, at), min(start + size, at + part.numel())
            if first < last:
                piece[first - start : last - start].copy_(part[first - at : last - at])
        return piece

    def weight(self, run: Tensor, tables: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> QuantizedTensor:
        """Return the weight whose parts are views of the bytes ``run``, of dense ``dtype``; None: as it was."""
        parts = dict(tables)
        for name, kind, shape, at in self.slots:
            size = math.prod(shape) * kind.itemsize
            parts[name] = run[at : at + size].view(kind).view(shape)
        return QuantizedTensor.build(
            self.layout,
            parts,
            dtype or self.dtype,
            compute_dtype=self.compute_dtype,
            policy=self.policy,
            transposed=self.transposed,
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
