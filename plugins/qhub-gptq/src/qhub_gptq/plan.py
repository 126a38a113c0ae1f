"""The layout of each layer, and what a merge costs on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qhub.layouts import Affine, Grid, Transform
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_gptq.config import quality_of
from qhub_gptq.dynamic import Rule, Settings, rules_of, settings_of

__all__ = ["ACT_ORDER", "layout_of", "merge_policy", "plan"]

ACT_ORDER = (Transform("permute", "in"),)


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight, or the entry of ``dynamic`` that leaves it out."""
    rules = rules_of(config)
    statistics = ("cross", "hessian") if quality_of(config) == "high" else ("hessian",)
    static = bool(getattr(config, "static_groups", False))
    inside = getattr(config, "modules_in_block_to_quantize", None)
    listed = None if inside is None else tuple(f".{name}" for names in inside for name in names)
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        found = settings_of(config, rules, weight.module)
        if weight.kind == "embedding":
            # Each token is a row, rounded to nearest on the scales that cost it least: its input has no correlations.
            if not getattr(config, "embeddings", False):
                plans[weight.name] = Skip("embeddings=True asks for it")
            elif isinstance(found, Rule):
                plans[weight.name] = Skip(f"left out by {found.key!r} in dynamic")
            else:
                plain = dataclasses.replace(found, desc_act=False)
                plans[weight.name] = LayerPlan(layout_of(plain, weight.out_features, weight.in_features))
        elif listed is not None and not f".{weight.module}".endswith(listed):
            plans[weight.name] = Skip("it is not in modules_in_block_to_quantize")
        elif isinstance(found, Rule):
            plans[weight.name] = Skip(f"left out by {found.key!r} in dynamic")
        else:
            layout = layout_of(found, weight.out_features, weight.in_features, static)
            # A row is rounded by itself, whatever the others are.
            plans[weight.name] = LayerPlan(layout, statistics=statistics, rows_independent=True)
    return plans


def layout_of(settings: Settings, out_features: int, in_features: int, static_groups: bool = False) -> Affine:
    """Return the layout ``w = scales * (q - zero)`` with one scale per row and ``group_size`` columns.

    With ``sym`` the zero is 2^(bits-1) everywhere and not kept as a tensor. With ``desc_act`` a group is made of the
    columns that were quantized one after the other, so a permutation of the inputs puts them side by side; not with
    ``static_groups``, where groups are made of neighbours whatever the order of quantizing.
    Source: Frantar et al. 2022, "GPTQ", section 3; gptqmodel 7.7, ``TorchLinear`` (nn_modules/qlinear/torch.py).
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
        transforms=ACT_ORDER if settings.desc_act and not static_groups and group < in_features else (),
    )


def merge_policy() -> AdapterPolicy:
    """Return how an update is written: on the old grid or on a refitted one, whichever is nearer to the new values.

    What is lost, as relative error of the weight with the update in it, mean over three matrices of a language model
    (26 M parameters) rounded to the layout, random rank-8 updates::

        bits, group    rounding cost   update of 1 %: old grid / refitted   update of 10 %: old grid / refitted
        8 sym, 128     0.64 %          0.62 / 0.61 %                        0.94 / 0.64 %
        4 sym, 128     10.7 %          1.00 / 1.00 %                        8.49 / 8.42 %
        4 asym, 128    9.8 %           1.00 / 1.00 %                        8.19 / 8.10 %
        3 asym, 128    19.4 %          1.00 / 1.00 %                        9.80 / 9.76 %
        2 asym, 32     33.7 %          1.00 / 0.98 %                        9.95 / 9.79 %

    That is rounding to nearest, all that ``weight.copy_`` can do. Adapters that are merged through PEFT have their
    rounding errors spread by the layer's inputs (:mod:`qhub.merging.rounding`), which keeps most of them.
    """
    return AdapterPolicy(grid="best")
