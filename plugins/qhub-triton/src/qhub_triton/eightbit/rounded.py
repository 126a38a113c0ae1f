"""Launches the kernels that round inputs: codes, steps, and where outliers stand."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qhub_triton.eightbit.rounding import mark_outliers, measure_rows, round_groups, round_rows
from qhub_triton.eightbit.scheme import CODES, Scheme
from qhub_triton.eightbit.space import Plan
from qhub_triton.launch import Launch

__all__ = ["Rounder"]


class Rounder:
    """Rounds inputs (M, ``k``) as ``scheme`` says; on a GPU, without waiting.

    ``pdl``: the kernel after it is launched before it ends, and waits itself. ``chain``: its own first kernel is
    launched so, after whatever came before. ``each``: numbers of a row to a thread. ``row``: the longest row that a
    program holds at once; it reads longer ones twice.
    """

    def __init__(
        self, scheme: Scheme, k: int, pdl: bool = False, chain: bool = False, each: int = 16, row: int = 16384
    ) -> None:
        self.scheme, self.k = scheme, k
        block = min(triton.next_power_of_2(k), row)
        self.chain = chain
        self.measure = Launch(measure_rows, {"BLOCK": min(block, 4096), "CHAIN": chain}, _options(4, chain))
        if scheme.group:
            self.groups = -(-k // scheme.group)
            self.count = min(triton.next_power_of_2(self.groups), max(1, 4096 // scheme.group))
            constants = {**scheme.constants, "GROUP": scheme.group, "COUNT": self.count, "PDL": pdl, "CHAIN": chain}
            self.round = self.single = Launch(round_groups, constants, _options(4, chain))
            return
        warps = max(1, min(block // (32 * each), 16))
        constants = {
            **scheme.constants, "THRESHOLD": scheme.threshold, "WHOLE": k <= block, "BLOCK": block, "PDL": pdl,
            "CHAIN": chain,
        }  # fmt: skip

        def rows(scale: int) -> Launch:
            return Launch(round_rows, {"SCALE": scale, **constants}, _options(warps, chain))

        # One row is a tensor of its own.
        self.round, self.single = rows(scheme.scale), rows(0 if scheme.scale == 2 else scheme.scale)
        self.marks: dict[tuple[int, bool], Launch] = {}

    def plan(self, plan: Plan, m: int, counters: int) -> None:
        """Add to ``plan`` what ``m`` rows need: ``codes`` (m, k), ``steps`` (m,) or (k / group, m), ``counters`` zeros,
        and for outliers ``flags`` (k,), ``columns`` (k,) and ``outliers`` (1,)."""
        plan.add("codes", m * self.k, CODES[self.scheme.kind])
        plan.add("steps", m * (self.groups if self.scheme.group else 1), torch.float32)
        plan.add("counters", max(counters, 1), torch.int32)
        if self.scheme.threshold > 0:
            plan.add("flags", self.k, torch.int8)
            plan.add("columns", self.k, torch.int32)
            plan.add("outliers", 1, torch.int32)

    def warm(self, m: int) -> bool:
        """Return whether its kernel for ``m`` rows is compiled, so that it takes addresses; with outliers, tensors."""
        return (self.round if m > 1 else self.single).fast is not None

    def __call__(
        self,
        x: Tensor,
        stored: Tensor | None,
        codes: Tensor | int,
        steps: Tensor | int,
        counters: Tensor | int,
        count: int,
        device: int,
        outliers: tuple[Tensor, Tensor, Tensor] | None = None,
        padded: int = 0,
    ) -> None:
        """Round ``x`` (M, k), contiguous, into ``codes`` and ``steps``, and write ``count`` zeros to ``counters``.

        ``stored``: the scale, where it is given; ``outliers``: ``flags``, ``columns`` and their number, written too.
        ``padded``: between the steps of two groups, if not M.
        Tensors, or once :meth:`warm` their addresses.
        """
        m, k = x.shape
        if self.scheme.group:
            self.round((m, -(-self.groups // self.count), 1), device, x, codes, steps, counters, padded or m, k, count)
            return
        launch = self.round if m > 1 else self.single
        maxima: Tensor | int = steps
        if self.scheme.scale == 2 and m > 1:
            maxima = torch.empty(m, dtype=torch.float32, device=x.device)
            self.measure((m, 1, 1), device, x, maxima, k)
        flags: Tensor | int = codes
        columns: Tensor | int = counters
        number: Tensor | int = counters
        if outliers is not None:
            flags, columns, number = outliers
            self._mark(x, outliers[0], device)
        given = steps if stored is None else stored
        launch((m, 1, 1), device, x, codes, steps, given, maxima, flags, columns, number, counters, m, k, count)

    def _mark(self, x: Tensor, flags: Tensor, device: int) -> None:
        m, k = x.shape
        # Rows of the largest inputs are shared out among programs, which then only add marks.
        shares = 1 if m <= 512 else min(-(-m // 256), 32)
        if shares > 1:
            flags.zero_()
        columns = 64 if m <= 64 else 32
        key = (min(triton.next_power_of_2(m), 256), shares > 1)
        launch = self.marks.get(key)
        if launch is None:
            # A memset is no kernel that could be waited for halfway.
            chain = self.chain and shares == 1
            constants = {
                "THRESHOLD": self.scheme.threshold, "ROWS": key[0], "COLUMNS": columns, "SHARED": key[1],
                "CHAIN": chain,
            }  # fmt: skip
            launch = self.marks[key] = Launch(mark_outliers, constants, _options(4, chain))
        launch((-(-k // columns), shares, 1), device, x, flags, m, k)


def _options(warps: int, chain: bool) -> dict[str, Any]:
    return {"num_warps": warps, "launch_pdl": True} if chain else {"num_warps": warps}
