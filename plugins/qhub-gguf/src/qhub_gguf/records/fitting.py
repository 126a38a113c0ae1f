"""Finds steps and offsets for runs of weights: several guesses, each improved by least squares, the best one kept.

Tensors here have the members of a run on their FIRST axis, (members, runs ...), so that sums over a run are vectorised.
The idea is that of ``make_qx_quants`` and ``make_qkx3_quants`` of ggml-quants.c: whatever the step, the codes are the
nearest ones; whatever the codes, the best step follows; so what has to be searched is the first step alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["affine_fit", "affine_search", "columns_of", "uniform_fit", "uniform_search"]

# How far from spanning a run exactly its first guesses begin: a step too large or too small by so much.
_GUESSES = 10
# How often least squares and nearest codes take turns in the end.
_SWEEPS = 3
_TINY = 1e-30
_FLAT = 1e-6


def columns_of(weights: Tensor, importance: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """Return runs (group, count/group, records) and what their errors count, for ``weights`` (..., count)."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, weights.shape[-1] // group, group).permute(2, 1, 0).contiguous()

    x = turned(weights.float())
    return x, torch.ones_like(x) if importance is None else turned(importance.expand(weights.shape))


def uniform_fit(
    weights: Tensor, importance: Tensor | None, rounded: Callable[[Tensor], Tensor], low: int, high: int
) -> Tensor:
    """Return one step for each run ``weights`` (..., members): (...)."""
    x, w = columns_of(weights, importance, weights.shape[-1])
    return uniform_search(x, w, rounded, low, high).reshape(weights.shape[:-1])


def affine_fit(weights: Tensor, importance: Tensor | None, high: int) -> tuple[Tensor, Tensor]:
    """Return step and offset for each run ``weights`` (..., members) of codes 0 to ``high``: (...) each."""
    x, w = columns_of(weights, importance, weights.shape[-1])
    step, offset = affine_search(x, w, high, below=False)
    return step.reshape(weights.shape[:-1]), offset.reshape(weights.shape[:-1])


def guesses(end: int) -> list[float]:
    """Return to which values the largest magnitude of a run may go at first, where ``end`` is the last there is."""
    if end == 0:
        return []
    reach = min(0.18 * abs(end), 1.5)
    return [end + reach * (2 * i / _GUESSES - 1) for i in range(_GUESSES + 1)]


def uniform_search(x: Tensor, w: Tensor, rounded: Callable[[Tensor], Tensor], low: int, high: int) -> Tensor:
    """Return the steps (runs ...) under which values nearest to ``x / step`` have the least weighted squared error.

    ``rounded``: gives the allowed values nearest to its argument, from ``low`` to ``high``. Signs are free.
    """
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    inverse = torch.where(extreme == 0, 0.0, 1 / torch.where(extreme == 0, 1.0, extreme))
    wx = w * x
    best_step, best = torch.zeros_like(extreme), torch.zeros_like(extreme)

    def consider(factor: Tensor) -> None:
        # With v given, the step a / b takes a^2 / b off the error.
        nonlocal best_step, best
        v = rounded(x * factor).float()
        a, b = (wx * v).sum(0), (w * v).mul_(v).sum(0).clamp_min_(_TINY)
        gain = a * a / b
        better = gain > best
        best_step, best = torch.where(better, a / b, best_step), torch.where(better, gain, best)

    for target in (*guesses(low), *guesses(high)):
        consider(target * inverse)
    for _ in range(_SWEEPS):
        consider(torch.where(best_step == 0, 0.0, 1 / torch.where(best_step == 0, 1.0, best_step)))
    return best_step


def affine_search(x: Tensor, w: Tensor, high: int, below: bool) -> tuple[Tensor, Tensor]:
    """Return steps and offsets (runs ...) for codes 0 to ``high``; ``below``: offsets are at most 0."""
    bottom, top = x.amin(0), x.amax(0)
    if below:
        bottom = bottom.clamp_max(0)
    span = top - bottom
    inverse = torch.where(span > 0, 1 / torch.where(span > 0, span, 1.0), 0.0)
    wx = w * x
    sw, sx, sxx = w.sum(0), wx.sum(0), (wx * x).sum(0)
    # What a run of equal weights gets: no step.
    best_step, best_offset = torch.zeros_like(span), sx / sw.clamp_min(_TINY)
    if below:
        best_offset = best_offset.clamp_max(0)
    best = sxx - 2 * best_offset * sx + best_offset.square() * sw

    def consider(factor: Tensor, start: Tensor) -> None:
        nonlocal best_step, best_offset, best
        v = (x - start).mul_(factor).round_().clamp_(0, high)
        wv = w * v
        sv, sxv, svv = wv.sum(0), (wx * v).sum(0), wv.mul_(v).sum(0)
        det = sw * svv - sv * sv
        # One code for all weights says nothing of a step and an offset at once.
        flat = det <= _FLAT * sw * svv
        det = torch.where(flat, 1.0, det)
        step, offset = (sw * sxv - sx * sv) / det, (svv * sx - sv * sxv) / det
        alone = flat | (offset > 0) if below else flat
        step = torch.where(alone, sxv / svv.clamp_min(_TINY), step)
        offset = torch.where(alone, 0.0, offset)
        error = sxx - 2 * (step * sxv + offset * sx - step * offset * sv) + step.square() * svv + offset.square() * sw
        better = (error < best) & (step > 0)
        best_step, best_offset = torch.where(better, step, best_step), torch.where(better, offset, best_offset)
        best = torch.where(better, error, best)

    for target in guesses(high):
        consider(target * inverse, bottom)
    for _ in range(_SWEEPS):
        consider(torch.where(best_step > 0, 1 / torch.where(best_step > 0, best_step, 1.0), 0.0), best_offset)
    return best_step, best_offset
