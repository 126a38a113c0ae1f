"""Group indices to and from permutations: how ``actorder="group"`` is stored and how it runs.

A file holds ``weight_g_idx``: the group of each input feature (-1 everywhere: they lie in order). A layout wants the
members of a group side by side: the permutation ``perm`` that takes feature ``perm[j]`` to place j, group
``j // group_size``. Within a group the features keep their order, so either follows from the other.
Source: compressed-tensors up to 0.19, ``_process_quantization`` (compressed_tensors/quantization/lifecycle/forward.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhub.errors import LayoutError

__all__ = ["group_index", "permutation"]


def permutation(g_idx: Tensor, group_size: int) -> Tensor | None:
    """Return the permutation (K,) int32 for ``g_idx`` (K,) int32; None when the features lie in order already.

    Raises :class:`LayoutError` for groups that do not have ``group_size`` members.
    """
    plain = group_index(None, g_idx.shape[0], group_size, g_idx.device)
    if torch.equal(g_idx, plain) or bool((g_idx == -1).all()):
        return None
    if not torch.equal(g_idx.sort().values, plain):
        raise LayoutError(
            f"entry 'weight_g_idx' does not give each of the {int(plain[-1]) + 1} groups {group_size} of the "
            f"{g_idx.shape[0]} input features: the file is damaged, or group_size={group_size} is not the file's"
        )
    return torch.argsort(g_idx, stable=True).to(torch.int32)


def group_index(perm: Tensor | None, count: int, group_size: int, device: torch.device) -> Tensor:
    """Return ``weight_g_idx`` (count,) int32 for ``perm`` (count,) int32; None stands for features in order."""
    plain = torch.arange(count, dtype=torch.int32, device=device) // group_size
    return plain if perm is None else torch.empty_like(plain).scatter_(0, perm.to(torch.int64), plain)
