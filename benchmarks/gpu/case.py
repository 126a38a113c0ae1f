"""One shape of the grid: the weights and inputs that its contestants share, and what a contestant hands to the harness.

Weights are normal (0.02). Codes and scales of symmetric 4-bit weights in groups of 128 are the same for every
contestant that takes them. Inputs of M rows are the first M of one matrix, cut at 5 sigma; those with outliers have 8
columns of magnitudes from 20.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.gpu.timing import copies_for

__all__ = ["GROUP", "Case", "Contestant", "Prepared", "checked_rows", "copies_of"]

GROUP = 128
_OUTLIER_COLUMNS = 8


@dataclass
class Prepared:
    """Is a contestant with the weights of one shape. ``call``: (x (M, K), copy) to y (M, N). ``nbytes``: of one copy.

    ``dense``: returns the weight (N, K) in float32 that the copies stand for. ``rounded``: what the format makes of the
    input before the product, in float32; None where it takes it as it is.
    """

    call: Callable[[Tensor, int], Tensor]
    copies: int
    nbytes: int
    dense: Callable[[], Tensor]
    rounded: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Contestant:
    """Describes who takes part. ``group``: contestants of one group hold weights of a kind and are compared.

    ``peer``: False for qhub's. ``prepare``: of a :class:`Case`; raises where the contestant cannot be had. ``dtype``:
    of its input. ``limit``: relative error against x @ W.T above which a cell is not timed. ``most``: most rows that
    make sense; None: any. ``outliers``: whether its input has some. ``note``: for the report.
    """

    name: str
    group: str
    prepare: Callable[[Case], Prepared]
    peer: bool = True
    dtype: torch.dtype = torch.bfloat16
    limit: float = 0.012
    most: int | None = None
    outliers: bool = False
    note: str = ""


@dataclass
class Case:
    """Holds what the contestants of one shape (N, K) share, on ``device``."""

    n: int
    k: int
    device: str = "cuda"
    seed: int = 0
    rows: int = 4096
    _inputs: dict[tuple[torch.dtype, bool], Tensor] = field(default_factory=dict)

    def _generator(self, salt: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed * 1000 + salt)

    @cached_property
    def weight(self) -> Tensor:
        """Return the weight (N, K) bfloat16."""
        w = torch.randn(self.n, self.k, generator=self._generator(1), device=self.device, dtype=torch.float32)
        return (w * 0.02).to(torch.bfloat16)

    def inputs(self, dtype: torch.dtype, outliers: bool = False) -> Tensor:
        """Return the inputs (rows, K) in ``dtype``."""
        if (dtype, outliers) not in self._inputs:
            x = torch.randn(self.rows, self.k, generator=self._generator(2), device=self.device).clamp_(-5, 5)
            if outliers:
                columns = x[:, :: self.k // _OUTLIER_COLUMNS]
                columns += torch.where(columns < 0, -20.0, 20.0)
            # All dtypes see the values that bfloat16 can hold.
            self._inputs[dtype, outliers] = x.to(torch.bfloat16).to(dtype)
        return self._inputs[dtype, outliers]

    @cached_property
    def int4(self) -> tuple[Tensor, Tensor]:
        """Return symmetric 4-bit codes (N, K) uint8, 8 standing for 0, and scales (N, K / 128) that bf16 holds."""
        return self.codes(4)

    def codes(self, bits: int) -> tuple[Tensor, Tensor]:
        """Return codes (N, K) uint8 around 2**(bits-1) and scales (N, K / 128) float32 of values that bf16 holds.

        One bit stands for -1/2 and 1/2 of the scale.
        """
        middle = 1 << (bits - 1)
        w = self.weight.reshape(self.n, -1, GROUP)
        largest = 2 * w.abs().float().mean(-1) if bits == 1 else w.abs().amax(-1).float() / (middle - 1)
        scales = largest.to(torch.bfloat16).float()
        q = torch.empty(self.n, self.k, dtype=torch.uint8, device=self.device)
        # A thousand rows at a time: float32 temporaries of the largest shape would take gigabytes.
        for start in range(0, self.n, 1024):
            rows = slice(start, start + 1024)
            ratio = w[rows].float() / scales[rows].unsqueeze(-1)
            ratio = ratio.add_(0.5).floor_() if bits > 1 else (ratio > 0).float() - 1
            q[rows] = (ratio + middle).clamp_(0, 2 * middle - 1).to(torch.uint8).reshape(-1, self.k)
        return q, scales

    def dense_of(self, q: Tensor, scales: Tensor, middle: float) -> Tensor:
        """Return (q - middle) * scales (N, K) float32, scales given by groups along K."""
        return ((q.float() - middle).reshape(self.n, -1, self.k // scales.shape[1]) * scales.unsqueeze(-1)).reshape(
            self.n, self.k
        )


def copies_of(nbytes: int, make: Callable[[], object]) -> list:
    """Return as many results of ``make`` as copies of ``nbytes`` are rotated over."""
    return [make() for _ in range(copies_for(nbytes))]


def checked_rows(m: int, each: int = 8) -> list[int]:
    """Return which of ``m`` rows are compared with the reference: the first and the last eight."""
    return sorted({*range(min(each, m)), *range(max(0, m - each), m)})
