"""How FSDP2 cuts a quantized weight: what torch's functions do to it when FSDP itself calls them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.sharding.recipe import Recipe
from qhub.sharding.shard import QuantizedShard
from qhub.tensor import FUNCTIONS, OPERATORS, QuantizedTensor

aten = torch.ops.aten

_BETWEEN = ("qhub.", "torch._tensor", "torch.utils", "torch.overrides", "torch.functional", "torch.nn.parameter")


def _caller() -> str:
    """Return the module that called torch, frames of qhub and of torch's own dispatch left out."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(_BETWEEN):
            return name
        frame = frame.f_back
    return ""


def _fsdp_calls() -> bool:
    """Return whether FSDP2 itself cuts: to everybody else ``chunk`` and ``new_zeros`` mean rows and zeros."""
    return not torch.compiler.is_compiling() and _caller().startswith("torch.distributed.fsdp._fully_shard")


def _tables(weight: QuantizedTensor) -> dict[str, Tensor]:
    specs = weight.quant_layout.part_specs()
    return {name: part.detach() for name, part in weight.parts.items() if not specs[name].batched}


def _chunk(self: Tensor, chunks: int, dim: int = 0) -> Any:
    if not isinstance(self, QuantizedTensor) or not _fsdp_calls():
        return NotImplemented
    if dim % self.ndim:
        raise UnsupportedError(
            f"FSDP was told to cut a quantized weight {tuple(self.shape)} along dimension {dim}: its bytes are shared "
            "out with dimension 0 only. Leave shard_placement_fn out for quantized weights"
        )
    recipe = Recipe.of(self)
    rows = -(-self.shape[0] // chunks)
    size = recipe.share(rows)
    pieces = []
    for index, first in enumerate(range(0, self.shape[0], rows)):
        shape = (min(rows, self.shape[0] - first), *self.shape[1:])
        pieces.append(QuantizedShard(recipe.cut(self, index * size, size), recipe, _tables(self), shape))
    return tuple(pieces)


def _new_zeros(self: Tensor, *size: Any, **kwargs: Any) -> Any:
    if not isinstance(self, QuantizedTensor) or not _fsdp_calls():
        return NotImplemented
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    recipe = Recipe.of(self)
    codes = torch.zeros(recipe.share(shape[0]), dtype=torch.uint8, device=self.device)
    return QuantizedShard(codes, recipe, _tables(self), shape)


def _require_grad(self: Tensor, value: bool = True) -> Any:
    """Let FSDP make a parameter of a weight that it moved: it says nothing of gradients."""
    if value and isinstance(self, QuantizedTensor) and _fsdp_calls():
        return self
    return _refuse_gradient(self, value)


def _as_strided(self: QuantizedTensor, size: Any, stride: Any, storage_offset: Any = None) -> Any:
    whole = tuple(size) == tuple(self.shape) and tuple(stride) == tuple(self.stride()) and not storage_offset
    return self._like(self.parts) if whole else NotImplemented


def _flatten(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or not isinstance(self, QuantizedTensor):
        return NotImplemented
    if _caller() == "torch.distributed.fsdp._flat_param":
        raise UnsupportedError(
            "FSDP1 (FullyShardedDataParallel) makes one float vector of all weights, which would undo the "
            "quantization: use FSDP2, which is fully_shard, or fsdp_version: 2 in accelerate's config"
        )
    return NotImplemented


_refuse_gradient = FUNCTIONS[torch.Tensor.requires_grad_]

FUNCTIONS.update(
    {
        torch.Tensor.requires_grad_: _require_grad,
        torch.chunk: _chunk,
        torch.Tensor.chunk: _chunk,
        torch.Tensor.new_zeros: _new_zeros,
        torch.flatten: _flatten,
        torch.Tensor.flatten: _flatten,
    }
)
OPERATORS[aten.as_strided.default] = _as_strided
