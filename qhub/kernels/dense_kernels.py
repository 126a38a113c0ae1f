"""Finds the kernel that decodes a layout to its dense weight, if a plugin offers one that agrees with the layout.

The reference product runs on what it returns, and so do gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhub.kernels.roofline import Cost
from qhub.kernels.spec import REFERENCE, KernelSpec, Problem
from qhub.layouts import Layout, Parts

if TYPE_CHECKING:
    DecodeFunction = Callable[[Layout, Parts, torch.dtype], Tensor]

__all__ = ["Decoders", "decoder", "decoders", "forget", "reference_spec"]

# torch's own decoding moves some fifty bytes a weight, in a dozen launches or more.
_TORCH = Cost(bandwidth=0.05, rate=0.9, through_dense=True, launch=40e-6)
_KERNEL = Cost(bandwidth=0.5, rate=0.9, through_dense=True, launch=6e-6)


@dataclass
class Decoders:
    """Is the answer for one layout: the kernel that decodes it, None for the layout's own code, and why not others."""

    spec: KernelSpec | None = None
    function: DecodeFunction | None = None
    refused: dict[str, str] = field(default_factory=dict)


_found: dict[tuple[Layout, str, torch.dtype], Decoders] = {}


def forget() -> None:
    """Drop what was found."""
    _found.clear()


def decoder(layout: Layout, parts: Parts, dtype: torch.dtype) -> DecodeFunction | None:
    """Return ``function(layout, parts, dtype)`` that decodes this layout; None: the layout's own code does."""
    return decoders(layout, parts, dtype).function


def decoders(layout: Layout, parts: Parts, dtype: torch.dtype) -> Decoders:
    """Return what decodes ``parts`` of one matrix to ``dtype``; decided once, on these parts, then looked up.

    ``QHUB_KERNEL=reference`` asks for torch's own arithmetic alone.
    """
    from qhub.kernels import dispatch

    device = next(iter(parts.values())).device.type
    if device == "meta" or dispatch.current() == REFERENCE:
        return Decoders()
    key = (layout, device, dtype)
    found = _found.get(key)
    if found is None:
        offered = [spec for spec in dispatch.kernels().values() if spec.role == "dense"]
        found = _found[key] = _chosen(offered, Problem(layout, device, dtype), parts)
    return found


def _chosen(offered: list[KernelSpec], problem: Problem, parts: Parts) -> Decoders:
    from qhub.kernels.admission import decoded_wrongly

    result = Decoders()
    for spec in sorted(offered, key=lambda spec: -spec.rank):
        function = None
        try:
            reason = spec.refusal(problem)
            if reason is None:
                function = spec.load(spec.impl)
                reason = decoded_wrongly(function, problem.layout, parts, problem.dtype)
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {error}"
            warnings.warn(f"the kernel {spec.name!r} {reason}; another one is used", RuntimeWarning, stacklevel=3)
        if reason is not None:
            result.refused[spec.name] = reason
        elif result.function is None:
            result.spec, result.function = spec, function
    return result


@dataclass(frozen=True)
class _Reference(KernelSpec):
    """Is the reference as a kernel. ``through``: the key of what decodes the weight for it, which decides its times."""

    through: str = "torch"

    @property
    def key(self) -> str:
        return f"{self.name}:{self.version} through {self.through}"


def reference_spec(problem: Problem, parts: Parts) -> KernelSpec:
    """Return the reference for one layer as a kernel among others."""
    # Inputs that are rounded meet a weight in float32, which torch decodes.
    spec = None
    if problem.layout.activation.kind == "none":
        spec = decoders(problem.layout, parts, problem.dtype).spec
    cost = _TORCH
    if spec is not None:
        own = spec.cost_of(problem) or _KERNEL
        cost = Cost(own.bandwidth, _KERNEL.rate, through_dense=True, launch=own.launch + 3e-6)
    return _Reference(
        name=REFERENCE,
        impl="qhub.kernels.reference:linear",
        layout=problem.layout.kind,
        rank=0,
        cost=cost,
        packages=() if spec is None else spec.packages,
        through="torch" if spec is None else spec.key,
    )
