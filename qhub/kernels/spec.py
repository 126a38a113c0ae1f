"""What a kernel says of itself, as data: where it runs, on which layouts, for how many rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qhub.layouts import Layout, Parts

    LinearFunction = Callable[[Tensor, Layout, Parts, Tensor | None], Tensor]

__all__ = ["KernelSpec", "Problem"]


@dataclass(frozen=True)
class Problem:
    """Is one layer's question: this layout on this device with inputs of this dtype."""

    layout: Layout
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class KernelSpec:
    """Declares a kernel: ``y = x @ W.T (+ bias)`` for one kind of layout.

    ``name``: unique. ``impl``: ``"module:function"`` called as ``function(x, layout, parts, bias)`` with x (M, K)
    contiguous, returning (M, N) in x's dtype; imported on first use. ``layout``: the layout's kind. ``devices``: device
    types; empty for any. ``dtypes``: names of the input's dtypes; empty for any. ``bits``: code widths; empty for any.
    ``max_m``: most rows it should be used for; None for any. ``divides``: what N, K or the group must be a multiple of.
    ``transforms``: whether it takes layouts with transforms. ``activations``: activation schemes it computes, by
    :attr:`qhub.layouts.Activation.scheme`; empty: those that ``accepts`` lets through.
    ``accepts``: ``"module:function"`` called with the :class:`Problem`, returning a reason to refuse or None; for what
    data cannot say. ``rank``: among kernels that no measurement has ordered, the highest goes first; the reference has
    0. ``version``: raise it when results or speed change.
    """

    name: str
    impl: str
    layout: str
    devices: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    bits: frozenset[int] = frozenset()
    max_m: int | None = None
    divides: tuple[tuple[str, int], ...] = ()
    transforms: bool = False
    activations: frozenset[str] = frozenset({"none"})
    accepts: str | None = None
    rank: int = 1
    version: int = 1

    def refusal(self, problem: Problem) -> str | None:
        """Return why the kernel cannot take ``problem``; None when it can."""
        layout = problem.layout
        dtype = str(problem.dtype).removeprefix("torch.")
        if self.layout != layout.kind:
            return f"computes {self.layout} layouts, this is {layout.kind}"
        if self.devices and problem.device not in self.devices:
            return f"runs on {'/'.join(sorted(self.devices))}, not {problem.device}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {'/'.join(sorted(self.dtypes))} inputs, not {dtype}"
        bits = getattr(layout, "bits", None)
        if self.bits and bits not in self.bits:
            return f"takes {sorted(self.bits)} bits, not {bits}"
        if layout.transforms and not self.transforms:
            return f"takes no transforms, this has {[f'{t.side} {t.kind}' for t in layout.transforms]}"
        if self.activations and layout.activation.scheme not in self.activations:
            return f"computes activations {sorted(self.activations)}, not {layout.activation.scheme!r}"
        for name, multiple in self.divides:
            value = {"N": layout.out_features, "K": layout.in_features}.get(name)
            if value is None:
                value = layout.grid.cols if name == "group" and hasattr(layout, "grid") else 0
            if value % multiple:
                return f"needs {name} to be a multiple of {multiple}, this is {value}"
        return self.load(self.accepts)(problem) if self.accepts else None

    def function(self) -> LinearFunction:
        """Import and return the kernel's code."""
        return self.load(self.impl)

    @staticmethod
    def load(path: str) -> Callable:
        """Return the function that ``"module:function"`` names."""
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)
