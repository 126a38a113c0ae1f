"""Compares a kernel with the reference on a layer's own weight: what differs is never used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qhub.kernels import reference
from qhub.layouts import Layout, Parts

__all__ = ["TOLERANCE", "decoded_wrongly", "disagreement"]

# Rows of a tall matrix that are compared with the reference in one piece.
_BAND = 1024

# Relative Frobenius error up to which a kernel counts as equal to the reference. Both round their output once to the
# input's dtype (half an ulp each: 2^-9 for bf16, 2^-12 for fp16) and may round the weight to it too; 2^-6 and 2^-9
# leave a factor of four. An int8 activation rounds x to 1/254 of its absmax in both, so that rounding cancels.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6, torch.float64: 1e-6}
# Of a decoded weight, besides one rounding to its dtype: formulas in float32 may add in another order, and where a
# large zero is taken off a large code the error is that of the terms.
_TERMS = 2.0**-20

BoundFunction = Callable[[Tensor, "Tensor | None"], Tensor]


def disagreement(
    run: BoundFunction, layout: Layout, parts: Parts, dtype: torch.dtype, rows: Sequence[int]
) -> str | None:
    """Return how ``run(x, bias)`` differs from the reference on random input of each number of ``rows`` and this
    layer's own weight; None when it does not."""
    device = next(iter(parts.values())).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(rows), layout.in_features, generator=generator).to(device, dtype)
    bias = torch.randn(layout.out_features, generator=generator).to(device, dtype)
    bands = _bands(layout, parts)
    with torch.no_grad():
        for m in rows:
            # Anew for each: which columns of an int8 input stay unrounded depends on all of its rows.
            found = run(x[:m].contiguous(), bias)
            if found.shape != (m, layout.out_features) or found.dtype != dtype:
                return f"returned {tuple(found.shape)} {found.dtype}, expected {(m, layout.out_features)} {dtype}"
            wanted = [reference.linear(x[:m], cut, own, bias[where]) for where, cut, own in bands]
            expected = torch.cat(wanted, dim=-1).double()
            seen = torch.cat([found[:, where] for where, _, _ in bands], dim=-1).double()
            error = float((seen - expected).norm() / expected.norm().clamp_min(1e-30))
            if not error <= TOLERANCE.get(dtype, 1e-4):
                _warn(f"relative error {error:.2e} against the reference")
                return f"differs from the reference: relative error {error:.2e}" + (f" at M={m}" if m > 3 else "")
    return None


def decoded_wrongly(
    decode: Callable[[Layout, Parts, torch.dtype], Tensor], layout: Layout, parts: Parts, dtype: torch.dtype
) -> str | None:
    """Return how a dense weight differs from :meth:`Layout.dequantize`'s by more than one rounding; None: nowhere."""
    with torch.no_grad():
        found = decode(layout, parts, dtype)
        shape = (layout.out_features, layout.in_features)
        if found.shape != shape or found.dtype != dtype:
            return f"returned {tuple(found.shape)} {found.dtype}, expected {shape} {dtype}"
        for where, cut, own in _bands(layout, parts):
            wanted = cut.dequantize(own, dtype).float()
            size = wanted.abs()
            bound = torch.finfo(dtype).eps * size + _TERMS * size.max()
            # NaN on both sides is agreement: a stored NaN stays one.
            off = ((found[where].float() - wanted).abs() > bound) | (found[where].isnan() != wanted.isnan())
            if bool(off.any()):
                worst = float((found[where].float() - wanted).abs().max() / size.max().clamp_min(1e-30))
                _warn(f"{int(off.sum())} weights decoded wrongly, by up to {worst:.2e} of the largest")
                return f"differs from the reference: {int(off.sum())} weights, by up to {worst:.2e} of the largest"
    return None


def _warn(found: str) -> None:
    warnings.warn(f"a kernel gave a wrong result ({found}) and is not used", RuntimeWarning, stacklevel=5)


def _bands(layout: Layout, parts: Parts) -> list[tuple[slice, Layout, Parts]]:
    """Return the rows to compare, each with layout and parts of theirs: all, or the first, the middle and the last of a
    matrix so tall that the reference would take seconds and hold all of it dense (an output head)."""
    n = layout.out_features
    whole: list[tuple[slice, Layout, Parts]] = [(slice(0, n), layout, parts)]
    if n <= 4 * _BAND:
        return whole
    middle = n // 2 // _BAND * _BAND
    bands: list[tuple[slice, Layout, Parts]] = []
    for start, stop in ((0, _BAND), (middle, middle + _BAND), (n - n % _BAND - _BAND, n)):
        cut = layout.select_rows(parts, start, stop)
        if cut is None:
            return whole
        bands.append((slice(start, stop), *cut))
    return bands
