"""The layout of each weight, and which weights the file format cannot hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qhub.layouts import Affine, Grid
from qhub.plan import LayerPlan, Skip, WeightInfo
from qhub_eetq.interleave import COLUMNS, ROWS

__all__ = ["int8_rows", "plan", "unfit"]


def plan(weights: Sequence[WeightInfo]) -> Mapping[str, LayerPlan | Skip]:
    """Return the layout of each weight; embeddings, and shapes that EETQ's interleaving does not take, are skipped.

    Upstream puts its layer in the place of any ``nn.Linear`` and then fails on such a shape.
    """
    plans: dict[str, LayerPlan | Skip] = {}
    for weight in weights:
        reason = unfit(weight.out_features, weight.in_features)
        if weight.kind == "embedding":
            plans[weight.name] = Skip("eetq quantizes linear layers and experts, this is an embedding")
        elif reason is not None:
            plans[weight.name] = Skip(reason)
        else:
            plans[weight.name] = LayerPlan(int8_rows(weight.out_features, weight.in_features), rows_independent=True)
    return plans


def unfit(out_features: int, in_features: int) -> str | None:
    """Return why an EETQ file cannot hold an (out_features, in_features) matrix; None if it can."""
    if in_features % ROWS or out_features % COLUMNS:
        return (
            f"EETQ interleaves blocks of {ROWS}x{COLUMNS} weights, which do not divide a matrix with {in_features} "
            f"inputs and {out_features} outputs: quantize it with a method that can, or list it in "
            "modules_to_not_convert"
        )
    return None


def int8_rows(out_features: int, in_features: int) -> Affine:
    """Return the layout: w = code * scale, codes from -128 to 127, one scale for each row (output channel)."""
    return Affine(
        out_features=out_features,
        in_features=in_features,
        bits=8,
        signed=True,
        grid=Grid("block", 1, in_features),
    )
