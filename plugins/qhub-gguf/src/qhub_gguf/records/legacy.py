"""Records with one float16 step, and maybe one offset, each: Q4_0 to Q8_0, the ternary types, Q1_0 and Q2_0, IQ4_NL.

Source of all bytes: the block structs of ggml-common.h and ``dequantize_row_*`` of ggml-quants.c (llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub_gguf.records.fields import half, put_half
from qhub_gguf.records.fitting import affine_fit, uniform_fit
from qhub_gguf.records.scalar import Plane, ScalarRecord, TableRecord

__all__ = ["IQ4_TABLE", "LEGACY"]

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class HalfStep(ScalarRecord):
    """Stores one float16 step at ``halves[0]``; with a second half, an offset."""

    def steps(self, data: Tensor) -> tuple[Tensor, Tensor | None]:
        return half(data, self.halves[0]), half(data, self.halves[1]) if len(self.halves) > 1 else None

    def put_steps(self, data: Tensor, steps: Tensor, offsets: Tensor | None) -> None:
        """Write steps and offsets (..., 1), rounded to float16, into ``data`` (..., size)."""
        put_half(data, self.halves[0], steps.squeeze(-1))
        if offsets is not None:
            put_half(data, self.halves[1], offsets.squeeze(-1))

    def plain_scales(self, data: Tensor) -> dict[str, Tensor]:
        return {name: half(data, start).half() for name, start in zip(("scales", "zeros"), self.halves, strict=False)}

    def put_plain_scales(self, data: Tensor, parts: Mapping[str, Tensor]) -> None:
        self.put_steps(data, parts["scales"].float(), parts["zeros"].float() if "zeros" in parts else None)

    def fit(self, weights: Tensor, importance: Tensor | None = None) -> Tensor:
        data = torch.zeros(*weights.shape[:-1], self.size, dtype=torch.uint8, device=weights.device)
        if len(self.halves) > 1:
            steps, offsets = affine_fit(weights, importance, self.high)
            self.put_steps(data, steps.unsqueeze(-1), offsets.unsqueeze(-1))
        else:
            self.put_steps(
                data, uniform_fit(weights, importance, self.rounded, self.low, self.high).unsqueeze(-1), None
            )
        return self.nearest(weights, data)


class HalfTable(TableRecord, HalfStep):
    """Stores one float16 step for codes into a table."""


class Q40(HalfStep):
    name, count, size, group, bits = "Q4_0", 32, 18, 32, 4
    halves, low, high = (0,), -8, 7
    planes = (Plane(2, 18, 4, 16),)


class Q41(HalfStep):
    name, count, size, group, bits = "Q4_1", 32, 20, 32, 4
    halves, low, high = (0, 2), 0, 15
    planes = (Plane(4, 20, 4, 16),)


class Q50(HalfStep):
    name, count, size, group, bits = "Q5_0", 32, 22, 32, 5
    halves, low, high = (0,), -16, 15
    planes = (Plane(6, 22, 4, 16), Plane(2, 6, 1, 1, 4))


class Q51(HalfStep):
    name, count, size, group, bits = "Q5_1", 32, 24, 32, 5
    halves, low, high = (0, 2), 0, 31
    planes = (Plane(8, 24, 4, 16), Plane(4, 8, 1, 1, 4))


class Q80(HalfStep):
    name, count, size, group, bits = "Q8_0", 32, 34, 32, 8
    halves, low, high = (0,), -128, 127
    planes = (Plane(2, 34, 8, 32),)


class Q10(HalfTable):
    """-1 and 1, 128 to a step."""

    name, count, size, group, bits = "Q1_0", 128, 18, 128, 1
    halves, low, high, table = (0,), -1, 1, (-1, 1)
    planes = (Plane(2, 18, 1, 1),)


class Q20(HalfStep):
    """-1 to 2, 64 to a step."""

    name, count, size, group, bits = "Q2_0", 64, 18, 64, 2
    halves, low, high = (0,), -1, 2
    planes = (Plane(2, 18, 2, 1),)


class TQ10(HalfStep):
    """-1, 0 and 1, five to a byte: a byte is the number 0.abcde of base 3, scaled to 256 and rounded up."""

    name, count, size, group, bits = "TQ1_0", 256, 54, 256, 2
    halves, low, high, planes = (52,), -1, 1, ()
    # Bytes [start, stop) hold, for each of their places in a run, so many digits: the first digits of the run first.
    _runs = ((0, 32, 5), (32, 48, 5), (48, 52, 4))

    def codes(self, data: Tensor) -> Tensor:
        found = []
        for start, stop, digits in self._runs:
            powers = torch.tensor([3**i for i in range(digits)], dtype=torch.uint8, device=data.device)
            # Multiplied modulo 256, a fraction loses its first digits.
            moved = (data[..., None, start:stop] * powers[:, None]).to(torch.int16)
            found.append((moved * 3 >> 8).to(torch.uint8).flatten(-2))
        return torch.cat(found, dim=-1)

    def put_codes(self, data: Tensor, codes: Tensor) -> None:
        first = 0
        for start, stop, digits in self._runs:
            run = codes[..., first : first + digits * (stop - start)].unflatten(-1, (digits, stop - start))
            # Four digits are followed by a 0.
            powers = torch.tensor([3 ** (4 - i) for i in range(digits)], dtype=torch.int32, device=data.device)
            number = (run * powers[:, None]).sum(-2)
            data[..., start:stop] = ((number * 256 + 242) // 243).to(torch.uint8)
            first += digits * (stop - start)


class TQ20(HalfStep):
    """-1, 0 and 1; two bits have room for a 2, which files of others may hold."""

    name, count, size, group, bits = "TQ2_0", 256, 66, 256, 2
    halves, low, high = (64,), -1, 2
    planes = (Plane(0, 64, 2, 32),)


class IQ4NL(HalfTable):
    """Entries of a table that is finer around 0."""

    name, count, size, group, bits = "IQ4_NL", 32, 18, 32, 4
    halves, low, high, table = (0,), -127, 113, IQ4_TABLE
    planes = (Plane(2, 18, 4, 16),)


LEGACY = (Q40(), Q41(), Q50(), Q51(), Q80(), Q10(), Q20(), TQ10(), TQ20(), IQ4NL())
