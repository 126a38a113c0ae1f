"""Loads a checkpoint from a container: the file is opened before the model exists, and its tensors go through the same
router as those of any other checkpoint, as views of the mapped file, so opening one copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhub.formats import Container
from qhub.integrations.transformers.checkpoint import FileTensor
from qhub.plan import WeightInfo
from qhub.registry import registry

__all__ = ["ReadsContainers"]


class ReadsContainers:
    """Is the part of a quantizer that takes a container instead of safetensors files.

    ``container``: None for checkpoints in safetensors.
    """

    method: str
    quantization_config: Any
    pre_quantized: bool
    container: Container | None = None
    _entries: dict[str, Tensor]

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

    def container_headers(self, model: Any, weights: Mapping[str, WeightInfo]) -> dict[str, FileTensor]:
        """Return the headers of all tensors, which :meth:`get_state_dict` then hands out."""
        assert self.container is not None
        self._entries = self.container.tensors(model, weights)
        file = self.container.files[0]
        return {key: FileTensor(key, file, tuple(t.shape), t.dtype) for key, t in self._entries.items()}

    def get_state_dict(self, file: str, model: Any) -> dict[str, Tensor]:
        """Return the tensors of the file by checkpoint key; transformers calls this after the model is prepared."""
        return self._entries
