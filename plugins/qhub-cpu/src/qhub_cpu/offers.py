"""The kernels as data."""

from __future__ import annotations

from qhub.kernels import KernelSpec

__all__ = ["FEW", "offers"]

# Rows of x up to which reading codes anew for every four rows beats decoding the matrix once and leaving it to torch.
FEW = 8


def offers() -> list[KernelSpec]:
    """Return the kernels for Affine and Lookup layouts, few and many rows of x each, and the one for int8 products."""
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
    found.append(
        KernelSpec(
            name="cpu-int8",
            impl="qhub_cpu.int8:int8_product",
            layout="affine",
            devices=frozenset({"cpu"}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            bits=frozenset({8}),
            activations=frozenset({"int8"}),
            accepts="qhub_cpu.int8:accepts",
            rank=30,
        )
    )
    return found
