"""What the checkpoint formats of this package share: scales checked and brought into shape, nibbles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qhub.errors import LayoutError

__all__ = ["FLOATS", "one_of", "positive_scale", "scalar"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def one_of(entries: Mapping[str, Tensor], names: tuple[str, ...]) -> str | None:
    """Return which of ``names`` is in ``entries``; None if none is. Raises :class:`LayoutError` if two are."""
    found = [name for name in names if name in entries]
    if len(found) > 1:
        raise LayoutError(f"the entries {found} mean the same: a weight has one of them")
    return found[0] if found else None


def positive_scale(name: str, scale: Tensor) -> Tensor:
    """Return ``scale`` as it is; raises :class:`LayoutError` naming the entry unless it is finite and above zero."""
    if scale.device.type == "meta" or not scale.numel():
        return scale
    values = scale.float()
    if not bool(torch.isfinite(values).all()):
        raise LayoutError(f"entry {name!r} holds NaN or infinity: the file is damaged")
    if bool((values <= 0).any()):
        raise LayoutError(
            f"entry {name!r} holds {float(values.min())}: a scale is above zero. The file is damaged, or was written "
            "with blocks that do not divide the weight by a version of transformers that leaves their scales unset"
        )
    return scale


def scalar(name: str, entry: Tensor) -> Tensor:
    """Return a scale () float32 of an entry of one number; raises :class:`LayoutError` naming it."""
    if entry.numel() != 1:
        raise LayoutError(f"entry {name!r} has shape {tuple(entry.shape)}, expected one number")
    return positive_scale(name, entry).float().reshape(())
