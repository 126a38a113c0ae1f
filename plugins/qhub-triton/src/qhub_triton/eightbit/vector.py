"""The product for one row of input, in one kernel: the row is rounded while the first weights are on their way.

Each program reads the row once for its largest magnitude and once for its codes, and ``BN`` rows of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhub_triton.eightbit.product import weight_scale
from qhub_triton.eightbit.steps import code_of, code_value, inverse_of, magnitude_bits, magnitude_of, step_of

__all__ = ["multiply_row"]


@triton.jit
def multiply_row(
    w, x, out, own, stored, bias, N, K, rows, cols, across,
    UNIT: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr, LARGEST: tl.constexpr,
    SHIFT: tl.constexpr, LIMIT: tl.constexpr, POWERS: tl.constexpr, THRESHOLD: tl.constexpr, GROUP: tl.constexpr,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, EXPONENTS: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, FOLD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Write ``out`` (N,) = rounded ``x`` (K,) times ``w`` (N, K), scaled, plus ``bias`` (N,).

    Scales as in :func:`qhub_triton.eightbit.product.multiply`; ``SCALE``: 1 if the input's is ``stored``. ``BLOCKS``
    needs the ``BN`` rows to lie in one block. ``FOLD``: neighbours along K that are summed at once. ``CHAIN``: launched
    before what makes ``x`` has ended, and what follows may be too.
    """
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w_row = tl.minimum(n, N - 1) - first
    w_at = w + first.to(tl.int64) * K + w_row[:, None] * K + k[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()
        # Nothing may be read before this, weights neither: what ran before may have written them.
        tl.extra.cuda.gdc_wait()
    if EVEN:
        ahead = tl.load(w_at)
    else:
        ahead = tl.load(w_at, mask=(k < K)[None, :], other=0.0)

    step = 1.0
    if GROUP == 0:
        if SCALE == 1:
            step = tl.load(stored).to(tl.float32)
        else:
            most = tl.zeros([BK], tl.int32)
            for start in range(0, K, BK):
                value = tl.load(x + start + k, mask=start + k < K, other=0.0)
                bits = magnitude_bits(value)
                if THRESHOLD > 0:
                    bits = tl.where(tl.abs(value.to(tl.float32)) >= THRESHOLD, 0, bits)
                most = tl.maximum(most, bits)
            step = step_of(magnitude_of(tl.max(most, axis=0), dtype), TOP, SHIFT, LIMIT, POWERS)
        inverse = inverse_of(step)

    acc = tl.zeros([BN, BK // FOLD], tl.float32)
    for start in range(0, K, BK):
        wt = ahead
        later = start + BK
        if EVEN:
            ahead = tl.load(w_at + later, mask=later < K)
            value = tl.load(x + start + k).to(tl.float32)
        else:
            ahead = tl.load(w_at + later, mask=(later + k < K)[None, :], other=0.0)
            value = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        if GROUP > 0:
            grouped = tl.reshape(value, [BK // GROUP, GROUP])
            absmax = tl.max(tl.abs(grouped).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
            steps = step_of(absmax, TOP, SHIFT, LIMIT, POWERS)
            code = code_of(grouped, steps[:, None], inverse_of(steps)[:, None], LARGEST, KIND)
            known = tl.reshape(code_value(code) * steps[:, None], [BK])
        else:
            known = code_value(code_of(value, step, inverse, LARGEST, KIND))
        if THRESHOLD > 0:
            # Codes times the step here: the outliers stand beside them as they are.
            known = tl.where(tl.abs(value) >= THRESHOLD, value, known * step)
        if BLOCKS:
            at = first // rows * across + (start + k) // cols
            known = known * weight_scale(own, tl.minimum(at, first // rows * across + across - 1), EXPONENTS)
        product = code_value(wt) * known[None, :]
        acc += tl.sum(tl.reshape(product, [BN, BK // FOLD, FOLD]), axis=2)
    total = tl.sum(acc, axis=1)
    if GROUP == 0 and THRESHOLD == 0:
        total = total * step
    if not BLOCKS:
        total = total * (weight_scale(own, tl.minimum(n, N - 1) // rows * across, EXPONENTS) * UNIT)
    else:
        total = total * UNIT
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < N)
