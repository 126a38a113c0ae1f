"""Counts what a loaded quantized model holds: layouts, bits per weight, shares, what was left out and why."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "LayoutGroup",
    "Shares",
    "bits_on_disk",
    "groups_of",
    "layout_text",
    "quantizer_of",
    "shapeless",
    "shares_of",
    "skips_by_reason",
]


@dataclass(frozen=True)
class LayoutGroup:
    """Is what the quantized weights of one layout have in common, their shapes aside.

    ``layout``: :func:`shapeless`. ``names``: of the tensors. ``parameters``: how many weights they stand for.
    ``bytes``: how much memory they take.
    """

    layout: dict[str, Any]
    names: list[str]
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that one weight takes, scales and tables included."""
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True)
class Shares:
    """Says how much of a model is quantized, in bytes of the unquantized weights: what quantizing could work on.

    ``all_parameters``: of every parameter, 0 to 1. ``linear``: of linear layers and fused experts alone, the output
    head left out.
    """

    all_parameters: float
    linear: float


def quantizer_of(model: Any) -> Any:
    """Return the quantizer if a qhub plugin quantized ``model``, None otherwise."""
    from qhub.integrations.transformers.quantizer import PluginQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer if isinstance(quantizer, PluginQuantizer) else None


def groups_of(model: Any) -> list[LayoutGroup]:
    """Return the quantized weights of ``model`` by layout, the largest group first."""
    from qhub.tensor import QuantizedTensor

    groups: dict[str, LayoutGroup] = {}
    for name, weight in model.named_parameters():
        if not isinstance(weight, QuantizedTensor):
            continue
        layout = shapeless(weight.quant_layout.describe())
        found = groups.get(repr(layout), LayoutGroup(layout, [], 0, 0))
        groups[repr(layout)] = LayoutGroup(
            layout, [*found.names, name], found.parameters + weight.numel(), found.bytes + weight.nbytes
        )
    return sorted(groups.values(), key=lambda group: -group.parameters)


def shapeless(layout: dict[str, Any]) -> dict[str, Any]:
    """Return a layout's description without what only the shape decides: a grid of whole rows is just ``"row"``."""
    n, k = layout["out_features"], layout["in_features"]
    result = {key: value for key, value in layout.items() if key not in ("out_features", "in_features")}
    grid = result.get("grid")
    if grid is not None and (grid.kind, grid.cols) == ("block", k) and grid.rows in (1, n):
        result["grid"] = "row" if grid.rows == 1 else "tensor"
    if "activation" in result and result["activation"].kind == "none":
        del result["activation"]
    return result


def layout_text(layout: dict[str, Any]) -> str:
    """Return a description of :func:`shapeless` in one line: ``affine 4-bit, groups of 64``."""
    head = f"{layout['kind']} {layout['bits']}-bit" if "bits" in layout else str(layout["kind"])
    return ", ".join([head, *(_field(key, value) for key, value in layout.items() if key not in ("kind", "bits"))])


def _field(key: str, value: Any) -> str:
    if key == "grid":
        if isinstance(value, str):
            return f"one scale a {value}"
        return (
            f"groups of {value.cols}"
            if (value.kind, value.rows) == ("block", 1)
            else f"{value.kind} {value.rows}x{value.cols}"
        )
    if key == "transforms":
        return "transforms " + " ".join(f"{transform.side}:{transform.kind}" for transform in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
        usual = key == "activation"
        said = [
            _field(name, one)
            for name, (one, default) in inner.items()
            if one not in (None, False, 0) and not (usual and one == default)
        ]
        return f"{key} ({', '.join(said)})"
    if value is True:
        return key
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {str(value).removeprefix('torch.')}"


def shares_of(model: Any) -> Shares:
    """Return the shares of ``model`` that are quantized."""
    from qhub.integrations.transformers.weights import find_weights
    from qhub.tensor import QuantizedTensor

    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    linear = set(find_weights(model))
    totals = {"all": 0, "linear": 0}
    quantized = {"all": 0, "linear": 0}
    for name, weight in model.named_parameters():
        dense = weight.numel() * weight.element_size()
        kinds = ["all", "linear"] if name in linear and weight is not head_weight else ["all"]
        for kind in kinds:
            totals[kind] += dense
            quantized[kind] += dense if isinstance(weight, QuantizedTensor) else 0
    return Shares(quantized["all"] / max(totals["all"], 1), quantized["linear"] / max(totals["linear"], 1))


def skips_by_reason(quantizer: Any) -> dict[str, list[str]]:
    """Return the weights that were left as they are, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in quantizer.skipped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def bits_on_disk(model: Any, files: list[Path]) -> float | None:
    """Return the bits per quantized weight in ``files``; None when a tensor's dtype is one that torch does not have."""
    from qhub.integrations.transformers.checkpoint import read_headers, sort_entries
    from qhub.registry import registry
    from qhub.tensor import QuantizedTensor

    quantizer = quantizer_of(model)
    if any(file.suffix != ".safetensors" for file in files):
        # In containers the packed weights lie as they are in memory.
        return None
    fmt = registry.call(quantizer.method, "qhub_format", config=quantizer.quantization_config)
    stored, _ = sort_entries(read_headers([str(file) for file in files]), fmt)
    entries = [tensor for weight in stored.values() for tensor in weight.entries.values()]
    count = sum(p.numel() for p in model.parameters() if isinstance(p, QuantizedTensor))
    sizes = [None if tensor.dtype is None else math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in entries]
    known = [size for size in sizes if size is not None]
    return 8 * sum(known) / count if count and len(known) == len(sizes) else None
