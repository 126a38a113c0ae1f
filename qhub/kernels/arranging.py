"""Puts weights into the order that this machine's kernels read, and back: once after loading, not at every product.

A weight is arranged where a kernel of some plugin takes it in tiles (:class:`qhub.layouts.tiled.Tiled`) and gives what
the reference gives. It takes the same memory as before; codes are moved, not copied beside. ``QHUB_ARRANGE=0`` leaves
weights as files have them.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from qhub.kernels.dispatch import REFERENCE, choose, kernels
from qhub.layouts import Layout
from qhub.layouts.tiled import Tiled
from qhub.tensor import QuantizedTensor

__all__ = ["arrange", "arrange_tensor", "wanted"]

logger = logging.getLogger("qhub")


def wanted() -> bool:
    """Return whether weights may be arranged without being asked for; ``QHUB_ARRANGE=0`` says no."""
    return os.environ.get("QHUB_ARRANGE", "").strip().lower() not in ("0", "false", "no", "off")


def arrange(model: nn.Module, forced: bool = False) -> int:
    """Arrange the quantized weights of ``model`` in place, and return how many changed.

    ``forced``: also where no kernel asks for it. Parameters stay the objects they are; a weight that is arranged, or
    cannot be, is left alone.
    """
    quantized = [parameter for parameter in model.parameters() if isinstance(parameter, QuantizedTensor)]
    wide = [one for one in quantized if one.compute_dtype == torch.float32 and one.dtype.itemsize == 2]
    if wide and _offered({wide[0].device.type}):
        logger.warning(
            "qhub: %d of %d quantized weights are multiplied in float32, which their config asks for (its compute "
            "dtype), in a model of %s: kernels for GPUs are for 16 bits, so this is slow. Set the config's compute "
            "dtype to bfloat16 unless float32 is meant",
            len(wide),
            len(quantized),
            str(wide[0].dtype).removeprefix("torch."),
        )
    return sum(arrange_tensor(parameter, forced) for parameter in quantized)


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
