"""The best product of two thin matrices for a given one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factors_of"]

# Up to here a full decomposition takes under a second.
_SMALL = 1024
# Power iterations and spare columns of the randomized one: what quantizing loses has a flat spectrum, which needs more
# of both than usual.
_ITERATIONS, _SPARE = 6, 16


def factors_of(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (N, rank) and down (rank, K), both float32, whose product is nearest to ``matrix`` (N, K).

    Each has the square root of the singular values (Eckart and Young 1936; randomized for large matrices: Halko et al.
    2011, algorithm 4.4). With a rank above the matrix' own the rest are zeros.
    """
    matrix = matrix.float()
    least = min(matrix.shape)
    if least <= _SMALL or rank + _SPARE >= least:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.device.type == "cuda" else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + _SPARE, niter=_ITERATIONS)
        vh = v.t()
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    if up.shape[1] < rank:
        missing = rank - up.shape[1]
        up = torch.nn.functional.pad(up, (0, missing))
        down = torch.nn.functional.pad(down, (0, 0, 0, missing))
    return up.contiguous(), down.contiguous()
