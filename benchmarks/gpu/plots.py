"""Draws the pictures of docs/performance.md with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import ROWS, Run, fraction, lookup, shapes_of, value

__all__ = ["draw"]

# In the order that colours are given; qhub's is drawn thick.
INT4 = ("qhub_int4", "marlin_bf16", "machete_bf16", "exllamav2_fp16", "gemlite_a16w4", "tinygemm_int4", "cublas_bf16")
LAYOUTS = (
    "qhub_int4", "qhub_int8", "qhub_int3", "qhub_int2", "qhub_int1", "qhub_nf4", "qhub_fp8", "qhub_fp8_dynamic",
    "qhub_llm_int8", "qhub_aqlm_2x8", "qhub_e8p", "bnb_nf4", "bnb_int8", "scaled_mm_fp8",
)  # fmt: skip


def _panels(count: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.4 * columns, 3.3 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.axis("off")
    return figure, flat


def _finish(figure: Any, axes: list[Any], count: int, path: Path) -> None:
    handles: dict[str, Any] = {}
    for axis in axes[:count]:
        axis.set_xscale("log", base=2)
        low, high = axis.get_xlim()
        shown = [m for m in ROWS if low <= m <= high]
        axis.set_xticks(shown, [str(m) for m in shown], fontsize=7, minor=False)
        axis.minorticks_off()
        axis.set_xlabel("rows of x (M)")
        axis.grid(alpha=0.3)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if count < len(axes):
        axes[-1].legend(handles.values(), handles, loc="center", fontsize=8, frameon=False)
    else:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file: the same results give the same bytes.
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _lines(axis: Any, runs: Sequence[Run], names: Sequence[str], n: int, k: int, figure_of: Any) -> None:
    for index, name in enumerate(names):
        points = []
        for m in ROWS:
            own = lookup(runs, name, n, k, m)
            y = None if own is None else figure_of(*own)
            if y is not None:
                points.append((m, y))
        if points:
            ours = name.startswith("qhub")
            style = {"linewidth": 1.8 if ours else 1.1, "marker": "o" if ours else ".", "markersize": 4}
            line = "-" if index < 10 else "--"
            axis.plot(*zip(*points, strict=True), line, label=name, color=f"C{index % 10}", **style)
    axis.set_title(f"N={n}, K={k}", fontsize=10)


def draw(runs: Sequence[Run], folder: Path) -> None:
    """Draw the fraction of the roofline of 4-bit products, and the speed of every layout over cuBLAS."""
    shapes = shapes_of(runs)
    if not shapes:
        return
    figure, axes = _panels(len(shapes))
    for axis, (n, k) in zip(axes, shapes, strict=False):
        _lines(axis, runs, INT4, n, k, lambda cell, run: (fraction(cell, run) or (None,))[0])
        axis.set_ylim(0, 1.1)
    axes[0].set_ylabel("fraction of the roofline")
    _finish(figure, axes, len(shapes), folder / "performance-int4.png")

    def speed(cell: dict[str, Any], run: Run) -> float | None:
        dense = lookup([run], "cublas_bf16", cell["n"], cell["k"], cell["m"])
        return value(dense[0]) / value(cell) if dense else None

    figure, axes = _panels(len(shapes))
    for axis, (n, k) in zip(axes, shapes, strict=False):
        _lines(axis, runs, LAYOUTS, n, k, speed)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes[0].set_ylabel("times as fast as cuBLAS bf16")
    _finish(figure, axes, len(shapes), folder / "performance-layouts.png")
