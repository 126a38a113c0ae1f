"""How fused experts of quantized weights run: a plugin's grouped products, or one ``F.linear`` per expert."""

from __future__ import annotations

from functools import cache
from typing import Any

from qhub.kernels import KernelSpec
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["choose_experts"]

_NAME = "qhub"


def choose_experts(model: Any) -> None:
    """Set transformers' implementation of fused experts where ``model`` holds quantized ones; else leave it.

    The grouped products of transformers itself want dense weights. A plugin's own forward, offered for the experts'
    device through ``qhub_experts``, runs the module's loop where it has no kernel; without one that loop is set.
    """
    devices = {p.device.type for p in model.parameters() if isinstance(p, QuantizedTensor) and p.ndim == 3}
    if not devices:
        return
    offered = len(devices) == 1 and _registered(next(iter(devices)))
    model.set_experts_implementation(_NAME if offered else "eager")


@cache
def _registered(device: str) -> bool:
    """Register the first forward that a plugin offers for ``device``; return whether there is one."""
    for _, path in registry.broadcast("qhub_experts", device=device):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        type(ALL_EXPERTS_FUNCTIONS).register(_NAME, KernelSpec.load(path))
        return True
    return False
