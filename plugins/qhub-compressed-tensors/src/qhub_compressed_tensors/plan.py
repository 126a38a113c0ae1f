"""The layout of each weight, and what a merge costs on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_compressed_tensors.config import schemes_of
from qhub_compressed_tensors.layout import layout_of
from qhub_compressed_tensors.matching import CLASSES, EMBEDDING, matching_pattern, names_of, scheme_for

__all__ = ["merge_policy", "plan"]


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight, or the entry of ``ignore`` that leaves it out."""
    schemes = schemes_of(config)
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        if weight.kind == "conv1d":
            plans[weight.name] = Skip("compressed-tensors stores no weight of a conv1d layer")
            continue
        names, classes = names_of(weight), EMBEDDING if weight.kind == "embedding" else CLASSES
        found = (matching_pattern(name, config.ignore or (), classes) for name in names)
        ignored = next((pattern for pattern in found if pattern is not None), None)
        chosen = (scheme_for(name, schemes, classes) for name in names)
        scheme = next((one for one in chosen if one is not None), None)
        if ignored is not None:
            plans[weight.name] = Skip(f"{ignored!r} in ignore")
        elif scheme is None:
            plans[weight.name] = Skip("it is no target of config_groups")
        else:
            layout = layout_of(scheme, weight.out_features, weight.in_features, weight.module)
            # Stored scales of inputs are found by calibration.
            statistics = ("max_abs",) if layout.activation.part_specs() else ()
            plans[weight.name] = LayerPlan(layout, statistics=statistics)
    return plans


def merge_policy() -> AdapterPolicy:
    """Return how an update is written: on the old grid or on a refitted one, whichever is nearer to the new values."""
    return AdapterPolicy(grid="best")
