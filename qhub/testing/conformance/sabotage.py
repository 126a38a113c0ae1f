"""Kernels that the kit offers to the dispatcher: one that is right, and one that is wrong by 1 %."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from qhub.hookspecs import hookimpl
from qhub.kernels import KernelSpec, reference
from qhub.layouts import Layout, Parts

__all__ = ["RIGHT", "WRONG", "Offer", "right", "runs", "wrong"]

RIGHT, WRONG = "conformance-right", "conformance-wrong"

# How often each kernel ran since the list was cleared.
runs: list[str] = []


def right(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None) -> Tensor:
    """Return what the reference returns."""
    runs.append(RIGHT)
    return reference.linear(x, layout, parts, bias)


def wrong(x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None) -> Tensor:
    """Return 1 % more than the reference."""
    runs.append(WRONG)
    return reference.linear(x, layout, parts, bias) * 1.01


class Offer:
    """Is a kernel plugin: offers a function of this module for ``layouts``, before any other kernel."""

    def __init__(self, name: str, function: str, layouts: Iterable[Layout]) -> None:
        listed = list(layouts)
        self._specs = [
            KernelSpec(
                name=f"{name}-{kind}",
                impl=f"{__name__}:{function}",
                layout=kind,
                transforms=True,
                activations=frozenset(layout.activation.scheme for layout in listed),
                rank=1_000_000,
            )
            for kind in sorted({layout.kind for layout in listed})
        ]

    @hookimpl
    def qhub_kernels(self) -> Iterable[KernelSpec]:
        """Offer the kernels."""
        return self._specs
