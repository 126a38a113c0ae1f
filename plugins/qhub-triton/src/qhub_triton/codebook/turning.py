"""Launches of what stands around a product: inputs rotated and made float16, outputs rotated, scaled, biased."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
from torch import Tensor

from qhub.layouts import Parts
from qhub_triton.codebook.reading import Side
from qhub_triton.codebook.rotation import narrow_kernel, rotate_kernel, row_kernel
from qhub_triton.launch import Launch

__all__ = ["Turning"]

# Columns of the left matrix that a program takes at a time where rows of x are many.
_COLUMNS = 64
# Programs for one row of x at most, where a program of few rows of the view is enough for it.
_PROGRAMS = 64
# Rows of x up to which a program reads all of a vector at once, and up to which it makes few rows of a matrix view.
_FEW, _SOME = 2, 16


class Plan(NamedTuple):
    """Is how rows of x are rotated: a program makes ``rows`` of the matrix view, whose columns are ``b``."""

    b: int
    rows: int
    warps: int


class Turning:
    """Is one side of a weight: the inputs' or the outputs'.

    ``size``: features. ``narrow``: results are float16 with a power of two for each row, else of the dtype asked for.
    """

    def __init__(self, side: Side, size: int, parts: Parts, index: int, narrow: bool, wide: bool) -> None:
        self.side, self.size, self.index, self.narrow, self.wide = side, size, index, narrow, wide
        tensors = {}
        for name in ("divide", "before", "rotate", "after"):
            step = getattr(side, name)
            tensors[name] = None if step is None or step.part is None else parts[step.part]
        self.divide, self.before, self.factor, self.after = tensors.values()
        self.q = 1 if side.rotate is None else side.rotate.factor
        self.launches: dict[Any, Launch] = {}
        self.power = size // self.q
        # The matrix view is about as tall as it is wide; the narrowest product is of 16.
        wide_view = max(16, min(64, 1 << (self.power.bit_length() // 2)))
        self.some, self.many = Plan(wide_view, 16, 4), Plan(wide_view, 64, 4)
        self.norm = 1.0 / math.sqrt(self.power)
        if self.factor is not None and not self.factor.is_floating_point():
            self.norm = 1.0 / math.sqrt(size)
        self.spread = math.ceil(math.log2(size) / 2)
        self.plans: dict[int, Plan] = {}

    @property
    def programs(self) -> int:
        """Return how many parts there are of the sums of a row, at most: what has fewer programs writes zeros."""
        if self.side.rotate is None:
            return 1
        return max(-(-(self.size // plan.b) // plan.rows) for plan in (self.plan(1), self.plan(_FEW), self.some))

    def plan(self, m: int) -> Plan:
        """Return how ``m`` rows of x are rotated. Measured on an H100."""
        if m > _FEW:
            return self.some if m <= _SOME else self.many
        plan = self.plans.get(m)
        if plan is None:
            # As wide as it is tall; a power of two, and of 128 at most, that the factor leaves.
            b = max(16, min(128, self.power, 1 << (self.size.bit_length() // 2)))
            tall = self.size // b
            # What each program of inputs summed is added up by the product: there, fewer programs and more rows.
            rows = min(triton.next_power_of_2(-(-tall // _PROGRAMS)), 8 if self.narrow else 4)
            plan = self.plans[m] = Plan(b, rows, 4 if self.size <= 4096 else 8)
        return plan

    def __call__(
        self, x: Tensor, out: Tensor, lengths: Tensor, sums: Tensor | None, bias: Tensor | None, scales: Tensor | None,
        scale_rows: int, overlap: bool,
    ) -> None:  # fmt: skip
        """Write ``out`` (M, size) from ``x`` (M, size) contiguous.

        ``lengths`` (M,) float32: with ``narrow`` what the results were divided by, for each row; else, with ``scales``,
        what the rows of x are multiplied by, as entry n is by ``scales[n // scale_rows]``. ``sums`` (M, programs, 2)
        float32: with ``narrow``, see :func:`qhub_triton.codebook.rotation.rotate_kernel`; left as it is where M is more
        than 16.
        """
        m = x.shape[0]
        few, plan = m <= _FEW, self.plan(m)
        if m > _SOME and self.side.rotate is not None:
            sums = None
        aligned = x.data_ptr() % 16, 1 if bias is None else bias.data_ptr() % 16
        key = (few, plan, x.dtype, aligned, out.dtype, bias is None, scales is None, sums is None, overlap)
        launch = self.launches.get(key)
        if launch is None:
            launch = self.launches[key] = self._launch(
                few, plan, x, bias is not None, scales, sums is not None, overlap
            )
        none = out
        divide = none if self.divide is None else self.divide
        before = none if self.before is None else self.before
        if self.side.rotate is None:
            launch((m, 1, 1), self.index, x, out, lengths, none if sums is None else sums, divide, before, self.size)
            return
        around = (
            x, out, lengths, none if sums is None else sums, divide, before,
            none if self.factor is None else self.factor, none if self.after is None else self.after,
            none if bias is None else bias, none if scales is None else scales, self.size, self.spread, scale_rows,
            1 if sums is None else sums.shape[1],
        )  # fmt: skip
        tall = self.size // plan.b
        view = () if few else (tall, tall // self.q, self.q)
        launch((-(-tall // plan.rows), m, 1), self.index, *around, *view)

    def _launch(
        self, few: bool, plan: Plan, x: Tensor, biased: bool, scales: Tensor | None, summed: bool, overlap: bool
    ) -> Launch:
        given = {"HAS_DIVISOR": self.divide is not None, "HAS_BEFORE": self.before is not None}
        extra = {"launch_pdl": True} if overlap else {}
        if self.side.rotate is None:
            constants = {**given, "OVERLAP": overlap, "B": triton.next_power_of_2(self.size)}
            return Launch(narrow_kernel, constants, {"num_warps": 8 if self.size > 2048 else 4, **extra})
        constants = {
            **given, "HAS_FACTOR": self.factor is not None, "HAS_AFTER": self.after is not None, "HAS_BIAS": biased,
            "HAS_SCALES": scales is not None, "ONE_SCALE": scales is not None and scales.numel() == 1,
            "NARROW": self.narrow, "WIDE": self.wide, "OVERLAP": overlap, "NORM": self.norm, "HAS_SUMS": summed,
        }  # fmt: skip
        if few:
            tall = self.size // plan.b
            # A step: 16 bytes for each thread.
            step = max(1, plan.warps * 32 * 16 // x.element_size() // plan.b)
            step = min(triton.next_power_of_2(tall), step)
            constants |= {"TALL": tall, "Q": self.q, "R": plan.rows, "CA": step, "B": plan.b}
            return Launch(row_kernel, constants, {"num_warps": plan.warps, "num_stages": 1, **extra})
        constants |= {"RA": plan.rows, "CA": _COLUMNS, "B": plan.b}
        return Launch(rotate_kernel, constants, {"num_warps": plan.warps, "num_stages": 2, **extra})
