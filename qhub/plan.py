"""Which weights get which layout: what the core tells a plugin about a model, and what the plugin answers.

Works from names and shapes alone, so it runs on the meta device before a byte is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from qhub.layouts import Layout

__all__ = ["Adoption", "LayerPlan", "Skip", "WeightInfo", "matches"]


@dataclass(frozen=True)
class WeightInfo:
    """Describes one weight of a model that could be quantized.

    ``name``: the parameter, as in ``model.named_parameters()``. ``out_features`` x ``in_features``: of one matrix.
    ``experts``: how many matrices are fused in it; None for a plain linear layer. ``transposed``: whether the parameter
    is held as (in, out). ``dtype``: of the dense weight. ``kind``: ``"linear"``, ``"conv1d"`` (GPT-2's transposed
    linear), ``"experts"`` or ``"embedding"``. ``stored``: the module's name in the checkpoint that is being loaded,
    which may be another; None where none is.
    """

    name: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    kind: Literal["linear", "conv1d", "experts", "embedding"] = "linear"
    experts: int | None = None
    transposed: bool = False
    stored: str | None = None

    @property
    def module(self) -> str:
        """Return the parameter's name without ``.weight``: the module of a linear layer, the parameter of fused
        experts."""
        return self.name.removesuffix(".weight")

    @property
    def size(self) -> int:
        """Return the number of weights."""
        return self.out_features * self.in_features * (self.experts or 1)


@dataclass(frozen=True)
class LayerPlan:
    """Says how one weight will be stored.

    ``layout``: of one matrix. ``compute_dtype``: the product runs in it and is cast back; None: in the input's dtype.
    ``statistics``: names of the input statistics (:mod:`qhub.calibration.statistics`) that ``qhub_quantize`` and
    ``qhub_equalize`` need; empty for methods without calibration. ``rows_independent``: each row's numbers depend on
    that row and the statistics alone, so layers that share an input may be quantized as one tall matrix.
    """

    layout: Layout
    compute_dtype: torch.dtype | None = None
    statistics: tuple[str, ...] = ()
    rows_independent: bool = False


@dataclass(frozen=True)
class Skip:
    """Says that a weight stays as it is, and why; the reason is reported, so it names what to change."""

    reason: str


@dataclass(frozen=True)
class Adoption:
    """Says how a method would hold what another method quantized.

    ``config``: the method's config object. ``layouts``: by weight, the layout that the numbers should go into, or a
    :class:`Skip` whose reason says why the method has none for them.
    """

    config: Any
    layouts: Mapping[str, Layout | Skip]


def matches(module: str, patterns: Iterable[str]) -> str | None:
    """Return the first of ``patterns`` that names ``module``; None if none does.

    A pattern names a module as transformers' own skip lists do: it is the whole name or a leading part of it up to a
    dot, a regular expression with the same boundary, or the end of the name.
    """
    for pattern in patterns:
        try:
            by_expression = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
        except re.error:
            by_expression = False
        if by_expression or module.endswith(pattern):
            return pattern
    return None
