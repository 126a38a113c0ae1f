"""What the kernels for vectors picked by codes say of themselves, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec

__all__ = ["offers"]

_DEVICES = frozenset({"cuda", "xpu"})


def offers() -> list[KernelSpec]:
    """Return the product with vectors and rotations, and the kernel that writes such weights dense."""
    from qhub.kernels import KernelSpec

    return [
        KernelSpec(
            name="triton-codebook",
            impl="qhub_triton.codebook.linear:linear",
            bind="qhub_triton.codebook.linear:bind",
            layout="codebook",
            devices=_DEVICES,
            dtypes=frozenset({"bfloat16", "float16"}),
            transforms=True,
            accepts="qhub_triton.codebook.reading:accepts",
            rank=30,
            version=2,
            probes=(1, 3, 17),
            packages=("triton",),
        ),
        KernelSpec(
            name="triton-dense-codebook",
            role="dense",
            impl="qhub_triton.codebook.linear:dequantize",
            layout="codebook",
            devices=_DEVICES,
            dtypes=frozenset({"bfloat16", "float16", "float32"}),
            accepts="qhub_triton.codebook.reading:accepts_dense",
            rank=10,
            packages=("triton",),
        ),
    ]
