"""Which problems the kernels take: what a :class:`qhub.kernels.KernelSpec` cannot say as data."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from qhub.layouts import Affine, Lookup

if TYPE_CHECKING:
    from qhub.kernels import Problem

__all__ = ["accepts", "machine_reason"]


def accepts(problem: Problem) -> str | None:
    """Return why the kernels of :mod:`qhub_cpu.linear` cannot take ``problem``; None when they can."""
    layout = problem.layout
    assert isinstance(layout, (Affine, Lookup))
    grid = layout.grid
    if grid.kind != "block":
        return f"reads groups along K, not {grid.kind} ones"
    if grid.cols % 16 and grid.cols < layout.in_features:
        return f"needs groups of a multiple of 16 weights, not {grid.cols}"
    for nested in layout.scale_tensors().values():
        if nested is not None and nested.group & (nested.group - 1):
            return f"needs second-level groups of a power of two, not {nested.group}"
    return machine_reason()


def machine_reason() -> str | None:
    """Return why compiled code cannot run here; None when it can."""
    if importlib.util.find_spec("numba") is None:
        return "needs numba, which is not installed: pip install numba"
    from qhub_cpu.processor import missing

    lacking = missing()
    return f"needs a processor with {lacking}" if lacking else None
