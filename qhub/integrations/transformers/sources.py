"""A quantized checkpoint, opened to be read one matrix at a time: what it holds, without a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import core_model_loading as host

from qhub.errors import ConfigError, UnsupportedError
from qhub.integrations.transformers import install
from qhub.integrations.transformers.checkpoint import FileTensor
from qhub.integrations.transformers.containers import file_named_by
from qhub.integrations.transformers.folders import local_folder, model_class, weight_files
from qhub.integrations.transformers.routing import Router, build_weight
from qhub.integrations.transformers.saving import matrices_of
from qhub.layouts import Layout
from qhub.plan import WeightInfo
from qhub.registry import registry
from qhub.tensor import QuantizedTensor

__all__ = ["Matrix", "Source"]


@dataclass(frozen=True)
class Matrix:
    """Is one quantized matrix of a checkpoint, under the ``prefix`` of its entries; ``parameter``: of the model."""

    prefix: str
    parameter: str
    layout: Layout
    parts: dict[str, Tensor]


class Source:
    """Is an open quantized checkpoint: ``model`` on the meta device, its ``quantizer``, and matrices to be read.

    ``place``: a folder, a repository, or a container file. Raises :class:`ConfigError` for a model that is not
    quantized, :class:`UnsupportedError` for one that a plugin does not serve.
    """

    def __init__(self, place: str) -> None:
        install()
        self.place = place
        file = Path(place) if Path(place).is_file() else None
        self.folder = file.parent if file is not None else local_folder(place, weights=True)
        self.container = file.name if file is not None else None
        loading = {"gguf_file": self.container} if self.container else {}
        config = transformers.AutoConfig.from_pretrained(self.folder, **loading)
        if self.container is None:
            self.container = file_named_by(getattr(config, "quantization_config", None))
            if self.container is not None:
                del config.quantization_config
        self.quantizer = self._quantizer(config)
        if self.container is not None:
            self.quantizer.read_header(str(self.folder / self.container))
        cls = model_class(config)
        dtype = config.dtype or self.quantizer.update_dtype(None) or torch.float32
        self.dtype: torch.dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))
        with torch.device("meta"):
            made = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        self.model = made.to(self.dtype)
        self._open()

    def _quantizer(self, config: Any) -> Any:
        from transformers.quantizers import auto

        from qhub.integrations.transformers.quantizer import PluginQuantizer

        quantizer, _, _ = auto.get_hf_quantizer(config, None, None, True, {}, gguf_file=self.container)
        if quantizer is None:
            raise ConfigError(f"{self.place} is not quantized: quantize it instead (qhub quantize)")
        if not isinstance(quantizer, PluginQuantizer):
            raise UnsupportedError(f"{self.place} is served by transformers' own {type(quantizer).__name__}, no plugin")
        return quantizer

    def _open(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        files = [] if self.container else [str(file) for file in weight_files(self.folder)]
        self.quantizer.preprocess_model(model=self.model, dtype=self.dtype, device_map=None, checkpoint_files=files)
        self._router: Any = None
        if self.container is None:
            conversions = get_model_conversion_mapping(self.model, None, self.quantizer)
            self._router = next(one for one in conversions if isinstance(one, Router))

    @property
    def method(self) -> str:
        """Return the method that the checkpoint is quantized with."""
        return self.quantizer.method

    def infos(self) -> dict[str, WeightInfo]:
        """Return every weight of the model that could be quantized, by parameter."""
        return self.quantizer._weights

    def matrices(self) -> Iterator[Matrix]:
        """Read the quantized matrices, one after the other."""
        if self._router is None:
            yield from self._of_container()
            return
        fmt = registry.call(self.method, "qhub_format", config=self.quantizer.quantization_config)
        for route in self._router.routes.values():
            for source in route.sources:
                entries = {name: _read(tensor) for name, tensor in source.weight.entries.items()}
                weight = build_weight(source, entries, self.dtype, fmt, None)
                if weight.ndim > 2:
                    yield from self._singly(route.target.name, weight)
                else:
                    yield Matrix(source.weight.prefix, route.target.name, weight.quant_layout, dict(weight.parts))

    def _of_container(self) -> Iterator[Matrix]:
        for name, value in self.quantizer._state.items():
            if isinstance(value, QuantizedTensor):
                yield from self._singly(name, value)

    def _singly(self, name: str, weight: QuantizedTensor) -> Iterator[Matrix]:
        """Yield the matrices of a parameter under the names that published checkpoints give them."""
        for prefix, matrix in matrices_of(self.model, name, weight, True).items():
            one: Any = matrix.t() if matrix.transposed else matrix
            yield Matrix(prefix, name, one.quant_layout, dict(one.parts))

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Read everything else, by checkpoint key."""
        if self._router is not None:
            packed = {
                tensor.key
                for route in self._router.routes.values()
                for source in route.sources
                for tensor in source.weight.entries.values()
            }
            for key, tensor in self.quantizer._headers.items():
                if key not in packed:
                    yield key, _read(tensor)
            return
        for name, value in self.quantizer._state.items():
            if not isinstance(value, QuantizedTensor):
                yield from host.revert_weight_conversion(self.model, {name: value}).items()

    def config(self) -> Any:
        """Return a copy of the model's config without what says that it is quantized."""
        config = copy.deepcopy(self.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config


def _read(tensor: FileTensor) -> Tensor:
    if tensor.file.suffix != ".safetensors":
        raise UnsupportedError(f"{tensor.file} is no safetensors file: load the model and save it first")
    with safe_open(tensor.file, framework="pt") as opened:
        return opened.get_tensor(tensor.key)
