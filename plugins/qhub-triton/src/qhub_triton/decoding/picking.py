"""The likeliest token of each row, and the bookkeeping of a greedy step: two kernels, the host not asked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.decoding.overlapping import early

__all__ = ["pick"]

# Into how many pieces a row of logits is cut.
_PIECES = 64


@triton.jit
def _best_of_pieces(
    logits_ptr,
    best_ptr,
    index_ptr,
    stride,
    size,
    piece,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY_START:
        tl.extra.cuda.gdc_wait()
    which = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    at = which * piece + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < piece) & (at < size)
    x = tl.load(logits_ptr + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    best = tl.max(x, 0)
    # Of equal ones the first, as torch.argmax does on a GPU.
    index = tl.min(tl.where(inside & (x == best), at, 2147483647), 0)
    tl.store(best_ptr + row * PIECES + which, best)
    tl.store(index_ptr + row * PIECES + which, index)


@triton.jit
def _pick(
    best_ptr,
    index_ptr,
    tokens_ptr,
    unfinished_ptr,
    ends_ptr,
    pad_ptr,
    text_ptr,
    position_ptr,
    finished_ptr,
    rows,
    ends,
    text_stride,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    ENDS: tl.constexpr,
    EARLY_START: tl.constexpr,
):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY_START:
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    real = row < rows
    at = row[:, None] * PIECES + tl.arange(0, PIECES)[None, :]
    best = tl.load(best_ptr + at, mask=real[:, None], other=float("-inf"))
    index = tl.load(index_ptr + at, mask=real[:, None], other=0)
    top = tl.max(best, 1)
    chosen = tl.min(tl.where(best == top[:, None], index, 2147483647), 1)
    # Nothing equals a NaN: any token does.
    chosen = tl.where(chosen == 2147483647, 0, chosen).to(tl.int64)
    unfinished = tl.load(unfinished_ptr + row, mask=real, other=0)
    chosen = tl.where(unfinished != 0, chosen, tl.load(pad_ptr))
    place = tl.load(position_ptr) + 1
    tl.store(tokens_ptr + row, chosen, mask=real)
    tl.store(text_ptr + row.to(tl.int64) * text_stride + place, chosen, mask=real)
    e = tl.arange(0, ENDS)
    end = tl.load(ends_ptr + e, mask=e < ends, other=-1)
    hit = tl.max((chosen[:, None] == end[None, :]).to(tl.int32), 1)
    unfinished = tl.where(hit != 0, 0, unfinished)
    tl.store(unfinished_ptr + row, unfinished, mask=real)
    before = tl.load(finished_ptr)
    left = tl.max((unfinished != 0).to(tl.int32), 0)
    tl.store(finished_ptr, tl.where((left == 0) & (before < 0), place, before))


def pick(
    logits: Tensor,
    tokens: Tensor,
    unfinished: Tensor,
    ends: Tensor,
    pad: Tensor,
    text: Tensor,
    position: Tensor,
    finished: Tensor,
) -> None:
    """Choose each row's likeliest token in place; see :func:`qhub.decoding.operations.pick`."""
    rows, size = logits.shape
    if rows > 128 or size > _PIECES * 8192:
        from qhub.decoding.operations import REFERENCE

        return REFERENCE.pick(logits, tokens, unfinished, ends, pad, text, position, finished)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    start, options = early(logits.device)
    best = torch.empty(rows, _PIECES, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, _PIECES, dtype=torch.int32, device=logits.device)
    piece = triton.cdiv(size, _PIECES)
    _best_of_pieces[(_PIECES, rows)](
        logits,
        best,
        index,
        logits.stride(0),
        size,
        piece,
        PIECES=_PIECES,
        BLOCK=triton.next_power_of_2(piece),
        num_warps=8,
        **start,
        **options,
    )
    _pick[(1,)](
        best,
        index,
        tokens,
        unfinished,
        ends,
        pad,
        text,
        position,
        finished,
        rows,
        ends.shape[0],
        text.stride(0),
        PIECES=_PIECES,
        ROWS=triton.next_power_of_2(rows),
        ENDS=max(2, triton.next_power_of_2(ends.shape[0])),
        num_warps=4,
        **start,
        **options,
    )
    return None
