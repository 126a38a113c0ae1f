"""Lets a kernel start while the one before it ends (programmatic dependent launch, NVIDIA from compute capability 9).

Such a kernel is launched early, says at once that its successor may be too, reads what no kernel before it writes, and
waits for the end of its predecessor before it touches anything else. Every program of it must wait, or a later kernel
could find a predecessor's predecessor unfinished.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from qhub_triton.launch import native

__all__ = ["early"]


@cache
def early(device: torch.device) -> dict[str, Any]:
    """Return the launch arguments: the constexpr ``EARLY_START``, and the option where it is on."""
    if native(device) and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"EARLY_START": True, "launch_pdl": True}
    return {"EARLY_START": False}
