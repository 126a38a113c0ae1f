"""Lets a kernel start while the one before it ends (programmatic dependent launch, NVIDIA from compute capability 9).

Such a kernel is launched early, says at once that its successor may be too, reads what no kernel before it writes, and
waits for the end of its predecessor before it touches anything else. Every program of it must wait, or a later kernel
could find a predecessor's predecessor unfinished.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qhub_triton.launch import native

__all__ = ["aligned", "early", "launches_on"]


@cache
def early(device: torch.device) -> tuple[dict[str, bool], dict[str, bool]]:
    """Return the constexpr ``EARLY_START``, and the options of the launch."""
    if native(device) and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"EARLY_START": True}, {"launch_pdl": True}
    return {"EARLY_START": False}, {}


def launches_on(device: torch.device) -> int:
    """Return the number of the GPU that a :class:`qhub_triton.launch.Launch` runs on; -1: any other device."""
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index


def aligned(x: Tensor) -> Tensor:
    """Return ``x``, contiguous and at an address that is a multiple of 16: what launches are compiled for."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
