"""``activation(gate) * up`` for a gated MLP whose two halves lie side by side."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qhub_triton.decoding.overlapping import aligned, early, launches_on
from qhub_triton.launch import Launch

__all__ = ["gate"]

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _gate(x_ptr, y_ptr, SIZE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, EARLY_START: tl.constexpr):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY_START:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    g = tl.load(x_ptr + row * 2 * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + row * 2 * SIZE + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        a = g / (1.0 + tl.exp(-g))
    elif KIND == 1:
        a = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        # tanh(z), written so that nothing overflows
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        e = tl.exp(-2.0 * tl.abs(z))
        a = 0.5 * g * (1.0 + tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e))
    tl.store(y_ptr + row * SIZE + at, (a.to(dtype).to(tl.float32) * u).to(dtype), mask=inside)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """Return ``activation(g) * u`` of [g, u]; see :func:`qhub.decoding.operations.gate`."""
    gate_up = aligned(gate_up)
    size = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], size)
    rows = y.numel() // size if size else 0
    if rows:
        device = gate_up.device
        launch = _launch(device, size, activation, gate_up.dtype)
        launch((triton.cdiv(size, launch.constants["BLOCK"]), rows, 1), launches_on(device), gate_up, y)
    return y


@cache
def _launch(device: torch.device, size: int, activation: str, dtype: torch.dtype) -> Launch:
    constants = {"SIZE": size, "KIND": _KINDS[activation], "BLOCK": 1024 if size >= 4096 else 256}
    start, options = early(device)
    return Launch(_gate, {**constants, **start}, {"num_warps": 4, **options})
