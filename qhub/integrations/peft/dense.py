"""Dense weights in the place of quantized ones, for as long as PEFT's own code works on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qhub.tensor import QuantizedTensor

__all__ = ["dense_weights", "quantized_weights"]


def quantized_weights(module: nn.Module) -> dict[str, QuantizedTensor]:
    """Return the quantized weights that ``module`` itself holds, by their names there."""
    held = getattr(module, "_parameters", {})
    return {name: weight for name, weight in held.items() if isinstance(weight, QuantizedTensor)}


@contextmanager
def dense_weights(module: nn.Module, weights: dict[str, QuantizedTensor]) -> Iterator[dict[str, Tensor]]:
    """Put dense float32 weights in the place of ``weights``; yield where they are found, current until the end.

    Biases beside them are float32 for that time too, so that all arithmetic is; what was written into them is kept.
    """
    held = module._parameters
    biases = {
        name: bias
        for name, bias in held.items()
        if bias is not None and bias.ndim == 1 and bias.is_floating_point() and bias.dtype != torch.float32
    }
    for name, weight in weights.items():
        held[name] = nn.Parameter(weight.dequantize(torch.float32).contiguous(), requires_grad=False)
    for name, bias in biases.items():
        held[name] = nn.Parameter(bias.detach().float(), requires_grad=False)
    try:
        yield held  # type: ignore[misc]
    finally:
        held.update(weights)  # type: ignore[arg-type]
        for name, bias in biases.items():
            written = held[name]
            held[name] = bias
            if written is not None and written is not bias:
                bias.data = written.detach().to(bias.dtype)
