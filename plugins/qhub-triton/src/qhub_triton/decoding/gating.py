"""``activation(gate) * up`` for a gated MLP whose two halves lie side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.decoding.overlapping import early

__all__ = ["gate"]

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _gate(x_ptr, y_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr, EARLY_START: tl.constexpr):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY_START:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    g = tl.load(x_ptr + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        a = g / (1.0 + tl.exp(-g))
    elif KIND == 1:
        a = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        # tanh(z), written so that nothing overflows
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        e = tl.exp(-2.0 * tl.abs(z))
        a = 0.5 * g * (1.0 + tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e))
    tl.store(y_ptr + row * size + at, (a.to(dtype).to(tl.float32) * u).to(dtype), mask=inside)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """Return ``activation(g) * u`` of [g, u]; see :func:`qhub.decoding.operations.gate`."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], size)
    rows = y.numel() // size if size else 0
    if rows:
        block = 1024 if size >= 4096 else 256
        _gate[(triton.cdiv(size, block), rows)](
            gate_up, y, size, KIND=_KINDS[activation], BLOCK=block, num_warps=4, **early(gate_up.device)
        )
    return y


