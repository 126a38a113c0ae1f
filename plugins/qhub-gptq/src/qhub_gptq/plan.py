"""The layout of each layer, and what a merge costs on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qhub.layouts import Affine, Grid, Transform
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_gptq.dynamic import Rule, Settings, rules_of, settings_of

__all__ = ["ACT_ORDER", "layout_of", "merge_policy", "plan"]

ACT_ORDER = (Transform("permute", "in"),)


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight, or the entry of ``dynamic`` that leaves it out."""
    rules = rules_of(config)
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        found = settings_of(config, rules, weight.module)
        if weight.kind == "embedding":
            plans[weight.name] = Skip("gptq quantizes linear layers")
        elif isinstance(found, Rule):
            plans[weight.name] = Skip(f"left out by {found.key!r} in dynamic")
        else:
            plans[weight.name] = LayerPlan(layout_of(found, weight.out_features, weight.in_features))
    return plans


def layout_of(settings: Settings, out_features: int, in_features: int) -> Affine:
    """Return the layout ``w = scales * (q - zero)`` with one scale per row and ``group_size`` columns.

    With ``sym`` the zero is 2^(bits-1) everywhere and not kept as a tensor. With ``desc_act`` a group is made of the
    columns that were quantized one after the other, so a permutation of the inputs puts them side by side. Source:
    Frantar et al. 2022, "GPTQ", section 3; ``TorchLinear`` of gptqmodel 7.7 (gptqmodel/nn_modules/qlinear/torch.py).
    """
    group = in_features if settings.group_size == -1 else min(settings.group_size, in_features)
    return Affine(
        out_features=out_features,
        in_features=in_features,
        bits=settings.bits,
        grid=Grid.along_k(group),
        zero="constant" if settings.sym else "value",
        zero_point=float(2 ** (settings.bits - 1)) if settings.sym else 0.0,
        # One group has no order.
        transforms=ACT_ORDER if settings.desc_act and group < in_features else (),
    )


def merge_policy() -> AdapterPolicy:
    """Return how an update is written: on the old grid or on a refitted one, whichever is nearer to the new values."""
    return AdapterPolicy(grid="best")
