"""Kernels that round inputs to 8 bits: rows, groups and whole tensors, columns with outliers kept out."""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.eightbit.steps import code_of, inverse_of, magnitude_bits, magnitude_of, step_of

__all__ = ["mark_outliers", "measure_rows", "round_groups", "round_rows"]


@triton.jit
def _absmax_row(x, row, K, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest |x| of a row as float32, outliers left out."""
    at = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        value = tl.load(x + row * K + start + at, mask=start + at < K, other=0.0)
        bits = magnitude_bits(value)
        if THRESHOLD > 0:
            bits = tl.where(tl.abs(value.to(tl.float32)) >= THRESHOLD, 0, bits)
        most = tl.maximum(most, bits)
    return magnitude_of(tl.max(most, axis=0), x.dtype.element_ty)


@triton.jit
def _clear(counters, counted):
    at = tl.arange(0, 256)
    for start in range(0, counted, 256):
        tl.store(counters + start + at, tl.zeros([256], tl.int32), mask=start + at < counted)


@triton.jit
def _list(flag, at, columns, count):
    """Write those of ``at`` whose ``flag`` is 1 to ``columns`` from entry ``count`` on; return where they end."""
    tl.store(columns + count + tl.cumsum(flag, axis=0) - 1, at, mask=flag != 0)
    return count + tl.sum(flag, axis=0)


@triton.jit
def measure_rows(x, maxima, K, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    """Write the largest |x| of each row to ``maxima`` (M,) float32."""
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    tl.store(maxima + row, _absmax_row(x, row, K, 0.0, BLOCK))


@triton.jit(do_not_specialize=["M", "counted"])
def round_rows(
    x, codes, steps, stored, maxima, flags, columns, outliers, counters, M, K, counted,
    SCALE: tl.constexpr, KIND: tl.constexpr, TOP: tl.constexpr, LARGEST: tl.constexpr, SHIFT: tl.constexpr,
    LIMIT: tl.constexpr, POWERS: tl.constexpr, THRESHOLD: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write codes (M, K) and steps (M,) of ``x`` (M, K); one program per row.

    ``SCALE``: 0 the row's own, 1 the ``stored`` one, 2 that of the largest of ``maxima`` (M,). ``WHOLE``: the row fits
    in one block. ``THRESHOLD``: if above 0, magnitudes from it on do not count, and columns in ``flags`` (K,) get
    code 0. The first program also writes their numbers to ``columns`` (K,) in order and how many there are to
    ``outliers`` (), and ``counted`` zeros to ``counters``, which the product counts with. ``PDL``: the
    next kernel may be launched at once; ``CHAIN``: this one was.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if CHAIN:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.dtype.element_ty
    if row == 0:
        _clear(counters, counted)
    if WHOLE:
        value = tl.load(x + row * K + at, mask=at < K, other=0.0)
    if SCALE == 1:
        step = tl.load(stored).to(tl.float32)
    else:
        if SCALE == 2:
            rows = tl.arange(0, 1024)
            most = tl.zeros([1024], tl.float32)
            for start in range(0, M, 1024):
                found = tl.load(maxima + start + rows, mask=start + rows < M, other=0.0)
                most = tl.maximum(most, found, propagate_nan=tl.PropagateNan.ALL)
            # As bits, so that a NaN wins.
            absmax = tl.max(most.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
        elif WHOLE:
            bits = magnitude_bits(value)
            if THRESHOLD > 0:
                bits = tl.where(tl.abs(value.to(tl.float32)) >= THRESHOLD, 0, bits)
            absmax = magnitude_of(tl.max(bits, axis=0), dtype)
        else:
            absmax = _absmax_row(x, row, K, THRESHOLD, BLOCK)
        step = step_of(absmax, TOP, SHIFT, LIMIT, POWERS)
    tl.store(steps + row, step)
    inverse = inverse_of(step)
    if WHOLE:
        wide = value.to(tl.float32)
        if THRESHOLD > 0:
            flag = tl.load(flags + at, mask=at < K, other=0).to(tl.int32)
            wide = tl.where(flag != 0, 0.0, wide)
            if row == 0:
                tl.store(outliers, _list(flag, at, columns, 0))
        tl.store(codes + row * K + at, code_of(wide, step, inverse, LARGEST, KIND), mask=at < K)
    else:
        count = 0
        for start in range(0, K, BLOCK):
            inside = start + at < K
            piece = tl.load(x + row * K + start + at, mask=inside, other=0.0).to(tl.float32)
            if THRESHOLD > 0:
                flag = tl.load(flags + start + at, mask=inside, other=0).to(tl.int32)
                piece = tl.where(flag != 0, 0.0, piece)
                if row == 0:
                    count = _list(flag, start + at, columns, count)
            tl.store(codes + row * K + start + at, code_of(piece, step, inverse, LARGEST, KIND), mask=inside)
        if THRESHOLD > 0 and row == 0:
            tl.store(outliers, count)


@triton.jit(do_not_specialize=["M", "counted"])
def round_groups(
    x, codes, steps, counters, M, K, counted,
    KIND: tl.constexpr, TOP: tl.constexpr, LARGEST: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr,
    POWERS: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write codes (M, K) and steps (K / GROUP, M) of ``x`` (M, K), ``COUNT`` groups of ``GROUP`` per program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if CHAIN:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    if row + piece == 0:
        _clear(counters, counted)
    group = piece * COUNT + tl.arange(0, COUNT)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + row * K + at, mask=at < K, other=0.0)
    absmax = magnitude_of(tl.max(magnitude_bits(value), axis=1), x.dtype.element_ty)
    step = step_of(absmax, TOP, SHIFT, LIMIT, POWERS)
    tl.store(steps + group.to(tl.int64) * M + row, step, mask=group * GROUP < K)
    code = code_of(value.to(tl.float32), step[:, None], inverse_of(step)[:, None], LARGEST, KIND)
    tl.store(codes + row * K + at, code, mask=at < K)


@triton.jit(do_not_specialize=["M"])
def mark_outliers(
    x, flags, M, K,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write to ``flags`` (K,) which columns of ``x`` (M, K) hold a magnitude from ``THRESHOLD`` on.

    ``SHARED``: several programs look at the rows of a column, and write only ones, over zeros.
    """
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < K
    found = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(tl.program_id(1) * ROWS, M, ROWS * tl.num_programs(1)):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        value = tl.load(x + row[:, None] * K + at[None, :], mask=(row < M)[:, None] & inside[None, :], other=0.0)
        found = tl.maximum(found, tl.where(tl.abs(value.to(tl.float32)) >= THRESHOLD, 1, 0))
    column = tl.max(found, axis=0)
    if SHARED:
        tl.store(flags + at, column.to(tl.int8), mask=inside & (column > 0))
    else:
        tl.store(flags + at, column.to(tl.int8), mask=inside)
