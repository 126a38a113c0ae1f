"""Projections that read the same input, held as one tall weight whose rows the layers go on using as views.

No weight is held twice, and the layers keep their names, parameters and results: saving, adapters and merges see what
they saw. Where the rows cannot be stacked exactly, nothing is joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qhub.kernels.linear import linear
from qhub.modules import QuantLinear
from qhub.tensor import QuantizedTensor

__all__ = ["Joined", "is_plain", "pointers"]


def is_plain(module: nn.Module) -> bool:
    """Return whether ``module`` computes ``x @ weight.T + bias`` and nothing else: no adapter, hook or patch."""
    return (
        type(module) in (nn.Linear, QuantLinear)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def pointers(tensor: Tensor) -> tuple[int, ...]:
    """Return where the numbers of ``tensor`` lie: one address a part."""
    if isinstance(tensor, QuantizedTensor):
        return tuple(part.data_ptr() for part in tensor.parts.values())
    return (tensor.data_ptr(),)


class Joined:
    """Computes several layers' outputs side by side, (..., sum of their out_features), from one product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]):
        self.weight, self.bias, self.sizes = weight, bias, tuple(sizes)

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedTensor):
            return linear(x, self.weight, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)

    @classmethod
    def of(cls, layers: Sequence[nn.Linear]) -> Joined | None:
        """Join ``layers``; None where their rows cannot be stacked and cut again exactly.

        The layers' parameters become views of the joined ones: same objects, same numbers.
        """
        if not all(is_plain(layer) for layer in layers):
            return None
        if len({id(layer.weight) for layer in layers}) < len(layers) or any(_wants_gradient(layer) for layer in layers):
            return None
        biases = [layer.bias for layer in layers]
        if any((bias is None) != (biases[0] is None) for bias in biases):
            return None
        sizes = [layer.out_features for layer in layers]
        with torch.no_grad():
            weight = _stacked([layer.weight for layer in layers])
            if weight is None:
                return None
            bias = None
            if biases[0] is not None:
                bias = _stacked(biases)
                if bias is None:
                    return None
        return cls(weight, bias, sizes)


def _wants_gradient(layer: nn.Linear) -> bool:
    """Whether training could want this layer's own storage (an optimizer, a sharded wrapper)."""
    return layer.weight.requires_grad and layer.weight.grad is not None


def _cut_from(whole: Tensor, piece: Tensor, like: Tensor) -> bool:
    """Return whether ``piece`` is a view of ``whole`` that kernels can take in the place of ``like``."""
    same_memory = piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return same_memory and piece.is_contiguous() and piece.shape == like.shape


def _stacked(members: Sequence[Tensor]) -> Tensor | None:
    """Return the members on top of each other and make them views of it; None where that is not exact."""
    first = members[0]
    if any(type(other) is not type(first) or other.dtype != first.dtype for other in members):
        return None
    if any(other.device != first.device or other.device.type == "meta" for other in members):
        return None
    if not isinstance(first, QuantizedTensor):
        if any(type(member.data) is not Tensor for member in members):
            # Sharded weights, and whatever else lies in a tensor of its own kind.
            return None
        whole = torch.cat([member.detach() for member in members])
        for member, piece in zip(members, whole.split([len(member) for member in members]), strict=True):
            member.data = piece
        return whole
    quantized = [member for member in members if isinstance(member, QuantizedTensor)]
    if any(member.transposed or member.ndim != 2 for member in quantized):
        return None
    if any(member.compute_dtype != first.compute_dtype or member.policy != first.policy for member in quantized):
        return None
    joined = first.quant_layout.concat_rows([m.parts for m in quantized], [m.quant_layout for m in quantized])
    if joined is None:
        return None
    layout, parts = joined
    pieces, at = [], 0
    for member in quantized:
        cut = layout.select_rows(parts, at, at + member.quant_layout.out_features)
        at += member.quant_layout.out_features
        if cut is None or cut[0] != member.quant_layout:
            return None
        specs = member.quant_layout.part_specs()
        # A copy here would hold the weight twice.
        if not all(_cut_from(parts[name], cut[1][name], member.parts[name]) for name in specs):
            return None
        pieces.append(cut[1])
    whole = first._like(parts, layout=layout)
    for member, piece in zip(quantized, pieces, strict=True):
        member.parts.update(piece)
        for name, part in piece.items():
            setattr(member, f"part_{name}", part)
        member.memo.clear()
    return whole
