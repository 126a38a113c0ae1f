"""Group indices to and from permutations: how act-order is stored and how it runs.

A file holds ``g_idx``: the group of each input feature. A layout wants the members of a group side by side: the
permutation ``perm`` that takes feature ``perm[j]`` to place j, group ``j // group_size``. Within a group the features
keep their order, so either follows from the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.errors import LayoutError

__all__ = ["group_index", "permutation"]


def permutation(g_idx: Tensor, group_size: int) -> Tensor | None:
    """Return the permutation (K,) int32 for ``g_idx`` (K,) int32; None when the features lie in order already.

    Raises :class:`LayoutError` for an index outside the groups, and for groups that do not have ``group_size`` members
    (the last one what is left).
    """
    count = g_idx.shape[0]
    groups = -(-count // group_size)
    plain = group_index(None, count, group_size, g_idx.device)
    if torch.equal(g_idx, plain):
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise LayoutError(
            f"entry 'g_idx' holds {low if low < 0 else high}, the {count} input features have the groups 0 to "
            f"{groups - 1}: the file is damaged, or group_size={group_size} is not the file's"
        )
    if not torch.equal(g_idx.sort().values, plain):
        sizes = torch.bincount(g_idx.to(torch.int64), minlength=groups)
        wanted = torch.bincount(plain.to(torch.int64), minlength=groups)
        first = int((sizes != wanted).nonzero()[0])
        raise LayoutError(
            f"entry 'g_idx' gives group {first} {int(sizes[first])} of the {count} input features, group_size "
            f"{group_size} gives it {int(wanted[first])}: groups of unequal size cannot be held"
        )
    return torch.argsort(g_idx, stable=True).to(torch.int32)


def group_index(perm: Tensor | None, count: int, group_size: int, device: torch.device) -> Tensor:
    """Return ``g_idx`` (count,) int32 for ``perm`` (count,) int32; None stands for features in order."""
    plain = torch.arange(count, dtype=torch.int32, device=device) // group_size
    return plain if perm is None else torch.empty_like(plain).scatter_(0, perm.to(torch.int64), plain)
