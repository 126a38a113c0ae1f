"""The order of the bytes of an EETQ weight: what the tensor cores of compute capability 7.5 to 8.9 want to load.

Source: EETQ 1.0.1, ``csrc/cutlass_kernels/cutlass_preprocessors.cc`` (``preprocess_weights_for_mixed_gemm``) with the
traits of ``mixed_gemm_B_layout.h``, where they are the same for all of these GPUs. In four steps, from codes (K, N):

1. in each 16 rows of K, row ``_ROWS[i]`` comes to place i;
2. the matrix is stored column by column, that is, as (N, K);
3. two neighbouring columns take turns, 64 values each;
4. 128 is added to each byte, and the second and third of every four change places.

What comes out is called a (K, N) matrix again, although its bytes no longer lie like one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COLUMNS", "ROWS", "deinterleave", "interleave"]

# Step 1. The same permutation the other way round is not the same: it is no involution.
_ROWS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
# How many columns of (K, N) take turns, and for how many values.
_TURNS, _RUN = 2, 64
# K and N must be multiples: K of a run; N of one too, which upstream checks (interleave_column_major_tensor), though
# an even number would do.
ROWS = COLUMNS = _RUN


def interleave(codes: Tensor) -> Tensor:
    """Return the file's bytes (K, N) int8 for ``codes`` (N, K) int8; K is a multiple of 64 and N of 2."""
    n, k = codes.shape
    order = torch.tensor(_ROWS, device=codes.device)
    permuted = codes.reshape(n, k // 16, 16).index_select(-1, order)
    turns = permuted.reshape(n // _TURNS, _TURNS, k // _RUN, _RUN).transpose(1, 2)
    return _swapped(turns.reshape(-1, 4) ^ -128).reshape(k, n)


def deinterleave(stored: Tensor) -> Tensor:
    """Return the codes (N, K) int8 of the file's bytes ``stored`` (K, N) int8; undoes :func:`interleave`."""
    k, n = stored.shape
    turns = _swapped(stored.reshape(-1, 4) ^ -128).reshape(n // _TURNS, k // _RUN, _TURNS, _RUN)
    permuted = turns.transpose(1, 2).reshape(n, k // 16, 16)
    order = torch.tensor(_ROWS, device=stored.device)
    return permuted.index_select(-1, torch.argsort(order)).reshape(n, k)


def _swapped(quads: Tensor) -> Tensor:
    """Return ``quads`` (count, 4) with the middle two exchanged. (Flipping the top bit is adding 128 to a byte.)"""
    return quads.index_select(-1, torch.tensor((0, 2, 1, 3), device=quads.device))
