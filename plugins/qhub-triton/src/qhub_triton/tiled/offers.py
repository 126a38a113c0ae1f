"""What the kernels for weights in tiles say of themselves, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec

__all__ = ["offers"]


def offers() -> list[KernelSpec]:
    """Return the kernel for tiles of any width of codes."""
    from qhub.kernels import KernelSpec

    return [
        KernelSpec(
            name="triton-tiled",
            impl="qhub_triton.tiled.linear:linear",
            layout="tiled",
            devices=frozenset({"cuda", "xpu"}),
            dtypes=frozenset({"bfloat16", "float16"}),
            transforms=True,
            accepts="qhub_triton.tiled.admission:accepts",
            bind="qhub_triton.tiled.linear:bind",
            tunables="qhub_triton.tiled.linear:tunables",
            probes="qhub_triton.tiled.linear:probes",
            cost="qhub_triton.tiled.costs:cost",
            packages=("triton",),
            rank=30,
            version=3,
        )
    ]
