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
from qhub_triton.tiled.plans import Size, Wide, plan_of
from qhub_triton.tiled.trials import candidates, named, probed
from qhub_triton.wide.tiles import tiles_of

__all__ = ["bind", "linear", "probes", "tunables"]

if TYPE_CHECKING:
    from qhub.kernels import Problem


def tunables(problem: Problem, parts: Parts, m: int) -> dict[str, dict[str, Any]]:
    """Return the plans worth measuring for ``m`` rows of input, by name; those of ``tiled/`` are that kernel's."""
    return named(one for one in candidates(_size(problem, parts), m) if isinstance(one, Wide))


def probes(problem: Problem, parts: Parts) -> list[int | tuple[int, dict[str, Any]]]:
    """Return the rows of input at which each way of cutting the work that the rule may choose is compared."""
    # One tile and a bit; several for each processor.
    return probed(_size(problem, parts), (1, 20, 130, 700))


def _size(problem: Problem, parts: Parts) -> Size:
    layout = problem.layout
    assert isinstance(layout, Tiled)
    return replace(size_of(layout, parts["qweight"].device), wide=tiles_of(layout))


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
    return Product(layout, parts, dtype, None if config is None else plan_of(config), tiles_of(layout))
