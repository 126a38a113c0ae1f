"""The product with a weight in tiles on Hopper: its own kernel for many rows, those of ``tiled/`` for few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhub.layouts import Layout, Parts
from qhub.layouts.tiled import Tiled
from qhub_triton.tiled.arguments import size_of
from qhub_triton.tiled.linear import Product
from qhub_triton.tiled.plans import Wide, candidates, named, plan_of
from qhub_triton.wide.launching import stages_for

__all__ = ["bind", "linear", "tunables"]

if TYPE_CHECKING:
    from qhub.kernels import Problem


def tunables(problem: Problem, parts: Parts, m: int) -> dict[str, dict[str, Any]]:
    """Return the plans worth measuring for ``m`` rows of input, by name; those of ``tiled/`` are that kernel's."""
    layout = problem.layout
    assert isinstance(layout, Tiled)
    size = replace(size_of(layout, parts["qweight"].device), stages=stages_for(layout))
    return named(one for one in candidates(size, m) if isinstance(one, Wide))


def linear(
    x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None, config: dict[str, Any] | None = None
) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K) contiguous, in x's dtype; ``config``: a plan, None for the rule's."""
    return bind(layout, parts, x.dtype, config)(x, bias)


def bind(
    layout: Layout, parts: Parts, dtype: torch.dtype, config: dict[str, Any] | None = None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what computes ``x @ W.T + bias`` for x (M, K) contiguous of ``dtype``, bias (N,) of ``dtype`` or None."""
    assert isinstance(layout, Tiled)
    return Product(layout, parts, dtype, None if config is None else plan_of(config), stages_for(layout))
