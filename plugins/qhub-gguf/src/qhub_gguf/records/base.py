"""What all records of ggml share: w = step * value (+ offset), the values being small integers.

Every block type of ggml is of this kind, those on grids too: a vector of IQ1_S counts in eighths. Products of a float16
scale, a small sub-scale and such a value are exact in float32, so the order of the factors does not matter, and
decoding is bit-exact to ``dequantize_row_*`` of ggml-quants.c.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhub.layouts.blocks import Record
from qhub_gguf.records.fields import half

__all__ = ["GgmlRecord", "RecordColumns", "divided"]


class GgmlRecord(Record):
    """Decodes runs of ``group`` weights that share a step.

    ``halves``: where the record's float16 fields begin. ``width``: how many weights are rounded together at least.
    """

    group: int
    halves: tuple[int, ...] = ()
    width = 1

    @abstractmethod
    def values(self, data: Tensor) -> Tensor:
        """Return the values (..., count) int8 of ``data`` (..., size)."""

    @abstractmethod
    def steps(self, data: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return steps and offsets (..., count/group) float32 of ``data`` (..., size); None: no offsets."""

    @abstractmethod
    def find(self, ratio: Tensor) -> Any:
        """Return codes for the values nearest to ``ratio`` (..., a multiple of width) float32."""

    @abstractmethod
    def worth(self, found: Any) -> Tensor:
        """Return the values int8 that codes of :meth:`find` stand for, in the shape of its argument."""

    @abstractmethod
    def put(self, data: Tensor, found: Any) -> None:
        """Write codes that :meth:`find` gave for (..., count) ratios into ``data`` (..., size)."""

    def decode(self, data: Tensor) -> Tensor:
        steps, offsets = self.steps(data)
        weights = self.values(data).unflatten(-1, (-1, self.group)).float()
        weights.mul_(steps.unsqueeze(-1))
        if offsets is not None:
            weights.add_(offsets.unsqueeze(-1))
        return weights.flatten(-2)

    def ratio(self, weights: Tensor, data: Tensor) -> Tensor:
        """Return what the values of ``weights`` (..., count) would be under the scales of ``data`` were they free."""
        steps, offsets = self.steps(data)
        groups = weights.unflatten(-1, (-1, self.group))
        if offsets is not None:
            groups = groups - offsets.unsqueeze(-1)
        return divided(groups, steps.unsqueeze(-1)).flatten(-2)

    def nearest(self, weights: Tensor, data: Tensor) -> Tensor:
        written = data.clone(memory_format=torch.contiguous_format)
        self.put(written, self.find(self.ratio(weights, data)))
        return written

    def scales(self, data: Tensor) -> Tensor:
        return torch.cat([half(data, start) for start in self.halves], dim=-1)

    def columns(self, data: Tensor) -> RecordColumns:
        steps, offsets = self.steps(data)
        return RecordColumns(
            self,
            steps.flatten(1).t().contiguous(),
            None if offsets is None else offsets.flatten(1).t().contiguous(),
            self.width,
        )

    def __reduce__(self) -> Any:
        from qhub_gguf.records import record_of

        return record_of, (self.name,)


@dataclass(frozen=True)
class RecordColumns:
    """Rounds columns under the scales that records have; ``steps``, ``offsets``: (K/group, N) float32."""

    record: GgmlRecord
    steps: Tensor
    offsets: Tensor | None
    width: int

    def nearest(self, column: int, values: Tensor) -> Tensor:
        step = self.steps[column // self.record.group]
        offset = None if self.offsets is None else self.offsets[column // self.record.group]
        ratio = divided(values if offset is None else values - offset, step)
        # Vectors lie along the last axis; single columns need no turning.
        found = self.record.find(ratio if self.width == 1 else ratio.t().contiguous())
        values = self.record.worth(found).float()
        rounded = (values if self.width == 1 else values.t()) * step
        return rounded if offset is None else rounded + offset


def divided(weights: Tensor, steps: Tensor) -> Tensor:
    """Return ``weights / steps``, 0 where the step is 0: every value stands for the same there."""
    nothing = steps == 0
    return torch.where(nothing, 0.0, weights / torch.where(nothing, 1.0, steps))
