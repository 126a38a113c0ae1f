"""MXFP4 and NVFP4: E2M1 numbers under a float of eight bits a run.

Sources: OCP Microscaling Formats 1.0, section 5; ``dequantize_row_mxfp4``, ``dequantize_row_nvfp4`` of ggml-quants.c.
ggml counts E2M1 in halves, and halves the scale for it.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.layouts.nested import Nested
from qhub_gguf.records.fitting import columns_of, uniform_search
from qhub_gguf.records.scalar import Plane, TableRecord

__all__ = ["E2M1", "FLOATS"]

# In halves: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_NEIGHBOURS = (0, -1, 1)


class ByteStep(TableRecord):
    """Stores steps as bytes [0, count/group), entries of a table of 256."""

    low, high, bits, table, table_unit = -12, 12, 4, E2M1, 2

    @abstractmethod
    def entries(self) -> list[float]:
        """Return the step that each byte stands for."""

    @abstractmethod
    def legal(self) -> int:
        """Return how many bytes, from 0 on, stand for steps that may be written, in rising order."""

    def steps(self, data: Tensor) -> tuple[Tensor, Tensor | None]:
        field = data[..., : self.count // self.group]
        return _table(self, data.device).index_select(0, field.flatten().int()).reshape(field.shape), None

    def put_steps(self, data: Tensor, steps: Tensor, offsets: Tensor | None) -> None:
        """Write the nearest steps (..., count/group) there are; offsets there are none."""
        table = _table(self, data.device)[: self.legal()]
        place = torch.bucketize(steps.contiguous(), (table[1:] + table[:-1]) / 2)
        data[..., : self.count // self.group] = place.to(torch.uint8)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        x, w = columns_of(weights, importance, self.group)
        free = uniform_search(x, w, self.rounded, self.low, self.high).abs()
        table = _table(self, weights.device)[: self.legal()]
        middle = torch.bucketize(free, (table[1:] + table[:-1]) / 2)
        best, least = middle, torch.full_like(free, torch.inf)
        for move in _NEIGHBOURS:
            tried = (middle + move).clamp(0, table.shape[0] - 1)
            step = table[tried]
            v = self.rounded(x / torch.where(step == 0, 1.0, step)).float()
            error = (v * step - x).square_().mul_(w).sum(0)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        data = torch.zeros(*weights.shape[:-1], self.size, dtype=torch.uint8, device=weights.device)
        data[..., : self.count // self.group] = best.t().reshape(*weights.shape[:-1], -1).to(torch.uint8)
        return self.nearest(weights, data)


class MXFP4(ByteStep):
    """A power of two, 2^(e - 128) for the byte e, for 32 weights; ggml makes no difference for e = 255, which is NaN in
    the standard, but does not let such a file pass."""

    name, count, size, group = "MXFP4", 32, 17, 32
    planes = (Plane(1, 17, 4, 16),)

    def plain_scales(self, data: Tensor) -> dict[str, Tensor]:
        # The byte is an E8M0, and the table in whole numbers makes up for the half.
        return {"scales": data[..., :1].clone(memory_format=torch.contiguous_format).view(torch.float8_e8m0fnu)}

    def put_plain_scales(self, data: Tensor, parts: Mapping[str, Tensor]) -> None:
        if parts["scales"].dtype == torch.float8_e8m0fnu:
            data[..., :1] = parts["scales"].contiguous().view(torch.uint8)
        else:
            self.put_steps(data, parts["scales"].float() / self.table_unit, None)

    def entries(self) -> list[float]:
        return [2.0 ** (e - 128) for e in range(256)]

    def scales(self, data: Tensor) -> Tensor:
        # The largest weight there can be: it overflows under the largest steps.
        return self.steps(data)[0] * self.high

    def legal(self) -> int:
        # 12 * 2^(252 - 128) is the largest weight that is finite in float32.
        return 253


class NVFP4(ByteStep):
    """Four unsigned E4M3 for 16 weights each. ggml reads NaN as 0, with a sign bit as 480, which nothing writes."""

    name, count, size, group = "NVFP4", 64, 36, 16
    planes = (Plane(4, 36, 4, 8),)
    nested = {"scales": Nested("float8_e4m3fn", group=0)}

    def scales(self, data: Tensor) -> Tensor:
        return torch.where(data[..., :4] == 255, torch.nan, self.steps(data)[0])

    def plain_scales(self, data: Tensor) -> dict[str, Tensor]:
        codes = data[..., :4] & 127
        scales = torch.where(codes == 127, 0, codes).view(torch.float8_e4m3fn)
        return {"scales": scales, "scales_super": torch.ones(*data.shape[:-3], 1, device=data.device)}

    def put_plain_scales(self, data: Tensor, parts: Mapping[str, Tensor]) -> None:
        data[..., :4] = parts["scales"].contiguous().view(torch.uint8)

    def entries(self) -> list[float]:
        def value(byte: int) -> float:
            exponent, mantissa = byte >> 3 & 15, byte & 7
            if byte in (0, 127):
                return 0.0
            full = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            return full / 2

        return [value(byte) for byte in range(256)]

    def legal(self) -> int:
        return 127


@functools.lru_cache(maxsize=16)
def _table(record: ByteStep, device: torch.device) -> Tensor:
    return torch.tensor(record.entries(), dtype=torch.float64).float().to(device)


FLOATS = (MXFP4(), NVFP4())
