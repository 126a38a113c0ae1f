"""The K-quants and IQ4_XS: records of 256 weights whose steps are themselves small whole numbers under a float16.

Source of all bytes: the block structs of ggml-common.h and ``dequantize_row_*`` of ggml-quants.c (llama.cpp).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.layouts.nested import Nested
from qhub_gguf.records.fields import half, join, put_half, spread
from qhub_gguf.records.legacy import IQ4_TABLE
from qhub_gguf.records.scalar import Plane, ScalarRecord, TableRecord
from qhub_gguf.records.superfit import Levels, fit_levels

__all__ = ["K_QUANTS", "SuperRecord"]


class SuperRecord(ScalarRecord):
    """Stores a step as a whole number times the float16 at ``halves[0]``, an offset as one times minus ``halves[1]``.

    ``levels_low``, ``levels_high``: range of these whole numbers.
    """

    levels_low: int
    levels_high: int
    free_steps = False

    @abstractmethod
    def levels(self, data: Tensor) -> Levels:
        """Return the whole numbers (..., count/group) of steps, and of offsets if there are any, int8 or uint8."""

    @abstractmethod
    def put_levels(self, data: Tensor, levels: Levels) -> None:
        """Write ``levels`` (..., count/group) into ``data`` (..., size)."""

    def steps(self, data: Tensor) -> tuple[Tensor, Tensor | None]:
        levels = self.levels(data)
        steps = levels.steps.float() * half(data, self.halves[0])
        return steps, None if levels.offsets is None else -(levels.offsets.float() * half(data, self.halves[1]))

    def plain_scales(self, data: Tensor) -> dict[str, Tensor]:
        levels = self.levels(data)
        parts = {"scales": levels.steps, "scales_super": half(data, self.halves[0]).half()}
        if levels.offsets is not None:
            parts |= {"zeros": levels.offsets, "zeros_super": -half(data, self.halves[1]).half()}
        return parts

    def put_plain_scales(self, data: Tensor, parts: Mapping[str, Tensor]) -> None:
        put_half(data, self.halves[0], parts["scales_super"].float().squeeze(-1))
        if "zeros" in parts:
            put_half(data, self.halves[1], -parts["zeros_super"].float().squeeze(-1))
        self.put_levels(data, Levels(parts["scales"], parts.get("zeros")))

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        data = torch.zeros(*weights.shape[:-1], self.size, dtype=torch.uint8, device=weights.device)
        supers, levels = fit_levels(self, weights, importance)
        for start, values in zip(self.halves, supers, strict=True):
            put_half(data, start, values)
        self.put_levels(data, levels)
        return self.nearest(weights, data)


class Q2K(SuperRecord):
    name, count, size, group, bits = "Q2_K", 256, 84, 16, 2
    halves, low, high, levels_low, levels_high = (80, 82), 0, 3, 0, 15
    nested = {name: Nested("uint8", group=16, bits=4) for name in ("scales", "zeros")}
    planes = (Plane(16, 80, 2, 32),)

    def levels(self, data: Tensor) -> Levels:
        field = data[..., :16]
        return Levels(field & 15, field >> 4)

    def put_levels(self, data: Tensor, levels: Levels) -> None:
        assert levels.offsets is not None
        data[..., :16] = levels.steps | levels.offsets << 4


class Q3K(SuperRecord):
    name, count, size, group, bits = "Q3_K", 256, 110, 16, 3
    halves, low, high, levels_low, levels_high = (108,), -4, 3, -32, 31
    nested = {"scales": Nested("int8", group=16, bits=6)}
    planes = (Plane(32, 96, 2, 32), Plane(0, 32, 1, 32, 2))

    def levels(self, data: Tensor) -> Levels:
        codes = spread(data[..., 96:104], 4, 8) | spread(data[..., 104:108], 2, 4) << 4
        return Levels(codes.view(torch.int8) - 32, None)

    def put_levels(self, data: Tensor, levels: Levels) -> None:
        codes = (levels.steps + 32).view(torch.uint8)
        data[..., 96:104] = join(codes & 15, 4, 8)
        data[..., 104:108] = join(codes >> 4, 2, 4)


class SixBits(SuperRecord):
    """Q4_K and Q5_K: eight steps and eight offsets of six bits in twelve bytes."""

    nested = {name: Nested("uint8", group=8, bits=6) for name in ("scales", "zeros")}
    halves, levels_low, levels_high = (0, 2), 0, 63

    def levels(self, data: Tensor) -> Levels:
        # Four bytes at a time: the twelve are three words, the last with four bits of each upper one.
        words = data[..., 4:16].clone(memory_format=torch.contiguous_format).view(torch.int32)
        first, second, rest = words.unbind(-1)
        steps = [first & 0x3F3F3F3F, rest & 0x0F0F0F0F | first >> 2 & 0x30303030]
        offsets = [second & 0x3F3F3F3F, rest >> 4 & 0x0F0F0F0F | second >> 2 & 0x30303030]
        return Levels(*(torch.stack(pair, dim=-1).view(torch.uint8) for pair in (steps, offsets)))

    def put_levels(self, data: Tensor, levels: Levels) -> None:
        assert levels.offsets is not None
        for start, codes in ((4, levels.steps), (8, levels.offsets)):
            data[..., start : start + 4] = codes[..., :4] | codes[..., 4:] >> 4 << 6
        data[..., 12:16] = levels.steps[..., 4:] & 15 | levels.offsets[..., 4:] << 4


class Q4K(SixBits):
    name, count, size, group, bits = "Q4_K", 256, 144, 32, 4
    low, high = 0, 15
    planes = (Plane(16, 144, 4, 32),)


class Q5K(SixBits):
    name, count, size, group, bits = "Q5_K", 256, 176, 32, 5
    low, high = 0, 31
    planes = (Plane(48, 176, 4, 32), Plane(16, 48, 1, 32, 4))


class Q6K(SuperRecord):
    name, count, size, group, bits = "Q6_K", 256, 210, 16, 6
    halves, low, high, levels_low, levels_high = (208,), -32, 31, -128, 127
    nested = {"scales": Nested("int8", group=16)}
    planes = (Plane(0, 128, 4, 64), Plane(128, 192, 2, 32, 4))

    def levels(self, data: Tensor) -> Levels:
        return Levels(data[..., 192:208].view(torch.int8), None)

    def put_levels(self, data: Tensor, levels: Levels) -> None:
        data[..., 192:208] = levels.steps.view(torch.uint8)


class IQ4XS(TableRecord, SuperRecord):
    """Entries of IQ4_NL's table under steps of six bits: the lower four in bytes 4 to 7, the upper two in 2 and 3."""

    name, count, size, group, bits = "IQ4_XS", 256, 136, 32, 4
    halves, low, high, table, levels_low, levels_high = (0,), -127, 113, IQ4_TABLE, -32, 31
    nested = {"scales": Nested("int8", group=8, bits=6)}
    planes = (Plane(8, 136, 4, 16),)

    def levels(self, data: Tensor) -> Levels:
        codes = spread(data[..., 4:8], 4, 1) | spread(data[..., 2:4], 2, 1) << 4
        return Levels(codes.view(torch.int8) - 32, None)

    def put_levels(self, data: Tensor, levels: Levels) -> None:
        codes = (levels.steps + 32).view(torch.uint8)
        data[..., 4:8] = join(codes & 15, 4, 1)
        data[..., 2:4] = join(codes >> 4, 2, 1)


K_QUANTS = (Q2K(), Q3K(), Q4K(), Q5K(), Q6K(), IQ4XS())
