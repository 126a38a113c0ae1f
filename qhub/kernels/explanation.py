"""Says, per layer of a model, which kernel it takes at which M, how long that takes, and why each other does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qhub.kernels.dense_kernels import decoders
from qhub.kernels.dispatch import Choice, choose
from qhub.kernels.ordering import Timing
from qhub.layouts import Parts, nbytes
from qhub.tensor import QuantizedTensor

__all__ = ["Explanation", "LayerExplanation", "explain"]


@dataclass(frozen=True)
class LayerExplanation:
    """Is the choice for one weight.

    ``kernels``: {M range: kernel name}. ``refused``: {kernel name: reason}. ``bytes``: of its tensors. ``times``:
    {M: [[kernel, microseconds or None, where the time comes from, config or None], ...]}, the kernel taken first.
    ``prepared``: bytes that kernels keep besides, of a weight in a form of their own. ``decoder``: what makes the dense
    weight for the reference and for gradients, and why others do not.
    """

    name: str
    layout: dict[str, Any]
    device: str
    dtype: str
    kernels: dict[str, str]
    refused: dict[str, str]
    bytes: int
    times: dict[str, list[list[Any]]] = field(default_factory=dict)
    prepared: int = 0
    decoder: str = "torch"

    def taken(self) -> list[str]:
        """Return the kernel for each range of M, and its time."""
        return _ranges({m: _taken(timings[0]) for m, timings in self.times.items()})

    def lines(self) -> list[str]:
        """Return what is said of the layer's kernels, for people."""
        reasons = {m: _taken(timings[0]) + _lost(timings) for m, timings in self.times.items()}
        said = [f"    {text}" for text in _ranges(reasons)]
        said += [f"    not {name}: {reason}" for name, reason in self.refused.items()]
        if self.decoder != "torch":
            said.append(f"    dense weight: {self.decoder}")
        if self.prepared:
            said.append(f"    second copy of the weight: {self.prepared} bytes")
        return said


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
            key = json.dumps([layer.lines(), layer.device, layer.dtype, layer.layout], sort_keys=True, default=str)
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
            lines += first.lines()
        lines.append(
            f"{len(self.layers)} quantized weights, {len(self.dense)} dense matrices ({sum(self.dense.values())} bytes)"
        )
        return "\n".join(lines)


def explain(model: torch.nn.Module, dtype: torch.dtype | None = None) -> Explanation:
    """Explain which kernel each quantized weight of ``model`` takes, in what time, and why the others do not.

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
        found = decoders(weight.quant_layout, weight.parts, input_dtype)
        decoder = "torch" if found.spec is None else found.spec.name
        layers.append(
            LayerExplanation(
                name,
                weight.quant_layout.describe(),
                str(parameter.device),
                str(input_dtype).removeprefix("torch."),
                dict(_spans(choice)),
                {**choice.refused, **found.refused},
                nbytes(parameter.parts),
                {_edge(m): [_row(one) for one in timings] for m, timings in choice.times.items()},
                _prepared(weight.memo, weight.parts),
                decoder,
            )
        )
    return Explanation(layers, dense)


def _spans(choice: Choice) -> list[tuple[str, str]]:
    spans, start = [], 1
    for limit, kernel, _ in choice.steps:
        endless = limit == float("inf")
        # Steps that differ in their config alone are one.
        spans.append((f"{start}+" if endless else f"{start}-{int(limit)}", kernel))
        start = start if endless else int(limit) + 1
    return spans


def _edge(m: float) -> str:
    return "more" if m == float("inf") else str(int(m))


def _row(timing: Timing) -> list[Any]:
    us = None if timing.seconds is None else round(timing.seconds * 1e6, 2)
    return [timing.name, us, timing.source, timing.config_name]


def _ranges(texts: Mapping[str, str]) -> list[str]:
    """Return one line for each run of M of which the same is said."""
    ranges: list[tuple[str, str]] = []
    for m, text in texts.items():
        if ranges and ranges[-1][1] == text:
            ranges[-1] = (f"{ranges[-1][0].partition('-')[0]}-{m}", text)
        else:
            ranges.append((m, text))
    return [f"M {span.replace('-more', ' and more')}: {text}" for span, text in ranges]


def _taken(row: list[Any]) -> str:
    name, us, source, config = row
    text = name + (f" ({config})" if config else "")
    return text if us is None else f"{text} {us:.1f} us" + ("" if source == "measured" else f" ({source})")


def _lost(timings: list[list[Any]]) -> str:
    """Return why the others were not taken."""
    taken = timings[0][1]
    reasons = []
    for name, us, source, _ in timings[1:]:
        if us is None or taken is None:
            reasons.append(f"{name}: nobody measured {'it' if us is None else 'both'}, and its rank is lower")
        else:
            doubt = "" if source == "measured" else f" ({source})"
            reasons.append(f"{name} slower: {us:.1f} us{doubt} against {taken:.1f} us")
    return "; " + "; ".join(reasons) if reasons else ""


def _prepared(memo: Mapping[Any, Any], parts: Parts) -> int:
    """Return the bytes that kernels hold of a weight in their own form, tensors of the weight itself left out."""
    own = {part.data_ptr() for part in parts.values()}
    held = [value for key, value in memo.items() if isinstance(key, tuple) and key[0] == "prepared"]
    return sum(nbytes({name: one for name, one in mine.items() if one.data_ptr() not in own}) for _, mine in held)
