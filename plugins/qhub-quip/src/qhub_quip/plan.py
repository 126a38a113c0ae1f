"""The layout of each layer, and what a merge does on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Codebook
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_quip.hadamard import factor_of
from qhub_quip.lattices import lattice_layout

__all__ = ["layout_of", "merge_policy", "plan"]

# Blocks that Qidxs is stored in (quiptools_e8p_gemv.cu checks the same).
_ROWS, _COLUMNS = 16, 64


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight; raises :class:`ConfigError` naming a module of a shape that QuIP# has not."""
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        if weight.kind == "embedding":
            plans[weight.name] = Skip("quip quantizes linear layers")
        else:
            plans[weight.name] = LayerPlan(layout_of(config, weight))
    return plans


def layout_of(config: Any, weight: WeightInfo) -> Codebook:
    """Return the layout of ``weight``."""
    n, k = weight.out_features, weight.in_features
    if n % _ROWS or k % _COLUMNS:
        raise ConfigError(
            f"{weight.module} is {n}x{k}: QuIP# stores blocks of {_ROWS}x{_COLUMNS} weights. List the module in "
            "modules_to_not_convert if the checkpoint stores it dense"
        )
    factors = factor_of(n, f"the output of {weight.module}"), factor_of(k, f"the input of {weight.module}")
    return lattice_layout(config.codebook, n, k, config.residual_scale, factors, config.rescale_WH)


def merge_policy() -> AdapterPolicy:
    """Return how an update is written: rotated, to the nearest vectors of the lattice, the scale kept or refitted."""
    return AdapterPolicy(grid="best")
