"""Other libraries' kernels as kernels of qhub. Each keeps the weight in the form its library wants: a second copy.

offers.py         the kernels as data
terms.py          an affine weight as scale * q + shift, however its layout says it
tinygemm.py       torch's own int4 product
bnb4.py, bnb8.py  bitsandbytes' products with NF4 and FP4, and with int8
marlin.py         gptqmodel's Marlin; machete.py: its Machete; extension.py: what both need
gemlite_linear.py gemlite's Triton kernels
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qhub import hookimpl

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec


@hookimpl
def qhub_kernels() -> Iterable[KernelSpec]:
    """Offer the kernels of every library, installed or not: what is missing is a reason to refuse."""
    from qhub_bridges.offers import offers

    return offers()
