"""QuantLinear: an ``nn.Linear`` that holds a quantized weight, so that whatever trains or merges on one just works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qhub.kernels.linear import linear
from qhub.tensor import QuantizedTensor

__all__ = ["QuantLinear"]


class QuantLinear(nn.Linear):
    """Computes ``x @ weight.T + bias`` with a quantized weight; with a dense one it is a plain ``nn.Linear``.

    It *is* an ``nn.Linear`` with ``weight`` (out_features, in_features) of a float dtype: adapters, hooks and merges
    treat it as one. The kernel is resolved once per weight, device and dtype, and called straight from ``forward``.
    """

    @classmethod
    def hollow(cls, in_features: int, out_features: int, bias: nn.Parameter | None, dtype: torch.dtype) -> QuantLinear:
        """Return a layer on the meta device whose weight is set later; ``bias`` is taken over as it is."""
        layer = cls(in_features, out_features, bias=False, device="meta", dtype=dtype)
        layer.weight.requires_grad_(False)
        layer.bias = bias  # type: ignore[assignment]
        return layer

    def forward(self, input: Tensor) -> Tensor:
        # Straight from where nn.Module keeps them saves a microsecond; a parametrization moves them elsewhere.
        own = self._parameters
        weight: Any
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        if not isinstance(weight, QuantizedTensor):
            return nn.functional.linear(input, weight, bias)
        return linear(input, weight, bias)

    def extra_repr(self) -> str:
        kind = self.weight.quant_layout.kind if isinstance(self.weight, QuantizedTensor) else "dense"
        return f"{super().extra_repr()}, {kind}"
