"""Steps feature after feature in Triton: what the ``_leaf`` of :mod:`qhub_gptq.solver` and that of
:mod:`qhub_gptq.refine` do, but for the order of their sums.

A program keeps some 32 features of 64 rows in registers; no row needs another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

__all__ = ["build", "descent", "leaf"]

_ROWS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _leaf(  # type: ignore[no-untyped-def]
    weight, back, codes, errors, groups, scales, inverse, low, high,
    count, rows, stride,
    FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, FEATURES)
    inside = row < rows
    here = (feature[:, None] < count) & inside[None, :]
    held = tl.load(weight + feature[:, None] * rows + row[None, :], here, other=0.0)
    for i in range(count):
        place = tl.load(groups + i) * rows + row
        w = tl.sum(tl.where(feature[:, None] == i, held, 0.0), 0)
        code = libdevice.rint(w * tl.load(inverse + place, inside, other=0.0))
        code = tl.maximum(code, tl.load(low + place, inside, other=0.0))
        code = tl.minimum(code, tl.load(high + place, inside, other=0.0))
        error = w - code * tl.load(scales + place, inside, other=0.0)
        tl.store(codes + i * rows + row, code, inside)
        tl.store(errors + i * rows + row, error, inside)
        share = tl.load(back + feature * stride + i, (feature < count) & (feature > i), other=0.0)
        held -= share[:, None] * error[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _descent(  # type: ignore[no-untyped-def]
    gradient, hessian, codes, moved, scale, inverse, low, high,
    count, rows, stride,
    FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, FEATURES)
    inside = row < rows
    here = (feature[:, None] < count) & inside[None, :]
    held = tl.load(gradient + feature[:, None] * rows + row[None, :], here, other=0.0)
    step, per_step = tl.load(scale + row, inside, other=0.0), tl.load(inverse + row, inside, other=0.0)
    least, largest = tl.load(low + row, inside, other=0.0), tl.load(high + row, inside, other=0.0)
    for i in range(count):
        slope = tl.sum(tl.where(feature[:, None] == i, held, 0.0), 0)
        before = tl.load(codes + i * rows + row, inside, other=0.0)
        code = libdevice.rint(before + slope * per_step / tl.load(hessian + i * stride + i))
        code = tl.minimum(tl.maximum(code, least), largest)
        change = (code - before) * step
        tl.store(codes + i * rows + row, code, inside)
        tl.store(moved + i * rows + row, change, inside)
        share = tl.load(hessian + feature * stride + i, (feature < count) & (feature > i), other=0.0)
        held -= share[:, None] * change[None, :]


def leaf(
    weight: Tensor, back: Tensor, codes: Tensor, errors: Tensor, groups: Tensor,
    scales: Tensor, inverse: Tensor, low: Tensor, high: Tensor,
) -> None:  # fmt: skip
    """Fill in ``codes`` and ``errors`` (features, rows) of a few features of ``weight``, which stays as it is.

    All float32 with rows side by side in memory; ``back`` (features, features) of any row stride; ``groups``
    (features,) int32: which row of ``scales`` and so on (groups, rows) is each feature's.
    """
    count, rows = weight.shape
    # Triton launches on the current device.
    with torch.cuda.device(weight.device):
        _leaf[(triton.cdiv(rows, _ROWS),)](
            weight, back, codes, errors, groups, scales, inverse, low, high,
            count, rows, back.stride(0), FEATURES=triton.next_power_of_2(count), ROWS=_ROWS,
        )  # fmt: skip


def descent(
    gradient: Tensor, hessian: Tensor, codes: Tensor, moved: Tensor,
    scale: Tensor, inverse: Tensor, low: Tensor, high: Tensor,
) -> None:  # fmt: skip
    """Improve the ``codes`` (features, rows) of a few features in place; ``moved``: the change of their weights.

    All float32 with rows side by side in memory; ``gradient`` (features, rows) stays as it is; ``hessian`` (features,
    features) of any row stride; ``scale``, its ``inverse``, ``low`` and ``high`` (rows,).
    """
    count, rows = codes.shape
    with torch.cuda.device(codes.device):
        _descent[(triton.cdiv(rows, _ROWS),)](
            gradient, hessian, codes, moved, scale, inverse, low, high,
            count, rows, hessian.stride(0), FEATURES=triton.next_power_of_2(count), ROWS=_ROWS,
        )  # fmt: skip


def build(device: torch.device) -> None:
    """Run both kernels on next to nothing; raise what the compiler raises."""
    a, b, c, d = (torch.ones(2, 4, device=device) for _ in range(4))
    square, groups = torch.eye(2, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    leaf(a, square, b, c, groups, d, d, d, d)
    descent(a, square, b, c, d[0], d[0], d[0], d[0])
    torch.cuda.synchronize(device)
