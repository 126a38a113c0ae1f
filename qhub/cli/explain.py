"""``qhub explain``: which kernel every quantized layer takes for how many rows, in what time, and why not another."""

from __future__ import annotations

from typing import Annotated

import typer

from qhub.cli.loading import DeviceMap, Dtype, Model, load_model, parse_device_map, parse_dtype
from qhub.cli.measure import layout_text, shapeless
from qhub.cli.output import Json, emit, table, working
from qhub.errors import UnsupportedError

__all__ = ["explain"]


def explain(
    model: Model,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    modules: Annotated[
        bool, typer.Option("--modules", help="One row for every layer instead of one for all alike.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Explain which kernel multiplies each quantized layer, and why others do not.

    M is the number of rows of the input: 1 when one sequence is decoded,
    batch times length when a prompt is read. The model is loaded, and each
    kernel that could be used is compared with the reference first. Times are
    those that were measured on such a card (qhub tune measures this one), or
    by neighbours in size, or guessed: that is said beside them.
    QHUB_KERNEL=name forces one.

    \b
    Examples:
      qhub explain ./model-nf4
      qhub explain ./model-nf4 --dtype float32 --modules
      QHUB_KERNEL=reference qhub explain ./model-nf4
    """
    wanted, places = parse_dtype(dtype), parse_device_map(device_map)
    with working():
        from qhub.kernels import explain as explain_model

        found = explain_model(load_model(model, dtype=wanted, device_map=places))
    if not found.layers:
        raise UnsupportedError(
            f"{model} has no weight that a qhub plugin holds quantized, so there are no kernels to explain: "
            "quantize it first (qhub quantize)"
        )
    if not modules:
        emit(as_json, found.to_dict(), str(found))
        return
    rows = [
        [
            layer.name,
            f"{layer.layout['out_features']}x{layer.layout['in_features']}",
            layout_text(shapeless(layer.layout)),
            "\n".join(layer.taken()),
            "; ".join(f"{name}: {reason}" for name, reason in layer.refused.items()),
        ]
        for layer in found.layers
    ]
    emit(as_json, found.to_dict(), table("", ["layer", "N x K", "layout", "kernel", "refused"], rows))
