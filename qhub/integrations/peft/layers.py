"""Merges adapters into the quantized weights of one tuner layer, and takes them out again bit by bit.

PEFT's own method does the arithmetic, whatever the tuner: for its time the layer holds the dense weight in float32. The
result is rounded to the layout once, however many adapters were merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qhub.errors import UnsupportedError
from qhub.heap import trim
from qhub.integrations.peft.dense import dense_weights, quantized_weights
from qhub.integrations.peft.observing import Observed, observed
from qhub.layouts import Parts
from qhub.layouts.chunks import all_finite
from qhub.merging import MergedLayer, current_options
from qhub.merging.rounding import round_onto
from qhub.tensor import QuantizedTensor

__all__ = ["check", "forget", "merge", "quantized_of", "unmerge"]

# What was there before adapters were merged: dense biases on the tuner layer, codes on the weight, which layers may
# share; so it goes when they go.
_BIASES, _PARTS = "_qhub_biases_before", "_qhub_parts_before"


def quantized_of(layer: Any) -> dict[str, QuantizedTensor]:
    """Return the quantized weights of the base layer that ``layer`` may write into, by their name there."""
    # A wrapper of one parameter writes into that one only.
    only = getattr(layer, "parameter_name", None)
    found = quantized_weights(layer.get_base_layer())
    return {name: weight for name, weight in found.items() if only in (None, name)}


def check(layer: Any, names: list[str] | None, where: str) -> None:
    """Raise :class:`UnsupportedError` if adapters ``names`` (None: the active ones) of ``layer`` cannot be merged.

    ``where``: the layer's name, for the message. Nothing is changed.
    """
    for name, weight in quantized_of(layer).items():
        if weight.policy.refuse is not None:
            raise UnsupportedError(f"no adapter can be merged into {where}.{name}: {weight.policy.refuse}")
        if weight.device.type == "meta":
            raise UnsupportedError(
                f"no adapter can be merged into {where}.{name}: it is offloaded and not in memory. Load the model "
                "without offloading to merge into it"
            )
    for adapter in layer.active_adapters if names is None else names:
        for owner in layer.adapter_layer_names:
            held = getattr(layer, owner, None)
            if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)) or adapter not in held:
                continue
            found = held[adapter]
            for tensor in found.parameters() if isinstance(found, nn.Module) else [found]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not all_finite(tensor):
                    raise UnsupportedError(
                        f"adapter {adapter!r} holds NaN or infinity in {owner} of {where}: nothing was merged. Train "
                        "it again, or load another"
                    )


def merge(layer: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Do what ``original``, the tuner's own ``merge``, does, on quantized base weights."""
    weights = quantized_of(layer)
    if not weights:
        original(*args, **kwargs)
        return
    seen = observed()
    if seen is not None and seen.dense:
        _merge_dense(layer, original, weights, *args, **kwargs)
        return
    where = type(layer).__name__ if seen is None else seen.names.get(layer, type(layer).__name__)
    names = kwargs.get("adapter_names", args[1] if len(args) > 1 else None)
    check(layer, names if isinstance(names, list) else None, where)
    merged = list(layer.merged_adapters)
    base = layer.get_base_layer()
    # Two wrappers of parameters may share one base layer: neither may put back what the other wrote.
    alone = getattr(layer, "parameter_name", None) is None
    others = {n: p.data.clone() for n, p in base._parameters.items() if alone and p is not None and n not in weights}
    try:
        with dense_weights(base, weights) as dense:
            original(*args, **kwargs)
            if layer.merged_adapters == merged:
                return
            written = {
                name: _rounded(name, where, weight, dense[name], seen, layer) for name, weight in weights.items()
            }
    except BaseException:
        layer.merged_adapters = merged
        _restore(base, others)
        raise
    if seen is None or seen.reversible:
        for weight in weights.values():
            _remember(weight, layer)
        if not merged:
            setattr(layer, _BIASES, others)
    for name, weight in weights.items():
        weight.data = weight._like(written[name])
    trim()


def _merge_dense(
    layer: Any, original: Callable[..., None], weights: dict[str, QuantizedTensor], *args: Any, **kwargs: Any
) -> None:
    """Merge, and leave the exact result in the layer's place as a dense weight."""
    base = layer.get_base_layer()
    with dense_weights(base, weights) as dense:
        original(*args, **kwargs)
        merged = {name: dense[name].detach().to(weight.dtype) for name, weight in weights.items()}
    for name, value in merged.items():
        base._parameters[name] = nn.Parameter(value, requires_grad=False)


def _rounded(
    name: str, where: str, weight: QuantizedTensor, parameter: Tensor, seen: Observed | None, layer: Any
) -> Parts:
    target = parameter.detach().to(weight.device, torch.float32)
    if not all_finite(target):
        raise UnsupportedError(f"with the adapter merged, {where}.{name} holds NaN or infinity: nothing was merged")
    if weight.transposed:
        target = target.transpose(-1, -2)
    inputs = None if seen is None else seen.inputs.get(layer)
    grid = current_options().grid or weight.policy.grid
    with torch.no_grad():
        rounded = round_onto(target, weight.quant_layout, weight.parts, grid, inputs)
    if seen is not None:
        seen.layers.append(
            MergedLayer(f"{where}.{name}", rounded.grid, rounded.spread, rounded.update, rounded.error, rounded.rows)
        )
    return rounded.parts


def unmerge(layer: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Do what ``original``, the tuner's own ``unmerge``, does; the weights get back the very codes they had.

    A weight that other layers share, with adapters of theirs still merged, has this layer's update subtracted; the last
    one restores the codes.
    """
    weights = quantized_of(layer)
    if not weights or not layer.merged:
        original(*args, **kwargs)
        return
    base = layer.get_base_layer()
    old = {name: _recalled(weight, layer) for name, weight in weights.items()}
    with dense_weights(base, weights) as dense:
        original(*args, **kwargs)
        written = {}
        for name, weight in weights.items():
            before = old[name]
            # What was there may have been in another order of codes: it comes back as it was.
            written[name] = (
                weight._like(_rounded(name, "", weight, dense[name], None, layer)) if before is None else before
            )
    for name, weight in weights.items():
        weight.data = written[name]
    _restore(base, vars(layer).pop(_BIASES, {}))


@dataclass
class _Before:
    """Is what a weight was before adapters were merged into it, and the layers that merged some."""

    weight: QuantizedTensor
    layers: list[Any]


def _remember(weight: QuantizedTensor, layer: Any) -> None:
    before = getattr(weight, _PARTS, None)
    if before is None:
        setattr(weight, _PARTS, _Before(weight._like(weight.parts), [layer]))
    elif not any(one is layer for one in before.layers):
        before.layers.append(layer)


def _recalled(weight: QuantizedTensor, layer: Any) -> QuantizedTensor | None:
    """Return ``weight`` without any adapter, if ``layer`` is the last that merged some; else None."""
    before = getattr(weight, _PARTS, None)
    if before is None or not any(one is layer for one in before.layers):
        return None
    before.layers = [one for one in before.layers if one is not layer]
    if before.layers:
        return None
    delattr(weight, _PARTS)
    return before.weight


def forget(layer: Any) -> None:
    """Give up what :func:`unmerge` would need."""
    vars(layer).pop(_BIASES, None)
    for weight in quantized_of(layer).values():
        if hasattr(weight, _PARTS):
            delattr(weight, _PARTS)


def _restore(base: nn.Module, others: dict[str, Tensor]) -> None:
    for name, value in others.items():
        parameter = base._parameters[name]
        if parameter is not None and parameter.shape == value.shape:
            parameter.data = value
