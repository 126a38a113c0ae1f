"""Which problems the kernels take: what a :class:`qhub.kernels.KernelSpec` cannot say as data."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from qhub.layouts import Affine, Lookup, Nested

if TYPE_CHECKING:
    from qhub.kernels import Problem

__all__ = ["accepts"]


def accepts(problem: Problem) -> str | None:
    """Return why the kernels cannot take ``problem``; None when they can."""
    if importlib.util.find_spec("numba") is None:
        return "needs numba, which is not installed: pip install numba"
    layout = problem.layout
    assert isinstance(layout, (Affine, Lookup))
    from qhub_cpu.plans import group_reason

    for nested in layout.scale_tensors().values():
        if nested is not None and not _splittable(nested):
            return f"needs second-level groups of a power of two, not {nested.group}"
    return group_reason(layout.grid, layout.in_features) or _processor_reason()


def _splittable(nested: Nested) -> bool:
    return nested.group & (nested.group - 1) == 0


def _processor_reason() -> str | None:
    from qhub_cpu.processor import missing

    lacking = missing()
    return f"needs a processor with {', '.join(lacking)}" if lacking else None
