"""Orders the kernels of a layer for every range of M: by measured times, by those of its neighbours, or by a guess."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from qhub.kernels.binding import Runner
from qhub.kernels.hardware import Card
from qhub.kernels.roofline import Work, guess
from qhub.kernels.signature import signature
from qhub.kernels.spec import KernelSpec, Problem
from qhub.kernels.tables import BUCKETS, Entry, Shape, Table, packages_of
from qhub.layouts import Parts, nbytes

__all__ = ["Clock", "Timing", "ordered"]

UNLIMITED = float("inf")
# A guess must beat a measurement by so much.
_DOUBT = 1.25
# Measured shapes that a time is interpolated from.
_NEIGHBOURS = 4
# Up to which distance a shape is multiplied best with the same config: log 2, twice the rows or columns.
_ALIKE = 0.7
# Seconds that starting the shortest kernel takes on a GPU, part of every time that is carried to another shape.
_LAUNCH = {"cuda": 2e-6}
# How far another 16-bit dtype is, on the scale of log(N) and log(K).
_OTHER_DTYPE = 0.5
_HALVES = ("bfloat16", "float16")


class Timing(NamedTuple):
    """Is what is known of a kernel's time: ``source`` is "measured", "interpolated", "guessed" or "unknown" (None)."""

    name: str
    seconds: float | None
    source: str
    config: dict[str, Any] | None = None
    config_name: str | None = None

    @property
    def weighed(self) -> float:
        """Return the seconds to compare: a guess counts for more than it says."""
        assert self.seconds is not None
        return self.seconds * (_DOUBT if self.source == "guessed" else 1.0)


class Clock:
    """Tells the time that kernels take for one layer. ``tables``: the first that knows a kernel is believed."""

    def __init__(self, problem: Problem, parts: Parts, card: Card, tables: Sequence[Table]) -> None:
        layout = problem.layout
        self.problem, self.card, self.tables = problem, card, tables
        self.signature = signature(layout)
        dtype = str(problem.dtype).removeprefix("torch.")
        self.shape = Shape(layout.out_features, layout.in_features, dtype)
        self.work = Work(self.shape.n, self.shape.k, nbytes(parts), problem.dtype.itemsize)
        self._launch = _LAUNCH.get(problem.device, 0.0)

    def timing(self, spec: KernelSpec, m: float) -> Timing:
        """Return what is known of a kernel's time for inputs of ``m`` rows; endless: of twice the most measured."""
        rows = int(m) if m < UNLIMITED else 2 * BUCKETS[-1]
        key = spec.key
        known = [(table, table.shapes(self.signature).get(self.shape, {}).get(key)) for table in self.tables]
        # What was measured with the packages that are here is the first to be believed.
        known.sort(key=lambda item: item[0].packages.get(key, {}) != packages_of(spec))
        for table, entries in known:
            if entries:
                entry = self._at(spec, entries, self.shape, rows)
                exact = rows in entries and table.packages.get(key, {}) == packages_of(spec)
                return self._timing(spec, entry, "measured" if exact else "interpolated", table, key)
        for table in self.tables:
            entry_ = self._interpolated(spec, table, rows)
            if entry_ is not None:
                return self._timing(spec, entry_, "interpolated", table, key)
        cost = spec.cost_of(self.problem)
        if cost is not None:
            return Timing(spec.name, guess(cost, self.work, rows, self.card), "guessed")
        return Timing(spec.name, None, "unknown")

    def measured(self, table: Table | None, spec: KernelSpec) -> bool:
        """Return whether ``table`` has this kernel on this very layer."""
        return table is not None and bool(table.shapes(self.signature).get(self.shape, {}).get(spec.key))

    def _timing(self, spec: KernelSpec, entry: Entry, source: str, table: Table, key: str) -> Timing:
        config = None if entry.config is None else table.configs[key][entry.config]
        return Timing(spec.name, entry.seconds, source, config, entry.config)

    def _expected(self, spec: KernelSpec, shape: Shape, m: int) -> float:
        """Return the seconds that the kernel should take on a shape: by its cost, else by what no kernel gets below."""
        weight = self.work.weight * shape.n * shape.k // max(1, self.shape.n * self.shape.k)
        work = Work(shape.n, shape.k, weight, self.work.item)
        cost = spec.cost_of(self.problem)
        if cost is not None:
            return guess(cost, work, m, self.card)
        return work.floor(m, self.card) + self._launch

    def _at(self, spec: KernelSpec, entries: dict[int, Entry], shape: Shape, m: int) -> Entry:
        """Return the time for ``m`` rows: between two measured M on the line through them in logarithms, outside as
        what is expected goes."""
        if m in entries:
            return entries[m]
        below = max((one for one in entries if one < m), default=None)
        above = min((one for one in entries if one > m), default=None)
        if below is None or above is None:
            nearest = above if below is None else below
            assert nearest is not None
            entry = entries[nearest]
            factor = self._expected(spec, shape, m) / self._expected(spec, shape, nearest)
            return Entry(entry.seconds * factor, entry.config)
        part = math.log(m / below) / math.log(above / below)
        low, high = entries[below], entries[above]
        return Entry(low.seconds ** (1 - part) * high.seconds**part, high.config)

    def _interpolated(self, spec: KernelSpec, table: Table, m: int) -> Entry | None:
        """Return the time by how far the nearest measured shapes are from what is expected of them; None: no such
        shape."""
        near = []
        for shape, kernels in table.shapes(self.signature).items():
            entries = kernels.get(spec.key)
            if not entries or not (shape.dtype == self.shape.dtype or {shape.dtype, self.shape.dtype} <= {*_HALVES}):
                continue
            away = math.hypot(math.log(shape.n / self.shape.n), math.log(shape.k / self.shape.k))
            near.append((away + (0 if shape.dtype == self.shape.dtype else _OTHER_DTYPE), shape, entries))
        if not near:
            return None
        near.sort(key=lambda one: one[0])
        total = share = 0.0
        for away, shape, entries in near[:_NEIGHBOURS]:
            weight = 1 / (away * away + 0.01)
            share += weight * math.log(self._at(spec, entries, shape, m).seconds / self._expected(spec, shape, m))
            total += weight
        # How a matrix is best cut depends on its size: far from what was measured the kernel knows better itself.
        config = self._at(spec, near[0][2], near[0][1], m).config if near[0][0] < _ALIKE else None
        return Entry(self._expected(spec, self.shape, m) * math.exp(share / total), config)


def ordered(
    runners: Sequence[Runner], clock: Clock, forced: bool
) -> tuple[list[tuple[float, str, Runner]], dict[float, list[Timing]]]:
    """Return the steps of a choice, (largest M, kernel name, runner), and for each range of M all that could be taken,
    the best first. ``forced``: there is one kernel, and it is taken for every M.

    A kernel whose time nobody knows goes before the others only if its rank is above all of theirs.
    """
    edges = sorted({*BUCKETS, *(r.spec.max_m for r in runners if r.spec.max_m), UNLIMITED})
    steps: list[tuple[float, str, Runner]] = []
    rows: dict[float, list[Timing]] = {}
    for edge in edges:
        able = [r for r in runners if forced or r.spec.max_m is None or r.spec.max_m >= edge]
        timed = [(runner, clock.timing(runner.spec, edge)) for runner in able]
        highest = max((runner.spec.rank for runner, timing in timed if timing.seconds is not None), default=-(10**9))
        timed.sort(key=lambda item: _order(item[0].spec, item[1], highest))
        runner, timing = timed[0]
        rows[edge] = [one for _, one in timed]
        chosen = runner.with_config(timing.config)
        if steps and steps[-1][1] == timing.name and steps[-1][2].config == timing.config:
            steps[-1] = (edge, timing.name, steps[-1][2])
        else:
            steps.append((edge, timing.name, chosen))
    return steps, rows


def _order(spec: KernelSpec, timing: Timing, highest: int) -> tuple[int, float]:
    if timing.seconds is not None:
        return (1, timing.weighed)
    return (0 if spec.rank > highest else 2, -spec.rank)
