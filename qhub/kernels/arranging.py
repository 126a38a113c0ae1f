"""Puts weights into the order that this machine's kernels read, and back: once after loading, not at every product.

A weight is arranged where a kernel of some plugin takes it in tiles (:class:`qhub.layouts.tiled.Tiled`) and gives what
the reference gives. It takes the same memory as before; codes are moved, not copied beside. ``QHUB_ARRANGE=0`` leaves
weights as files have them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from qhub.kernels.dispatch import REFERENCE, choose, kernels
from qhub.layouts import Layout
from qhub.layouts.tiled import Tiled
from qhub.tensor import QuantizedTensor

__all__ = ["arrange", "arrange_tensor", "wanted"]


def wanted() -> bool:
    """Return whether weights may be arranged without being asked for; ``QHUB_ARRANGE=0`` says no."""
    return os.environ.get("QHUB_ARRANGE", "").strip().lower() not in ("0", "false", "no", "off")


def arrange(model: nn.Module, forced: bool = False) -> int:
    """Arrange the quantized weights of ``model`` in place, and return how many changed.

    ``forced``: also where no kernel asks for it. Parameters stay the objects they are; a weight that is arranged, or
    cannot be, is left alone.
    """
    return sum(
        arrange_tensor(parameter, forced) for parameter in model.parameters() if isinstance(parameter, QuantizedTensor)
    )


def arrange_tensor(weight: QuantizedTensor, forced: bool = False) -> bool:
    """Arrange one weight in place; return whether it changed. ``forced``: see :func:`arrange`."""
    layout = weight.quant_layout
    if isinstance(layout, Tiled) or weight.device.type == "meta" or Tiled.refusal(layout) is not None:
        return False
    if not forced and not _offered({weight.device.type}):
        return False
    with torch.no_grad():
        tiled, parts = Tiled.arrange(layout, weight.parts)
        if not forced and not _chosen(weight, tiled, parts):
            return False
        weight._set(tiled, parts, weight.compute_dtype, weight.policy, weight.transposed)
    return True


def _offered(devices: set[str]) -> bool:
    """Return whether any kernel for tiles runs on one of the types of ``devices``."""
    return any(
        spec.layout == Tiled.kind and (not spec.devices or spec.devices & devices) for spec in kernels().values()
    )


def _chosen(weight: QuantizedTensor, tiled: Layout, parts: dict[str, Any]) -> bool:
    """Return whether a kernel multiplies few rows with ``weight`` in tiles; it has then matched the reference."""
    specs = tiled.part_specs()
    lead = len(tiled.batch_shape(parts))
    one = {name: part[(0,) * lead] if specs[name].batched else part for name, part in parts.items()}
    dtype = weight.compute_dtype or weight.dtype
    return choose(tiled, one, dtype).name(1) != REFERENCE
