"""Kernels for CPUs: products with quantized weights that read the packed codes where they lie. No method is named here.

variants.py   what code is compiled for
llvm.py       how an LLVM operation becomes a function for numba
memory.py     loads, stores and calls by address
vectors.py    arithmetic of 16 lanes
codes.py      reading codes, looking them up
weights.py    codes to weights
products.py   what a thread runs
inputs.py     how the input is laid out, rounded to int8 where the layout asks for it
words.py      the argument block
launch.py     the entry point
threads.py    torch's threads
plans.py      from a layout to a variant and a block
linear.py     the kernels
admission.py  which problems they take
compiled.py   numba's decorators
processor.py, doctor.py  what this machine has
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qhub import hookimpl

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec
    from qhub.reports import Finding


@hookimpl
def qhub_kernels() -> Iterable[KernelSpec]:
    """Offer, for affine and lookup layouts, a kernel for few rows of x and one for many."""
    from qhub_cpu.offers import offers

    return offers()


@hookimpl
def qhub_doctor() -> Iterable[Finding]:
    """Say what the kernels run on."""
    from qhub_cpu.doctor import findings

    return findings()
