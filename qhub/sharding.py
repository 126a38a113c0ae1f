"""What FSDP2 (``torch.distributed.fsdp.fully_shard``) moves of a quantized weight: its bytes, cut evenly, never floats.

All codes and scales of a weight are seen as one run of bytes; each process keeps an equal piece of it, whatever the
layout, and an all-gather of the pieces is the weight again, its parts being views of the gathered bytes. Rows would not
do: the groups of many layouts (nested scales, 2-D blocks, act-order) have members on both sides of a cut. Tables that
the matrices of a batch, or many weights, share stay whole on every process.

The protocol is torch's own (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``): a parameter is cut by
``torch.chunk``, copied into ``new_zeros``, and the local tensor's ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``
say what is sent and what is made of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.layouts import Layout
from qhub.merging import AdapterPolicy
from qhub.tensor import FUNCTIONS, OPERATORS, QuantizedTensor

__all__ = ["QuantizedShard", "Recipe"]

aten = torch.ops.aten

# Each part begins where its widest element, and a vector register, may be read.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Recipe:
    """Says how a run of bytes is a quantized weight again.

    ``slots``: (part, dtype, shape, first byte), in order. ``length``: of the run. ``shape``: of the dense weight.
    """

    layout: Layout
    slots: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute_dtype: torch.dtype | None
    policy: AdapterPolicy
    transposed: bool

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Recipe:
        """Return the recipe of ``weight``."""
        slots, at = [], 0
        for name, spec in weight.quant_layout.part_specs().items():
            if spec.batched:
                part = weight.parts[name]
                slots.append((name, part.dtype, tuple(part.shape), at))
                at += _aligned(part.numel() * part.element_size())
        return cls(
            weight.quant_layout,
            tuple(slots),
            at,
            tuple(weight.shape),
            weight.dtype,
            weight.compute_dtype,
            weight.policy,
            weight.transposed,
        )

    def share(self, rows: int) -> int:
        """Return the bytes of a piece when the first process holds ``rows`` rows of the weight.

        A process that gets no row gets no byte either: FSDP copies nothing to it.
        """
        return _aligned(-(-self.length // max(1, -(-self.shape[0] // max(1, rows)))))

    def cut(self, weight: QuantizedTensor, start: int, size: int) -> Tensor:
        """Return bytes [start, start + size) of the run, with zeros after its end."""
        piece = torch.zeros(size, dtype=torch.uint8, device=weight.device)
        for name, _, _, at in self.slots:
            part = weight.parts[name].detach().contiguous().reshape(-1).view(torch.uint8)
            first, last = max(start, at), min(start + size, at + part.numel())
            if first < last:
                piece[first - start : last - start].copy_(part[first - at : last - at])
        return piece

    def weight(self, run: Tensor, tables: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> QuantizedTensor:
        """Return the weight whose parts are views of the bytes ``run``, of dense ``dtype``; None: as it was."""
        parts = dict(tables)
        for name, kind, shape, at in self.slots:
            size = math.prod(shape) * kind.itemsize
            parts[name] = run[at : at + size].view(kind).view(shape)
        return QuantizedTensor.build(
            self.layout,
            parts,
            dtype or self.dtype,
            compute_dtype=self.compute_dtype,
            policy=self.policy,
            transposed=self.transposed,
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class QuantizedShard(torch.Tensor):
    """Is what one process holds of a quantized weight under FSDP2: a piece of its bytes, with the shape of its rows.

    ``codes`` (bytes,) uint8: the piece. ``recipe``: how all pieces are the weight again. ``tables``: what is not cut.
    It cannot compute: FSDP gathers the weight before a layer runs, and ``full_tensor()`` of the parameter does
    elsewhere.
    """

    codes: Tensor
    recipe: Recipe
    tables: dict[str, Tensor]

    @staticmethod
    def __new__(
        cls, codes: Tensor, recipe: Recipe, tables: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> QuantizedShard:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=recipe.dtype, device=codes.device, requires_grad=False
        )
        self.codes, self.recipe, self.tables = codes, recipe, dict(tables)
        return self

    def __init__(self, *args: Any) -> None:
        # torch.Tensor.__init__ would refuse the arguments of __new__.
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedShard({self.recipe.layout.kind}, shape={tuple(self.shape)} of {self.recipe.shape}, "
            f"{self.codes.numel()} of {self.recipe.length} bytes, device={self.device})"
        )

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Return the bytes held, shared tables left out."""
        return self.codes.numel()

    def _like(self, codes: Tensor | None = None, shape: Any = None, recipe: Recipe | None = None) -> QuantizedShard:
        codes = self.codes if codes is None else codes
        tables = self.tables
        if codes.device != self.device:
            tables = {name: table.to(codes.device) for name, table in tables.items()}
        shape = tuple(self.shape if shape is None else shape)
        return QuantizedShard(codes, recipe or self.recipe, tables, shape)

    # -- what FSDP2 calls --------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Return what is sent: the bytes as they are.

        torch also offers a longer signature; with it FSDP insists that what is sent has as many rows as the weight.
        """
        return (self.codes,), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """Return the weight on the ``gathered`` bytes; ``out``: the one returned before, on the same memory."""
        (run,) = gathered
        if out is None:
            return self.recipe.weight(run, self.tables, param_dtype), (run,)
        held = out.to_local() if hasattr(out, "to_local") else out
        if not isinstance(held, QuantizedTensor) or held.dtype != param_dtype:
            raise UnsupportedError(
                f"FSDP asks for a quantized weight in {param_dtype} and holds {type(held).__name__} {held.dtype}: "
                "the mixed precision policy cannot change once the model has run"
            )
        return None

    # -- what torch calls --------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "one process's piece of a quantized weight cannot be pickled or saved by itself: save the adapter (the "
            "base does not change in training), or gather the weights first, as "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(full_state_dict=True) does"
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = SHARD_OPERATORS.get(func)
        if handler is None:
            raise UnsupportedError(
                f"{func} was called on one process's piece of a quantized weight, which cannot compute. Inside a layer "
                "FSDP gathers the weight first: is the layer called through the module that fully_shard was given? "
                "Elsewhere full_tensor() of the parameter gathers it"
            )
        return handler(*args, **(kwargs or {}))


# -- cutting -----------------------------------------------------------------------------------------------------------


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


# -- operators of a shard ----------------------------------------------------------------------------------------------


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


SHARD_OPERATORS: dict[Any, Callable] = {
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
