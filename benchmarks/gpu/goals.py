"""Compares results with the goals: what was aimed at, what was measured, met or the gap. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.cells import (
    ROWS,
    SHAPES,
    Run,
    best_peer,
    ceiling,
    error_ratio,
    geometric_mean,
    lookup,
    value,
)

__all__ = ["Row", "goal_rows", "ratios"]

FEW = tuple(m for m in ROWS if m <= 128)
MANY = tuple(m for m in ROWS if m >= 512)
WEIGHT_ONLY = (
    "qhub_int4", "qhub_int4_zeros", "qhub_int8", "qhub_int3", "qhub_int2", "qhub_int1", "qhub_nf4", "qhub_nf4_nested",
    "qhub_fp8",
)  # fmt: skip
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """Is a line of the table of goals. ``met``: None where nothing was measured."""

    what: str
    goal: str
    measured: str
    met: bool | None
    gap: str = ""


def ratios(
    runs: Sequence[Run], name: str, against: set[str] | str, shapes: Iterable[tuple[int, int]], rows: Iterable[int],
    regime: str = "busy",
) -> dict[Place, float]:  # fmt: skip
    """Return {(N, K, M): how many times as fast ``name`` is}, compared within its own run.

    ``against``: groups whose fastest peer counts, or one contestant's name.
    """
    found: dict[Place, float] = {}
    rows = list(rows)
    for n, k in shapes:
        for m in rows:
            own = lookup(runs, name, n, k, m, regime)
            if own is None:
                continue
            cell, run = own
            if isinstance(against, str):
                other = lookup([run], against, n, k, m, regime)
                rival = other[0] if other else None
            else:
                rival = best_peer(run, against, n, k, m, regime)
            if rival is not None:
                found[n, k, m] = value(rival) / value(cell)
    return found


def _place(place: Place) -> str:
    return f"{place[0]}x{place[1]} M={place[2]}"


def _span(found: dict[Place, float]) -> str:
    """Return the geometric mean and the least of ratios, in words."""
    worst = min(found, key=lambda place: found[place])
    return f"mean {geometric_mean(found.values()):.2f}, least {found[worst]:.2f} ({_place(worst)}), {len(found)} cells"


def _least(what: str, goal: str, least: float, found: dict[Place, float]) -> Row:
    """Return the line of a goal that every cell must reach ``least``."""
    if not found:
        return Row(what, goal, "not measured", None)
    low = [place for place, ratio in found.items() if ratio < least]
    gap = f"{len(low)} of {len(found)} cells below {least:g}" if low else ""
    return Row(what, goal, _span(found), not low, gap)


def _against_peers(runs: Sequence[Run]) -> list[Row]:
    what = "4-bit g128, bf16, five shapes, M 1 to 128, against the best 4-bit peer of the cell"
    found = ratios(runs, "qhub_int4", {"int4"}, SHAPES, FEW)
    least = _least(what, "no cell slower by more than 5 %", 0.95, found)
    if not found:
        return [least]
    mean = geometric_mean(found.values()) or 0.0
    gap = "" if mean >= 1.2 else f"{1.2 / mean:.2f} times to go"
    return [least, Row("same", "geometric mean 1.2", f"{mean:.3f}", mean >= 1.2, gap)]


def _bandwidth(runs: Sequence[Run]) -> list[Row]:
    rows = []
    for shapes, least, where in (
        (((8192, 8192), (28672, 8192)), 0.85, "8192x8192 and 28672x8192"),
        (((4096, 4096),), 0.6, "4096x4096"),
    ):
        found: dict[Place, float] = {}
        for n, k in shapes:
            for m in (m for m in FEW if m <= 16):
                own = lookup(runs, "qhub_int4", n, k, m)
                speed = ceiling(own[1], "copy_gbs") if own else None
                if own and speed:
                    found[n, k, m] = own[0]["bytes"] / speed / 1e3 / value(own[0])
        what = f"4-bit g128, fraction of the copy bandwidth, M up to 16, {where}"
        rows.append(_least(what, f"{least:g}", least, found))
    return rows


def _many_rows(runs: Sequence[Run]) -> list[Row]:
    rows = []
    for regime in ("busy", "rested"):
        found: dict[Place, float] = {}
        for name in WEIGHT_ONLY:
            for place, ratio in ratios(runs, name, "cublas_bf16", SHAPES, MANY, regime).items():
                found[place] = min(ratio, found.get(place, ratio))
        what = f"weight-only, M from 512, against cuBLAS bf16, the slowest layout of each cell, {regime} card"
        rows.append(_least(what, "0.97 of cuBLAS", 0.97, found))
        own = ratios(runs, "qhub_int4", "cublas_bf16", SHAPES, MANY, regime)
        rows.append(_least(f"of these, 4-bit g128, {regime} card", "0.97 of cuBLAS", 0.97, own))
    return rows


def _codebooks(runs: Sequence[Run]) -> list[Row]:
    return [
        _least(f"{title} at M=1, against cuBLAS bf16", "3 times", 3.0, ratios(runs, name, "cublas_bf16", SHAPES, (1,)))
        for name, title in (("qhub_aqlm_2x8", "AQLM 2x8"), ("qhub_e8p", "E8P"))
    ]


def _accuracy(runs: Sequence[Run]) -> list[Row]:
    worst: dict[str, tuple[float, Place]] = {}
    for run in runs:
        for cell in run["cells"]:
            ratio = None if cell["peer"] else error_ratio(cell, run)
            if ratio is not None and ratio > worst.get(cell["contestant"], (0.0, (0, 0, 0)))[0]:
                worst[cell["contestant"]] = ratio, (cell["n"], cell["k"], cell["m"])
    wrong = sum(1 for run in runs for cell in run["wrong"] if not cell["peer"])
    what = "accuracy: error against float64 over cuBLAS's own on weights that are bf16 already, every layout and M"
    if not worst:
        return [Row(what, "at most 1.2", "not measured", None)]
    order = sorted(worst, key=lambda name: -worst[name][0])
    text = f"worst {worst[order[0]][0]:.2f} ({order[0]}, {_place(worst[order[0]][1])})"
    above = [f"{name} {worst[name][0]:.2f}" for name in order if worst[name][0] > 1.2]
    gap = f"above 1.2: {', '.join(above)}" if above else ""
    if wrong:
        gap = f"{gap}; {wrong} cells wrong, not timed".lstrip("; ")
    return [Row(what, "at most 1.2", text, not above and not wrong, gap)]


def _generate(generate: dict[str, Any] | None) -> list[Row]:
    what = "Llama-3-8B shape, 4-bit, batch 1, plain generate"
    speeds = {} if generate is None else generate
    best = max((speed for name, speed in speeds.items() if name.startswith("int4")), default=None)
    if best is None:
        return [Row(what, "350 tokens/s", "not measured", None)]
    lines = [Row(what, "350 tokens/s", f"{best:.0f} tokens/s", best >= 350, "" if best >= 350 else f"{best / 350:.2f}")]
    dense = {name: speed for name, speed in speeds.items() if name.startswith("bf16")}
    methods = {name: speed for name, speed in speeds.items() if name not in dense}
    if dense:
        slow = [f"{name} {speed:.0f}" for name, speed in methods.items() if speed < max(dense.values())]
        told = ", ".join(f"{name} {speed:.0f}" for name, speed in (*dense.items(), *methods.items()))
        # One method says nothing of every method.
        met = None if len(methods) < 2 and not slow else not slow
        lines.append(Row("same, every method", "never below bf16", f"{told} tokens/s", met, ", ".join(slow)))
    return lines


def _host(host: Sequence[dict[str, Any]]) -> list[Row]:
    what = "host cost of one eager call of a layer over nn.Linear's, the slowest layout"
    if not host:
        return [Row(what, "at most 15 us", "not measured", None)]
    costs = host[-1]["host_us"]
    over = {name: cost - costs["nn_linear"] for name, cost in costs.items() if name.startswith("qhub")}
    worst = max(over, key=lambda name: over[name])
    above = [f"{name} {cost:.0f}" for name, cost in over.items() if cost > 15]
    least = min(over, key=lambda name: over[name])
    text = f"{over[worst]:.0f} us ({worst}); least {over[least]:.0f} us ({least})"
    return [Row(what, "at most 15 us", text, not above, f"above: {', '.join(above)}" if above else "")]


def goal_rows(
    runs: Sequence[Run], generate: dict[str, float] | None = None, host: Sequence[dict[str, Any]] = ()
) -> list[Row]:
    """Return the table of goals; ``generate``: {configuration: tokens/s at batch 1}, bf16 configurations named so;
    ``host``: runs of :mod:`benchmarks.gpu.host`, of which the last counts."""
    few = [m for m in FEW if m <= 64]
    return [
        *_against_peers(runs),
        *_bandwidth(runs),
        *_many_rows(runs),
        _least(
            "NF4, M 1 to 64, against bitsandbytes", "2 times", 2.0, ratios(runs, "qhub_nf4", "bnb_nf4", SHAPES, few)
        ),
        _least(
            "fp8 dynamic, quantizer included, every M, against the best fp8 peer",
            "at least the best (2 % of noise allowed)",
            0.98,
            ratios(runs, "qhub_fp8_dynamic", {"fp8_dynamic"}, SHAPES, ROWS),
        ),
        *_codebooks(runs),
        *_generate(generate),
        *_accuracy(runs),
        *_host(host),
    ]
