"""Says, per layer of a model, which kernel it takes at which M, and why each other was refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from qhub.kernels.dispatch import choose
from qhub.layouts import nbytes
from qhub.tensor import QuantizedTensor

__all__ = ["Explanation", "LayerExplanation", "explain"]


@dataclass(frozen=True)
class LayerExplanation:
    """Is the choice for one weight.

    ``kernels``: {M range: kernel name}. ``refused``: {kernel name: reason}. ``bytes``: of its tensors.
    """

    name: str
    layout: dict[str, Any]
    device: str
    dtype: str
    kernels: dict[str, str]
    refused: dict[str, str]
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """Is what :func:`explain` found; ``print`` it, or read :attr:`layers` and :attr:`dense`.

    ``dense``: {name: bytes} of weights of two and more dimensions that are not quantized.
    """

    layers: list[LayerExplanation]
    dense: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"layers": [vars(layer) for layer in self.layers], "dense": self.dense}

    def __str__(self) -> str:
        groups: dict[str, list[LayerExplanation]] = {}
        for layer in self.layers:
            key = json.dumps(
                [layer.kernels, layer.refused, layer.device, layer.dtype, layer.layout], sort_keys=True, default=str
            )
            groups.setdefault(key, []).append(layer)
        lines = []
        for members in groups.values():
            first = members[0]
            shape = f"{first.layout['out_features']}x{first.layout['in_features']}"
            bits = f" {first.layout['bits']}-bit" if "bits" in first.layout else ""
            lines.append(
                f"{len(members)} x {first.layout['kind']}{bits} {shape} on {first.device}, {first.dtype} input"
            )
            lines.append(f"    {members[0].name}" + (f" ... {members[-1].name}" if len(members) > 1 else ""))
            lines += [f"    M {span}: {name}" for span, name in first.kernels.items()]
            lines += [f"    not {name}: {reason}" for name, reason in first.refused.items()]
        lines.append(
            f"{len(self.layers)} quantized weights, {len(self.dense)} dense matrices ({sum(self.dense.values())} bytes)"
        )
        return "\n".join(lines)


def explain(model: torch.nn.Module, dtype: torch.dtype | None = None) -> Explanation:
    """Explain which kernel each quantized weight of ``model`` takes, and why the others were refused.

    ``dtype``: of the layers' inputs; None for each weight's own.
    """
    layers, dense = [], {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QuantizedTensor):
            if parameter.ndim >= 2:
                dense[name] = parameter.numel() * parameter.element_size()
            continue
        weight: Any = parameter[(0,) * (parameter.ndim - 2)] if parameter.ndim > 2 else parameter
        input_dtype = weight.compute_dtype or dtype or parameter.dtype
        choice = choose(weight.quant_layout, weight.parts, input_dtype)
        spans, start = {}, 1
        for limit, kernel, _ in choice.steps:
            spans[f"{start}+" if limit == float("inf") else f"{start}-{int(limit)}"] = kernel
            start = int(limit) + 1 if limit != float("inf") else start
        layers.append(
            LayerExplanation(
                name,
                weight.quant_layout.describe(),
                str(parameter.device),
                str(input_dtype).removeprefix("torch."),
                spans,
                dict(choice.refused),
                nbytes(parameter.parts),
            )
        )
    return Explanation(layers, dense)
