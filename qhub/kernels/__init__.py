"""Kernels: what they declare, how one is chosen, and the product that every quantized layer runs.

spec.py           what a kernel says of itself (data)
reference.py      dequantize and multiply, without constraints
dispatch.py       filter, admit, choose; reasons kept
admission.py      what agrees with the reference
binding.py        a kernel bound to one weight
linear.py         eager call, autograd, compiled operator
dense.py          the dense weight, decoded in pieces or by a kernel
dense_kernels.py  which kernel that is
ordering.py       which kernel is fastest for which M: measured, interpolated, guessed
tables.py         measured times on disk; signature.py is their key, cards/ those that are shipped
roofline.py       guesses; hardware.py says what a card can do
tune.py           measures; contest.py says what, timing.py is the clock, standard.py makes the shipped tables
explanation.py    the choices of a whole model, for people
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qhub.kernels.spec import Cost, KernelSpec, Problem

if TYPE_CHECKING:
    from qhub.kernels.explanation import explain

__all__ = ["Cost", "KernelSpec", "Problem", "explain"]


def __getattr__(name: str) -> Any:
    # Declaring a kernel must not import torch: the rest waits until it is asked for.
    if name == "explain":
        value = importlib.import_module("qhub.kernels.explanation").explain
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qhub.kernels' has no attribute {name!r}")
