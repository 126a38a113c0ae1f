"""Turns dense weights into quantized ones with one method: asks the plugin for the numbers, builds the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qhub.errors import CheckpointError, UnsupportedError
from qhub.layouts import Layout
from qhub.layouts.chunks import all_finite
from qhub.merging import AdapterPolicy
from qhub.plan import LayerPlan, WeightInfo
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["Quantization"]


class Quantization:
    """Quantizes weights with the plugin ``method`` as ``config`` says."""

    def __init__(self, method: str, config: Any) -> None:
        self.method = method
        self.config = config
        self._policies: dict[Layout, AdapterPolicy] = {}

    def parts(
        self,
        weight: Tensor,
        layout: Layout,
        statistics: Mapping[str, Tensor],
        parameter: str = "",
        expert: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the plugin's parts for one matrix ``weight`` (N, K); ``parameter``, ``expert``: which it is, if it is
        one."""
        return dict(
            registry.call(
                self.method,
                "qhub_quantize",
                config=self.config,
                weight=weight.contiguous(),
                layout=layout,
                statistics=statistics,
                parameter=parameter,
                expert=expert,
            )
        )

    def matrix(self, weight: Tensor, planned: LayerPlan, parameter: str, expert: int | None) -> QuantizedTensor:
        """Return one matrix quantized without statistics."""
        parts = self.parts(weight, planned.layout, {}, parameter, expert)
        return self.build(planned.layout, parts, weight.dtype, planned.compute_dtype)

    def build(
        self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None
    ) -> QuantizedTensor:
        """Return the tensor of ``parts``, of dense ``dtype``; raises :class:`LayoutError` when they do not fit."""
        policy = self.policy(layout)
        return QuantizedTensor.build(layout, parts, dtype, compute_dtype=compute_dtype, policy=policy)

    def policy(self, layout: Layout) -> AdapterPolicy:
        """Return how updates are written into weights of ``layout``."""
        if layout not in self._policies:
            answer = registry.call(self.method, "qhub_adapter", config=self.config, layout=layout)
            self._policies[layout] = answer or AdapterPolicy()
        return self._policies[layout]

    def parameter(self, info: WeightInfo, planned: LayerPlan, weight: Tensor) -> QuantizedTensor:
        """Return the parameter ``info`` quantized without statistics; ``weight``: its dense values as the model has
        them.

        Raises :class:`CheckpointError` when they are not finite.
        """
        if not all_finite(weight):
            raise CheckpointError(
                f"{info.name} holds NaN or infinity and cannot be quantized: the checkpoint is damaged"
            )
        if info.kind == "conv1d" or info.transposed:
            weight = weight.transpose(-1, -2)
        matrices = [weight] if info.experts is None else weight
        return self.assemble(info, lambda expert: self.matrix(matrices[expert or 0], planned, info.name, expert))

    def assemble(self, info: WeightInfo, matrix: Callable[[int | None], QuantizedTensor]) -> QuantizedTensor:
        """Return the parameter ``info`` from its matrices (N, K): ``matrix(expert)``, or ``matrix(None)`` if it is
        one."""
        if info.experts is None:
            result = matrix(None)
        else:
            result = torch.stack([matrix(expert) for expert in range(info.experts)])  # type: ignore[assignment]
        if not isinstance(result, QuantizedTensor):
            raise UnsupportedError(
                f"{info.name}: the matrices that {self.method} made of its experts cannot be kept in one tensor"
            )
        return result.transpose(-1, -2) if info.transposed else result  # type: ignore[return-value]
