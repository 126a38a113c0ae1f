"""Loads a checkpoint from a container: the file is opened before the model exists, and what it holds goes into the
model under the model's own names, as views of the mapped file, so opening one copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.errors import CheckpointError, LayoutError
from qhub.formats import Container, Packed
from qhub.integrations.transformers.routing import missing_names, report
from qhub.integrations.transformers.weights import put_layers
from qhub.plan import LayerPlan, WeightInfo
from qhub.quantizing import Quantization
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["ReadsContainers"]


class ReadsContainers:
    """Is the part of a quantizer that takes a container instead of safetensors files.

    ``container``: None for checkpoints in safetensors.
    """

    method: str
    quantization_config: Any
    quantization: Quantization
    pre_quantized: bool
    plan: dict[str, LayerPlan]
    container: Container | None = None
    _state: dict[str, Tensor]

    def read_header(self, file: str) -> None:
        """Open the file; transformers calls this before the model is made."""
        self.container = registry.call(self.method, "qhub_container", config=self.quantization_config, file=Path(file))
        self.pre_quantized = True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype is None and self.container is not None:
            # 32 bits unless the file says otherwise: on a CPU they are the fastest.
            return self.container.dtype or torch.float32
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        if getattr(self.quantization_config, "gguf_file", None) and isinstance(device_map, dict):
            # What lies on the disk anyway is mapped: its pages are read when they are used, and the system takes them
            # back when memory is short.
            return {name: "cpu" if place == "disk" else place for name, place in device_map.items()}
        return device_map

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Return the memory that a device map may count on: without end on the CPU, where the file is mapped."""
        return max_memory if self.container is None else {**max_memory, "cpu": 1 << 60}

    def take_container(self, model: Any, weights: Mapping[str, WeightInfo]) -> None:
        """Plan ``model`` as the container's file stores it, and make its tensors ready.

        Raises :class:`CheckpointError` when they are not the model's.
        """
        assert self.container is not None
        file = self.container.files[0]
        expected = model.state_dict()
        problems = []
        self._state = {}
        # The model is made on the meta device, and this runs in the middle of that: what is in the file is real.
        with torch.device("cpu"):
            found = self.container.parameters(model, weights)
            for name, value in found.items():
                info = weights.get(name)
                if isinstance(value, Packed):
                    assert info is not None
                    self.plan[name] = LayerPlan(value.layout)
                    value = self._quantized(name, value, info, file)
                if name not in expected:
                    problems.append(f"{name} has no place in the model")
                elif (info is None or info.kind != "conv1d") and value.shape != expected[name].shape:
                    problems.append(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}")
                self._state[name] = value
        problems += [f"{name} is missing" for name in missing_names(model, set(found))]
        if problems:
            raise report(f"{file} does not fit a {type(model).__name__}", problems)
        put_layers(model, (weights[name] for name in self.plan))

    def _quantized(self, name: str, packed: Packed, info: WeightInfo, file: Path) -> Tensor:
        layout, policy = packed.layout, self.quantization.policy(packed.layout)
        try:
            weight = QuantizedTensor.build(layout, packed.parts, info.dtype, policy=policy)
            layout.check_values(weight.parts)
        except LayoutError as error:
            raise CheckpointError(f"{name} in {file}: {error}. No model was loaded") from error
        return weight.transpose(-1, -2) if info.transposed else weight

    def get_state_dict(self, file: str, model: Any) -> dict[str, Tensor]:
        """Return the tensors of the file by parameter; transformers calls this after the model is prepared."""
        return self._state
