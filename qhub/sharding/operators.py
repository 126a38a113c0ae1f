"""What torch's operators do to one process's piece of a quantized weight: move it, shape it, gather it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.sharding.shard import SHARD_OPERATORS, QuantizedShard
from qhub.tensor import OPERATORS, QuantizedTensor

aten = torch.ops.aten


def _alias(self: QuantizedShard, *args: Any, **kwargs: Any) -> QuantizedShard:
    return self._like()


def _clone(self: QuantizedShard, **kwargs: Any) -> QuantizedShard:
    return self._like(self.codes.clone())


def _to_copy(
    self: QuantizedShard, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> QuantizedShard:
    codes = self.codes.to(device=device, non_blocking=non_blocking, copy=True)
    return self._like(codes, recipe=replace(self.recipe, dtype=dtype or self.recipe.dtype))


def _view(self: QuantizedShard, shape: Any) -> QuantizedShard | QuantizedTensor:
    wanted = [int(size) for size in shape]
    if -1 in wanted:
        known = -math.prod(wanted)
        wanted[wanted.index(-1)] = self.numel() // max(known, 1)
    if math.prod(wanted) != self.numel():
        raise UnsupportedError(f"a piece of shape {tuple(self.shape)} cannot be seen as {tuple(shape)}")
    if tuple(wanted) == self.recipe.shape and self.codes.numel() >= self.recipe.length:
        # One process holds all: full_tensor() has nothing to gather and asks for the same shape.
        return self.recipe.weight(self.codes, self.tables)
    return self._like(shape=wanted)


def _slice(self: QuantizedShard, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Take the rows that are there out of padded ones: padding is in the shape alone, the bytes stay."""
    first, last, stride = slice(start, end, step).indices(self.shape[dim])
    if (first, stride) != (0, 1):
        raise UnsupportedError(f"rows {start}:{end}:{step} cannot be cut out of a piece of a quantized weight")
    shape = [*self.shape]
    shape[dim] = max(0, last)
    if tuple(shape) == self.recipe.shape and self.shape[0] > shape[0]:
        # More rows than the weight has: all pieces, gathered, with their padding.
        return self.recipe.weight(self.codes, self.tables)
    return self._like(shape=shape)


def _zeros(self: QuantizedShard, size: Any, *, device: Any = None, **_: Any) -> QuantizedShard:
    return self._like(torch.zeros_like(self.codes, device=device), shape=size)


def _zeros_like(self: QuantizedShard, *, device: Any = None, **_: Any) -> QuantizedShard:
    return self._like(torch.zeros_like(self.codes, device=device))


def _new_empty(self: QuantizedShard, size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(size, dtype=dtype or self.dtype, device=device or self.device)


def _copy(self: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(self, QuantizedShard) or not isinstance(source, QuantizedShard):
        raise UnsupportedError(
            "floats cannot be written into one process's piece of a quantized weight, nor read out of it: gather the "
            "weight first (full_tensor() of the parameter)"
        )
    if (self.recipe, self.codes.numel()) != (replace(source.recipe, dtype=self.dtype), source.codes.numel()):
        raise UnsupportedError(f"{source!r} cannot be copied into {self!r}: they are pieces of different weights")
    self.codes.copy_(source.codes, non_blocking=non_blocking)
    return self


def _pad(self: QuantizedShard, pad: list[int], value: Any = 0) -> QuantizedShard:
    shape = [*self.shape]
    # (before, after) by dimension, the last one first.
    for index in range(len(pad) // 2):
        shape[len(shape) - 1 - index] += pad[2 * index] + pad[2 * index + 1]
    return self._like(shape=shape)


def _is_pinned(self: QuantizedShard, device: Any = None) -> bool:
    return self.codes.is_pinned()


def _pin(self: QuantizedShard, device: Any = None) -> QuantizedShard:
    return self._like(self.codes.pin_memory())


def _gather(self: QuantizedShard, group_size: int, group_name: Any) -> Any:
    """Gather what ``full_tensor()`` of a DTensor asks for: the whole weight, once padding is off."""
    _register_collectives()
    operators = torch.ops._c10d_functional
    run = operators.wait_tensor(operators.all_gather_into_tensor(self.codes, group_size, group_name))
    shape = (self.shape[0] * group_size, *self.shape[1:])
    return self.recipe.weight(run, self.tables) if shape == self.recipe.shape else self._like(run, shape=shape)


SHARD_OPERATORS.update(
    {
        aten.detach.default: _alias,
        aten.alias.default: _alias,
        aten.contiguous.default: _alias,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten.slice.Tensor: _slice,
        aten.new_zeros.default: _zeros,
        aten.zeros_like.default: _zeros_like,
        aten.empty_like.default: _zeros_like,
        aten.new_empty.default: _new_empty,
        aten.copy_.default: _copy,
        aten.constant_pad_nd.default: _pad,
        aten.is_pinned.default: _is_pinned,
        aten._pin_memory.default: _pin,
    }
)


def _same(self: Tensor, *args: Any) -> Tensor:
    return self._like(self.parts) if isinstance(self, QuantizedTensor) else _alias(self)  # type: ignore[arg-type]


def _register_collectives() -> None:
    """Take the operators of torch's functional collectives; some exist only once that module is imported."""
    operators = torch.ops._c10d_functional
    SHARD_OPERATORS[operators.all_gather_into_tensor.default] = _gather
    for name in ("wait_tensor", "_wrap_tensor_autograd"):
        if hasattr(operators, name):
            operator = getattr(operators, name).default
            SHARD_OPERATORS[operator] = OPERATORS[operator] = _same


if torch.distributed.is_available():
    _register_collectives()
