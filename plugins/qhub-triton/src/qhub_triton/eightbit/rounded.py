"""Launches the kernels that round inputs: codes, steps, and where outliers stand."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qhub_triton.eightbit.rounding import mark_outliers, measure_rows, round_groups, round_rows
from qhub_triton.eightbit.scheme import CODES, Scheme
from qhub_triton.eightbit.space import Plan, Space
from qhub_triton.launch import Launch

__all__ = ["PIECE", "Rounder"]

# Columns of an input whose outliers are looked for together.
PIECE = 64
# The longest row that a program holds at once.
_ROW = 32768


class Rounder:
    """Rounds inputs (M, ``k``) as ``scheme`` says; on a GPU, without waiting.

    ``pdl``: the kernel after it is launched before it ends, and waits itself.
    """

    def __init__(self, scheme: Scheme, k: int, pdl: bool = False, chain: bool = False, each: int = 16) -> None:
        self.scheme, self.k = scheme, k
        block = min(triton.next_power_of_2(k), _ROW)
        self.measure = Launch(measure_rows, {"BLOCK": min(block, 4096)}, {"num_warps": 4})
        if scheme.group:
            self.groups = -(-k // scheme.group)
            self.count = min(triton.next_power_of_2(self.groups), max(1, 4096 // scheme.group))
            constants = {**scheme.constants, "GROUP": scheme.group, "COUNT": self.count, "PDL": pdl, "CHAIN": chain}
            self.round = Launch(round_groups, constants, {"num_warps": 4, **({"launch_pdl": True} if chain else {})})
            return
        warps = max(1, min(block // (32 * each), 16))
        options: dict[str, Any] = {"num_warps": warps, **({"launch_pdl": True} if chain else {})}
        constants = {
            **scheme.constants, "THRESHOLD": scheme.threshold, "WHOLE": k <= block, "BLOCK": block, "PDL": pdl,
            "CHAIN": chain,
        }  # fmt: skip
        order = ("KIND", "SCALE", "TOP", "LARGEST", "SHIFT", "LIMIT", "POWERS", "THRESHOLD", "WHOLE", "BLOCK", "PDL", "CHAIN")

        def rows(scale: int) -> Launch:
            return Launch(round_rows, {name: {**constants, "SCALE": scale}[name] for name in order}, options)

        # One row is a tensor of its own.
        self.round, self.single = rows(scheme.scale), rows(0 if scheme.scale == 2 else scheme.scale)
        self.marks: dict[tuple[int, bool], Launch] = {}

    def plan(self, plan: Plan, m: int, counters: int) -> None:
        """Add to ``plan`` what ``m`` rows need: ``codes`` (m, k), ``steps`` (m,) or (k / group, m), ``counters`` zeros,
        ``flags`` (k,) and ``pieces`` for outliers."""
        plan.add("codes", m * self.k, CODES[self.scheme.kind])
        plan.add("steps", m * (self.groups if self.scheme.group else 1), torch.float32)
        plan.add("counters", max(counters, 1), torch.int32)
        if self.scheme.scale == 2:
            plan.add("maxima", m, torch.float32)
        if self.scheme.threshold > 0:
            plan.add("flags", self.k, torch.int8)
            plan.add("pieces", -(-self.k // PIECE), torch.int8)

    def __call__(self, x: Tensor, stored: Tensor | None, space: Space, counters: int, device: int) -> None:
        """Round ``x`` (M, k), contiguous, into ``space``; ``stored``: its scale, where that is given."""
        m, k = x.shape
        if self.scheme.group:
            launch = self.round
            arguments = (x, *(space.at(name, launch, device) for name in ("codes", "steps", "counters")))
            launch((m, -(-self.groups // self.count), 1), device, *arguments, m, k, counters)
            return
        launch = self.round if m > 1 else self.single
        codes, steps, zeros = (space.at(name, launch, device) for name in ("codes", "steps", "counters"))
        maxima, flags = steps, codes
        if self.scheme.scale == 2 and m > 1:
            maxima = space.at("maxima", launch, device)
            self.measure((m, 1, 1), device, x, space.at("maxima", self.measure, device), k)
        if self.scheme.threshold > 0:
            self._mark(x, space, device)
            flags = space.at("flags", launch, device)
        launch((m, 1, 1), device, x, codes, steps, steps if stored is None else stored, maxima, flags, zeros, m, k, counters)

    def _mark(self, x: Tensor, space: Space, device: int) -> None:
        m, k = x.shape
        parts = 1 if m <= 256 else min(-(-m // 256), 32)
        if parts > 1:
            space.tensor("flags").zero_()
            space.tensor("pieces").zero_()
        key = (min(triton.next_power_of_2(m), 32), parts > 1)
        if key not in self.marks:
            constants = {"THRESHOLD": self.scheme.threshold, "ROWS": key[0], "COLUMNS": PIECE, "SHARED": key[1]}
            self.marks[key] = Launch(mark_outliers, constants, {"num_warps": 4})
        launch = self.marks[key]
        flags, pieces = (space.at(name, launch, device) for name in ("flags", "pieces"))
        launch((-(-k // PIECE), parts, 1), device, x, flags, pieces, m, k)
