"""Which weights in tiles the kernel for many rows on Hopper does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qhub.layouts import Lookup
from qhub.layouts.tiled import Tiled
from qhub_triton.launch import hopper
from qhub_triton.tiled import admission

if TYPE_CHECKING:
    from qhub.kernels import Problem

__all__ = ["accepts"]


def accepts(problem: Problem) -> str | None:
    """Return why ``problem`` is left to others; None where the kernel takes it."""
    assert isinstance(problem.layout, Tiled)
    if any(problem.layout.scale_tensors().values()):
        return "reads plain scales and zeros, not those under a second level of scales"
    if isinstance(problem.layout.of, Lookup) and problem.layout.bits != 4:
        return f"looks up codes of 4 bits, not {problem.layout.bits}"
    if not torch.cuda.is_available() or not hopper(torch.device("cuda")):
        return "is for NVIDIA's compute capability 9"
    try:
        import qhub_triton.wide.kernel  # noqa: F401
    except Exception as error:
        # An interface that is not settled may fail in any way.
        return f"needs Gluon as triton 3.6 has it ({type(error).__name__}: {error})"
    return admission.accepts(problem)
