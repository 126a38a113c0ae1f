"""What the kernel for many rows on Hopper says of itself, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec

__all__ = ["offers"]


def offers() -> list[KernelSpec]:
    """Return the kernel for tiles of codes of 2, 4 and 8 bits, which for few rows are multiplied as in ``tiled/``."""
    from qhub.kernels import KernelSpec

    return [
        KernelSpec(
            name="gluon-tiled",
            impl="qhub_triton.wide.linear:linear",
            layout="tiled",
            devices=frozenset({"cuda"}),
            dtypes=frozenset({"bfloat16", "float16"}),
            # The unit that copies tiles takes powers of two of columns, and rows at multiples of 16 bytes; of 1-bit
            # words shared memory holds but one block.
            bits=frozenset({2, 4, 8}),
            divides=(("N", 8), ("K", 8)),
            transforms=True,
            accepts="qhub_triton.wide.admission:accepts",
            bind="qhub_triton.wide.linear:bind",
            tunables="qhub_triton.wide.linear:tunables",
            probes="qhub_triton.wide.linear:probes",
            cost="qhub_triton.tiled.costs:wide_cost",
            packages=("triton",),
            rank=25,
        )
    ]
