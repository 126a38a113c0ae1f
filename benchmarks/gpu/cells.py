"""The arithmetic of the grid without a GPU: shapes, limits, what is compared with what, and how runs are merged.

A result file holds ``runs``: one for each process that measured, with the machine's start it ran on, its ceilings and
its ``cells``. Ratios are taken between cells of one run only, so a run carries its own cuBLAS and peers.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "RESTED_FROM", "ROWS", "SHAPES", "Cell", "Run", "best_peer", "ceiling", "error_ratio", "fraction", "geometric_mean",
    "load", "lookup", "merge", "parse_rows", "parse_shapes", "shapes_of", "value",
]  # fmt: skip

SHAPES: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (8192, 8192), (4096, 14336), (28672, 8192))
ROWS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096)
# From here on a product's speed depends on what the card did just before: measured rested too.
RESTED_FROM = 256

Run = dict[str, Any]
Cell = dict[str, Any]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Return the shapes of ``"4096x4096,8192x8192"`` (N x K), or all of them for ``"all"``."""
    if text == "all":
        return list(SHAPES)
    shapes = []
    for word in text.split(","):
        n, cross, k = word.partition("x")
        if not cross or not n.isdigit() or not k.isdigit():
            raise ValueError(f"{word!r} is no shape: write N x K, as in 4096x14336")
        shapes.append((int(n), int(k)))
    return shapes


def parse_rows(text: str) -> list[int]:
    """Return the numbers of rows of ``"1,2,16-128"``: single ones, those of the grid within a range; or ``"all"``."""
    if text == "all":
        return list(ROWS)
    rows: set[int] = set()
    for word in text.split(","):
        low, dash, high = word.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"{word!r} is no number of rows: write 16, or 16-128")
        rows |= {m for m in ROWS if int(low) <= m <= int(high)} if dash else {int(low)}
    return sorted(rows)


def load(paths: Iterable[Path]) -> list[Run]:
    """Return the runs of result files, in the order of their dates."""
    runs = [run for path in paths for run in json.loads(path.read_text())["runs"]]
    return sorted(runs, key=lambda run: run["date"])


def merge(runs: Iterable[Run]) -> list[Run]:
    """Return the runs, each once (by its id), in the order of their dates; a later copy replaces an earlier one."""
    found: dict[str, Run] = {}
    for run in runs:
        found[run["id"]] = run
    return sorted(found.values(), key=lambda run: run["date"])


def shapes_of(runs: Iterable[Run]) -> list[tuple[int, int]]:
    """Return the shapes that were measured, in the grid's order."""
    seen = {(cell["n"], cell["k"]) for run in runs for cell in run["cells"]}
    return sorted(seen, key=lambda shape: SHAPES.index(shape) if shape in SHAPES else len(SHAPES))


def value(cell: Cell) -> float:
    """Return a cell's microseconds: the median of its rounds."""
    return statistics.median(cell["rounds"])


def lookup(runs: Iterable[Run], name: str, n: int, k: int, m: int, regime: str = "busy") -> tuple[Cell, Run] | None:
    """Return the latest cell of contestant ``name`` at a shape and M, and its run; None where it was not timed."""
    for run in reversed(list(runs)):
        for cell in run["cells"]:
            if (cell["contestant"], cell["n"], cell["k"], cell["m"], cell["regime"]) == (name, n, k, m, regime):
                return cell, run
    return None


def best_peer(run: Run, groups: set[str], n: int, k: int, m: int, regime: str = "busy") -> Cell | None:
    """Return the fastest peer of ``groups`` in ``run`` at a shape and M; None where none was timed."""
    cells = [
        cell
        for cell in run["cells"]
        if cell["peer"] and cell["group"] in groups and (cell["n"], cell["k"], cell["m"]) == (n, k, m)
        if cell["regime"] == regime and not cell["contestant"].endswith("_again")
    ]
    return min(cells, key=value, default=None)


def ceiling(run: Run, name: str) -> float | None:
    """Return the higher of what was measured before and after: ``"copy_gbs"`` or ``"bf16_tflops"``; None for neither.

    Of the bandwidth, what the weights of a cuBLAS product were read at counts too, where it is higher: a copy by the
    card's own engine is no ceiling.
    """
    found = [ceilings[name] for ceilings in run["ceilings"] if ceilings.get(name)]
    if name == "copy_gbs" and found:
        dense = (cell for cell in run["cells"] if cell["contestant"] == "cublas_bf16" and cell["m"] == 1)
        found += [cell["bytes"] / value(cell) / 1e3 for cell in dense]
    return max(found, default=None)


def fraction(cell: Cell, run: Run) -> tuple[float, str] | None:
    """Return what part of the roofline a cell reaches, and which side of it: ``"bytes"`` or ``"products"``.

    Bytes: of the packed weight, over the measured copy bandwidth. Products: 2MNK over the measured bf16 rate, which
    8-bit products may pass. The side that takes longer counts.
    """
    copy_gbs, tflops = ceiling(run, "copy_gbs"), ceiling(run, "bf16_tflops")
    if not copy_gbs or not tflops:
        return None
    moving = cell["bytes"] / copy_gbs / 1e3
    multiplying = 2.0 * cell["m"] * cell["n"] * cell["k"] / tflops / 1e6
    side = "bytes" if moving >= multiplying else "products"
    return max(moving, multiplying) / value(cell), side


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean; None of nothing."""
    logs = [math.log(one) for one in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def error_ratio(cell: Cell, run: Run) -> float | None:
    """Return a cell's error over cuBLAS's own at the same shape and M in the same dtype; None where that was not run.

    The error is that against the format's own rounding of the input, where it rounds it.
    """
    dtype = "fp16" if cell["dtype"] == "float16" else "bf16"
    reference: Mapping[str, Any] | None = next(
        (
            other
            for other in run["cells"]
            if other["contestant"] == f"cublas_{dtype}"
            and (other["n"], other["k"], other["m"]) == (cell["n"], cell["k"], cell["m"])
        ),
        None,
    )
    if reference is None or not reference["error"] or cell["error"] is None:
        return None
    return (cell["own_error"] if cell.get("own_error") is not None else cell["error"]) / reference["error"]
