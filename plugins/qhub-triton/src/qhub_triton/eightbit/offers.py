"""What this area's kernels say of themselves, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhub.kernels import KernelSpec

__all__ = ["offers"]


def offers() -> list[KernelSpec]:
    """Return the products with inputs in 8 bits: float8 and int8."""
    from qhub.kernels.spec import Cost, KernelSpec

    return [
        KernelSpec(
            name=f"triton-{name}",
            impl="qhub_triton.eightbit.linear:linear",
            bind="qhub_triton.eightbit.linear:bind",
            layout=layout,
            devices=frozenset({"cuda", "xpu"}) if name == "int8" else frozenset({"cuda"}),
            dtypes=frozenset({"bfloat16", "float16"}),
            activations=frozenset(),
            accepts=f"qhub_triton.eightbit.accepting:{name}",
            tunables="qhub_triton.eightbit.choosing:tunables",
            probes=(1, 3, 70, 300),
            packages=("triton",),
            # Many rows in float8 are multiplied by torch._scaled_mm, after one kernel that rounds them.
            cost=Cost(bandwidth=0.95, rate=rate, unit="byte", tile=16, launch=4e-6),
            rank=30,
        )
        for name, layout, rate in (("float8", "float8", 0.95), ("int8", "affine", 0.5))
    ]
