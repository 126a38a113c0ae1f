"""What this area's kernels say of themselves, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec

__all__ = ["offers"]


def offers() -> list[KernelSpec]:
    """Return the kernel that writes dense weights, and the product through it, once for each layout that is read."""
    from qhub.kernels import KernelSpec
    from qhub.kernels.roofline import Cost

    decoding = [
        KernelSpec(
            name=f"triton-dense-{layout}",
            role="dense",
            impl="qhub_triton.dense.dequantize:dequantize",
            layout=layout,
            devices=frozenset({"cuda", "xpu"}),
            dtypes=frozenset({"bfloat16", "float16", "float32"}),
            transforms=True,
            accepts="qhub_triton.dense.dequantize:accepts",
            rank=10,
            cost=Cost(bandwidth=0.85, rate=0.95, through_dense=True),
            packages=("triton",),
        )
        for layout in ("affine", "lookup", "float8", "tiled", "stacked")
    ]
    multiplying = [
        KernelSpec(
            name=f"triton-pieces-{layout}",
            impl="qhub_triton.dense.linear:linear",
            layout=layout,
            devices=frozenset({"cuda"}),
            dtypes=frozenset({"bfloat16", "float16"}),
            transforms=True,
            accepts="qhub_triton.dense.linear:accepts",
            # Thousands of rows, where a weight is cut, would take gigabytes to try; tests/gpu does.
            probes=(3,),
            # Slower than the whole weight for few rows, where nothing is cut.
            rank=0,
            cost=Cost(bandwidth=0.8, rate=0.97, through_dense=True, launch=20e-6),
            packages=("triton",),
        )
        for layout in ("affine", "lookup", "float8", "tiled")
    ]
    return decoding + multiplying
