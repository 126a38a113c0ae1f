"""What a kernel says of itself, as data: where it runs, on which layouts, for how many rows, at about what speed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qhub.kernels.roofline import Cost

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qhub.layouts import Layout, Parts

    LinearFunction = Callable[[Tensor, Layout, Parts, Tensor | None], Tensor]

__all__ = ["REFERENCE", "Cost", "KernelSpec", "Problem"]

# The kernel that is always there: the weight dequantized, then multiplied (qhub.kernels.reference).
REFERENCE = "reference"


@dataclass(frozen=True)
class Problem:
    """Is one layer's question: this layout on this device with inputs of this dtype."""

    layout: Layout
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class KernelSpec:
    """Declares a kernel: ``y = x @ W.T (+ bias)`` for one kind of layout, or the dense W itself.

    ``name``: unique. ``impl``: ``"module:function"`` called as ``function(x, layout, parts, bias)`` with x (M, K)
    contiguous, returning (M, N) in x's dtype; imported on first use. ``layout``: the layout's kind. ``devices``: device
    types; empty for any. ``dtypes``: names of the input's dtypes; empty for any. ``bits``: code widths; empty for any.
    ``max_m``: most rows it should be used for; None for any. ``divides``: what N, K or the group must be a multiple of.
    ``transforms``: whether it takes layouts with transforms. ``activations``: activation schemes it computes, by
    :attr:`qhub.layouts.Activation.scheme`; empty: those that ``accepts`` lets through.
    ``accepts``: ``"module:function"`` called with the :class:`Problem`, returning a reason to refuse or None; for what
    data cannot say. ``rank``: among kernels whose time nobody knows, the highest goes first; the reference has 0.
    ``version``: raise it when results or speed change: measurements of older ones are void.

    ``role``: ``"linear"``, or ``"dense"`` for a kernel that returns the dense weight: ``impl`` is then called as
    ``function(layout, parts, dtype)`` and returns (N, K) in ``dtype``; ``dtypes`` are those it can return,
    ``activations`` and ``max_m`` say nothing. Every value must lie within one rounding of
    :meth:`qhub.layouts.Layout.dequantize`'s.
    ``probes``: the M at which it is compared with the reference before it is used: one for each way it has to compute;
    or ``"module:function"`` called as ``(problem, parts)``, returning such M, and (M, config) for what it may choose by
    itself for more rows than one wants to compare.
    ``cost``: from which its time is guessed on a card where nobody measured it, or ``"module:function"`` that returns
    it for a :class:`Problem`, where kinds of weights differ; None: no guess.
    ``packages``: whose versions a measurement depends on ("triton").
    ``tunables``: ``"module:function"`` called as ``(problem, parts, m)``, returning {name: config} that tuning measures
    for inputs of m rows besides the kernel's own choice; a config is a dict of plain JSON values. ``impl`` is called
    with ``config=<dict>`` where a measurement chose one, and without where none did.
    ``bind``: ``"module:function"`` called once per weight as ``(layout, parts, dtype)``, with ``config=<dict>`` where
    one was chosen, returning ``function(x, bias)``, which is called instead of ``impl`` from then on. It may keep the
    tensors of ``parts``, their shapes, strides and dtypes; neither addresses nor values, which change when a weight is
    written into or its memory is given back for a while.
    ``prepare``: ``"module:function"`` called once per weight as ``(layout, parts, dtype)``, returning named tensors:
    the weight in the kernel's own form, which ``impl`` and ``bind`` get in the place of ``parts``. It is made anew when
    the weight is written into. A second form is a second copy in memory, so such a kernel is used only when
    ``QHUB_KERNEL`` names it or the user measured it (``qhub tune --bridges``).
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
    role: Literal["linear", "dense"] = "linear"
    probes: tuple[int, ...] | str = (1, 3)
    cost: Cost | str | None = None
    packages: tuple[str, ...] = ()
    tunables: str | None = None
    bind: str | None = None
    prepare: str | None = None

    @property
    def key(self) -> str:
        """Return the name under which measurements of the kernel are kept."""
        return f"{self.name}:{self.version}"

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
        if self.role == "linear" and self.activations and layout.activation.scheme not in self.activations:
            return f"computes activations {sorted(self.activations)}, not {layout.activation.scheme!r}"
        for name, multiple in self.divides:
            value = {"N": layout.out_features, "K": layout.in_features}.get(name)
            if value is None:
                value = layout.grid.cols if name == "group" and hasattr(layout, "grid") else 0
            if value % multiple:
                return f"needs {name} to be a multiple of {multiple}, this is {value}"
        return self.load(self.accepts)(problem) if self.accepts else None

    def cost_of(self, problem: Problem) -> Cost | None:
        """Return what the kernel's time for ``problem`` is guessed from; None: no guess."""
        return self.load(self.cost)(problem) if isinstance(self.cost, str) else self.cost

    def probes_of(self, problem: Problem, parts: Parts) -> list[tuple[dict[str, Any] | None, list[int]]]:
        """Return the configs with which the kernel is compared with the reference, None for its own choice, each with
        the M for which it is; none of them above ``max_m``."""
        given = self.load(self.probes)(problem, parts) if isinstance(self.probes, str) else self.probes
        most = float("inf") if self.max_m is None else self.max_m
        plain = [one for one in given if isinstance(one, int) and one <= most] or [1]
        chosen = [(config, [m]) for m, config in (one for one in given if not isinstance(one, int)) if m <= most]
        return [(None, plain), *chosen]

    def function(self) -> LinearFunction:
        """Import and return the kernel's code."""
        return self.load(self.impl)

    @staticmethod
    def load(path: str) -> Callable[..., Any]:
        """Return the function that ``"module:function"`` names."""
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)
