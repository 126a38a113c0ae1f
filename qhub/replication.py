"""What DistributedDataParallel sends of quantized weights when it starts: their codes, from the first process on.

By itself it would flatten, send and write back every parameter as floats. Quantized weights get no gradients, so after
the start there is nothing to synchronise.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from qhub.tensor import QuantizedTensor

__all__: list[str] = []

# Bytes sent at once, as DistributedDataParallel does.
_BUCKET = 250 << 20


def _with_codes(original: Any) -> Any:
    """Return DistributedDataParallel's ``__init__`` that leaves quantized weights to :func:`_send`."""

    @functools.wraps(original)
    def __init__(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        quantized = {name: p for name, p in module.named_parameters() if isinstance(p, QuantizedTensor)}
        if quantized:
            before = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
            module._ddp_params_and_buffers_to_ignore = [*before, *quantized]  # type: ignore[assignment]
        original(self, module, *args, **kwargs)
        if quantized and kwargs.get("init_sync", True):
            _send(self.process_group, list(quantized.values()))

    __init__._qhub = True  # type: ignore[attr-defined]
    return __init__


def _send(group: Any, weights: list[QuantizedTensor]) -> None:
    """Overwrite the parts of ``weights`` by those of the group's first process; each distinct tensor is sent once."""
    parts = {id(part): part.detach() for weight in weights for part in weight.parts.values()}
    with torch.no_grad():
        torch.distributed._broadcast_coalesced(group, list(parts.values()), _BUCKET, 0)


if torch.distributed.is_available():
    _replicas = nn.parallel.DistributedDataParallel
    if not getattr(_replicas.__init__, "_qhub", False):
        _replicas.__init__ = _with_codes(_replicas.__init__)  # type: ignore[method-assign]
