"""The kernels as data."""

from __future__ import annotations

from qhub.kernels import KernelSpec

__all__ = ["FEW", "offers"]

# Rows of x up to which reading codes anew for every four rows beats decoding the matrix once and leaving it to torch.
FEW = 8


def offers() -> list[KernelSpec]:
    """Return four kernels: Affine and Lookup layouts, few and many rows of x."""
    found = []
    for layout, bits in (("affine", frozenset(range(1, 9))), ("lookup", frozenset({1, 2, 3, 4}))):
        for name, most, rank in (("few", FEW, 20), ("many", None, 10)):
            found.append(
                KernelSpec(
                    name=f"cpu-{layout}-{name}",
                    impl=f"qhub_cpu.linear:{name}_rows",
                    layout=layout,
                    devices=frozenset({"cpu"}),
                    dtypes=frozenset({"float32", "bfloat16", "float16"}),
                    bits=bits,
                    max_m=most,
                    transforms=True,
                    activations=frozenset({"none", "int8"}),
                    accepts="qhub_cpu.admission:accepts",
                    rank=rank,
                )
            )
    return found
