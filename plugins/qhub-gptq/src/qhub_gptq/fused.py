"""Finds the innermost loops of the solver and of coordinate descent as one kernel each, for GPUs that Triton knows.

Feature after feature is five small operations each, and a GPU spends its time on starting them: for a model of 8
billion weights about a minute. Triton comes with torch where it runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch

__all__ = ["fused_kernels"]


@functools.cache
def fused_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the module :mod:`qhub_gptq.fused_kernels` for float32 tensors on ``device``; None where it is of no use.

    Warns where Triton is there and cannot build kernels (it needs a C compiler and Python's headers).
    """
    if device.type != "cuda" or dtype != torch.float32 or importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("qhub_gptq.fused_kernels")
        kernels.build(device)
    # Whatever a compiler can fail with; the loops give the same numbers.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"Triton cannot build GPTQ's kernels ({type(error).__name__}: {reason[-1]}): quantizing takes twice as "
            "long. Install a C compiler and Python's headers",
            stacklevel=2,
        )
        return None
    return kernels
