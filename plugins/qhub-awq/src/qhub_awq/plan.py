"""The layout of each layer, which layers a format cannot hold, and what a merge costs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qhub.errors import ConfigError
from qhub.layouts import Affine, Grid
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo

__all__ = ["STATISTICS", "exclusions_of", "layout_of", "merge_policy", "misfit", "plan"]

STATISTICS = ("hessian", "mean_abs")


def plan(config: Any, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight, or why it stays as it is.

    Raises :class:`ConfigError` when the groups fit none of the weights.
    """
    excluded = exclusions_of(config)
    plans: dict[str, LayerPlan | Skip] = {}
    misfits = []
    for weight in weights:
        hit = next((key for key, pattern in excluded.items() if pattern.match(weight.module)), None)
        if weight.kind == "embedding":
            plans[weight.name] = Skip("awq quantizes linear layers")
            continue
        if hit is not None:
            plans[weight.name] = Skip(f"left out by {hit!r} in dynamic")
            continue
        reason = misfit(config, weight)
        if reason is not None:
            misfits.append(f"{weight.name}: {reason}")
            plans[weight.name] = Skip(reason)
            continue
        layout = layout_of(config, weight.out_features, weight.in_features)
        plans[weight.name] = LayerPlan(layout, statistics=STATISTICS, rows_independent=True)
    if misfits and not any(isinstance(one, LayerPlan) for one in plans.values()):
        raise ConfigError(
            f"group_size={config.group_size} in the awq format {config.format!r} fits none of the weights: {misfits[0]}"
        )
    return plans


def misfit(config: Any, weight: WeightInfo) -> str | None:
    """Return why the config's format cannot hold ``weight``; None when it can.

    Source: the assertions of ``WQLinear_GEMM``, ``WQLinear_GEMV`` and ``WQLinear_GEMVFast`` of autoawq 0.2.9.
    """
    n, k, group = weight.out_features, weight.in_features, config.group_size
    if group != -1 and k % group:
        return (
            f"its {k} input features are no multiple of group_size={group}: choose a group size that divides them "
            "(-1 is a whole row)"
        )
    # Two projections may share the rows of fused experts; a file holds each on its own.
    unit = 16 if weight.kind == "experts" else 8
    if n % unit:
        return f"its {n} output features are no multiple of {unit}, which the words of the format hold together"
    if config.format != "gemm":
        unit = 8 if config.format == "gemv" else 64
        if k % unit:
            return f"its {k} input features are no multiple of {unit}, which the format {config.format!r} needs"
    return None


def layout_of(config: Any, out_features: int, in_features: int) -> Affine:
    """Return the layout of 4 bits with a scale per row and group.

    ``w = scales * (q - zeros)`` with whole zeros, 8 everywhere without ``zero_point``; in the formats that store the
    product instead, ``w = scales * q + zeros`` with zeros = -(scale * zero). Source: Lin et al. 2023, "AWQ", section 3;
    ``dequantize_gemm`` of autoawq 0.2.9 (awq/utils/packing_utils.py) and its kernels.
    """
    group = in_features if config.group_size == -1 else config.group_size
    layout = Affine(out_features=out_features, in_features=in_features, bits=4, grid=Grid.along_k(group), zero="value")
    if config.format in ("gemv_fast", "llm-awq"):
        return dataclasses.replace(layout, zero="offset")
    return layout if config.zero_point else dataclasses.replace(layout, zero="constant", zero_point=8.0)


def exclusions_of(config: Any) -> dict[str, re.Pattern[str]]:
    """Return the exclusions of gptqmodel's ``dynamic``, ``{"-:regex": {}}``, by key.

    Raises :class:`ConfigError` on anything else in it: AWQ's formats have one width, and settings by module are not
    offered. Source: gptqmodel 7.7, ``_resolve_dynamic_override`` (gptqmodel/quantization/config.py).
    """
    dynamic = getattr(config, "dynamic", None) or {}
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"dynamic={dynamic!r} of an awq config: it is a dictionary from patterns to settings")
    patterns = {}
    for key in dynamic:
        if not isinstance(key, str) or not key.startswith("-:"):
            raise ConfigError(
                f"dynamic of an awq config, entry {key!r}: this plugin reads exclusions ('-:pattern') only; list other "
                "modules in modules_to_not_convert"
            )
        try:
            patterns[key] = re.compile(key[2:])
        except re.error as error:
            raise ConfigError(f"dynamic of an awq config, entry {key!r} is no regular expression: {error}") from error
    return patterns


def merge_policy() -> AdapterPolicy:
    """Return how an update is written: on the old grid or on a refitted one, whichever is nearer to the new values.

    Rounded to nearest, as by ``weight.copy_``, an update far under the grid's own step (some 7 % of a group's largest
    weight) is lost. Adapters that are merged through PEFT have their rounding errors spread by the layer's inputs
    (:mod:`qhub.merging.rounding`), which keeps most of them. Input scales stay as they are; the update is divided by
    them.
    """
    return AdapterPolicy(grid="best")
