"""Which layer is quantized, its layout, and its numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qhub.errors import LayoutError
from qhub.layouts import Activation, Float8, Grid, Layout
from qhub.layouts.chunks import all_finite
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_fp8.inc.config import FP8Config
from qhub_fp8.inc.scales import full_scale, scale_of_input, scales_of_weight
from qhub_fp8.settings import halves

__all__ = ["TYPES", "layout_of", "merge_policy", "plain_name", "plan", "quantize"]

# The class of a module by the kind of its weight, as the lists of a config name it.
TYPES = {"linear": "Linear", "conv1d": "Conv1D", "experts": "MoeMatmul"}


def plain_name(module: str) -> str:
    """Return a module's name without the part that PEFT puts into it."""
    return module.replace(".base_layer", "")


def plan(config: FP8Config, weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight, or which list leaves it alone."""
    statistics = ("max_abs",) if config.measures else ()
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        module = plain_name(weight.module)
        if weight.kind == "embedding":
            plans[weight.name] = Skip("inc quantizes linear layers")
            continue
        if any(part.startswith("lora_") for part in module.split(".")):
            plans[weight.name] = Skip("it belongs to an adapter")
            continue
        reason = config.blocked(module, TYPES[weight.kind])
        if reason is not None:
            plans[weight.name] = Skip(reason)
            continue
        stacked = halves(weight.name, weight.out_features) if weight.experts is not None else 1
        layout = layout_of(config, weight.out_features, weight.in_features, stacked)
        plans[weight.name] = LayerPlan(layout, statistics=statistics)
    return plans


def layout_of(config: FP8Config, out_features: int, in_features: int, projections: int = 1) -> Float8:
    """Return the layout of a matrix; ``projections``: how many equal ones are stacked in it, each with its scale."""
    rule = config.method.activation
    top = full_scale(config.codes, config.device)
    if config.dynamic_quantization:
        activation = Activation(
            kind="float8",
            granularity="row" if rule.rows else "tensor",
            format=config.codes,  # type: ignore[arg-type]
            top=top * 0.5,
            scale_format="ue8m0" if rule.rounding == "pow2" else "float32",
        )
    else:
        activation = Activation(kind="float8", granularity="tensor", static=True, format=config.codes)  # type: ignore[arg-type]
    rows = 1 if config.method.weight.rows else out_features // projections
    return Float8(
        out_features=out_features,
        in_features=in_features,
        format=config.codes,  # type: ignore[arg-type]
        grid=Grid("block", rows, in_features),
        activation=activation,
    )


def quantize(config: FP8Config, weight: Tensor, layout: Layout, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of ``layout`` for ``weight`` (N, K): scales as the config's method finds them, codes to nearest.

    ``statistics``: ``max_abs`` (K,) and ``tokens`` where inputs are measured. A layer that saw no input gets the scale
    1. Raises :class:`LayoutError` when the weight is not finite.
    """
    assert isinstance(layout, Float8)
    if not all_finite(weight):
        raise LayoutError(f"the weight of {layout.out_features}x{layout.in_features} to quantize holds NaN or infinity")
    rule, device, dtype = config.method.weight, config.device, config.dtype
    pieces = [weight] if rule.rows else list(weight.split(layout.grid.rows))
    scales = torch.cat([scales_of_weight(piece, rule, config.codes, device, dtype) for piece in pieces])
    top = full_scale(config.codes, device)
    ratio = layout.grid.split(weight.float()) / layout.grid.spread(scales.float())
    codes = layout.grid.join(ratio.clamp_(-top, top), layout.out_features, layout.in_features)
    parts = {"qweight": codes.contiguous().to(layout.dtype), "scales": scales}
    if layout.activation.static:
        parts["input_scale"] = _input_scale(config, statistics).to(weight.device)
    return parts


def _input_scale(config: FP8Config, statistics: Mapping[str, Tensor]) -> Tensor:
    seen = int(statistics["tokens"]) if "tokens" in statistics else 0
    largest = statistics["max_abs"].max() if seen and "max_abs" in statistics else torch.zeros(())
    return scale_of_input(largest.float(), config.method.activation, config.codes, config.device, config.dtype)


def record(config: FP8Config, stored: Mapping[str, Layout], dense: Sequence[str]) -> None:
    """Let ``config`` say what a file holds: that it is to be loaded, and on the blocklist every linear layer that is
    ``dense``; the library itself would take it for a quantized one."""
    config.mode = "LOAD"
    for module in dense:
        if config.blocked(module, "Linear") is None:
            config.blocklist["names"].append(f"^{re.escape(module)}$")


def merge_policy(config: FP8Config) -> AdapterPolicy:
    """Return how an update is written: scales that the hardware likes, or powers of two, stay what they are."""
    return AdapterPolicy(grid="best" if config.method.weight.rounding == "none" else "keep")
