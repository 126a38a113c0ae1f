"""GPTQ: codes one feature after the other, each one's rounding error spread over the features to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1.
Weights are held transposed, (features, rows): a step then works on one contiguous row of memory. Steps are looked back
upon within a leaf of 32 features (one product of a matrix and a vector each; on a GPU the leaf is one kernel), leaves
are pushed forward to the end of their block of 128 and blocks to the end of the matrix, by matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qhub_gptq.fused import fused_kernels

__all__ = ["Chooser", "solve"]

# Takes a group's weights (features, rows) as they are when its turn comes, and where its features lie, and gives scale
# and zero, (rows,) each.
Chooser = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]

_BLOCK, _LEAF = 128, 32


def solve(
    weight: Tensor,
    factor: Tensor,
    group_size: int,
    largest: int,
    choose: Chooser | Sequence[int],
    fixed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes less zero (K, N), scales (G, N) and zeros (G, N), all float32; ``weight`` (K, N) is overwritten.

    ``factor``: (K, K), see :func:`qhub_gptq.hessian.unit_factor`. ``largest``: code. ``choose``: gives scale and zero
    of each group of ``group_size`` consecutive features when its turn comes. With ``fixed`` scales and zeros (G, N) it
    is the group of each feature instead.
    """
    features, rows = weight.shape
    chooser: Chooser | None = None
    if callable(choose):
        chooser = choose
        groups: Sequence[int] = [feature // group_size for feature in range(features)]
        scales, zeros = (weight.new_ones(-(-features // group_size), rows) for _ in range(2))
    else:
        assert fixed is not None
        groups, (scales, zeros) = choose, fixed
        group_size = features
    inverse, low, high = 1 / scales, -zeros, largest - zeros
    codes, errors = torch.empty_like(weight), weight.new_empty(_BLOCK, rows)
    back = factor.t().contiguous()
    members: Any = groups
    kernels = fused_kernels(weight.device, weight.dtype)
    if kernels is not None:
        members = torch.tensor(groups, dtype=torch.int32, device=weight.device)
    leaf = _leaf if kernels is None else kernels.leaf
    for start, stop in _blocks(features, group_size):
        error = errors[: stop - start]
        for first in range(start, stop, _LEAF):
            last = min(first + _LEAF, stop)
            if chooser is not None and first % group_size == 0:
                group = first // group_size
                end = min(first + group_size, features)
                scales[group], zeros[group] = chooser(weight[first:end], first, end)
                inverse[group], low[group], high[group] = 1 / scales[group], -zeros[group], largest - zeros[group]
            leaf(
                weight[first:last], back[first:last, first:last], codes[first:last],
                error[first - start : last - start], members[first:last], scales, inverse, low, high,
            )  # fmt: skip
            if last < stop:
                weight[last:stop].addmm_(back[last:stop, first:last], error[first - start : last - start], alpha=-1)
        if stop < features:
            weight[stop:].addmm_(back[stop:, start:stop], error, alpha=-1)
    return codes, scales, zeros


def _blocks(features: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Give runs of at most 128 features; a group begins where a run or a leaf of it begins."""
    whole = _BLOCK // group_size * group_size if group_size <= _BLOCK and group_size % _LEAF == 0 else 0
    start = 0
    while start < features:
        stop = start + whole if whole else min(start + _BLOCK, (start // group_size + 1) * group_size)
        stop = min(stop, features)
        yield start, stop
        start = stop


def _leaf(
    weight: Tensor, back: Tensor, codes: Tensor, errors: Tensor, groups: Sequence[int],
    scales: Tensor, inverse: Tensor, low: Tensor, high: Tensor,
) -> None:  # fmt: skip
    """Fill in ``codes`` and ``errors`` (features, rows) of a few features."""
    for i, group in enumerate(groups):
        w, code = weight[i], codes[i]
        if i:
            torch.addmv(w, errors[:i].t(), back[i, :i], alpha=-1, out=w)
        torch.mul(w, inverse[group], out=code).round_()
        torch.clamp(code, low[group], high[group], out=code)
        torch.addcmul(w, code, scales[group], value=-1, out=errors[i])
