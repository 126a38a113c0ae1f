"""What torch's functions do to a quantized weight: those that keep it quantized, and those that need its kernels.

Everything that is not here runs on the dequantized weight (:meth:`QuantizedTensor.__torch_dispatch__`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhub.errors import UnsupportedError
from qhub.layouts import Stacked
from qhub.layouts.rows import identical
from qhub.tensor import FUNCTIONS, NO_GRADIENT, OPERATORS, QuantizedTensor

aten = torch.ops.aten


def _linear_function(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    from qhub.kernels.linear import linear

    if isinstance(input, QuantizedTensor) or not isinstance(weight, QuantizedTensor):
        return NotImplemented
    if weight.ndim != 2 or weight.transposed or isinstance(bias, QuantizedTensor):
        return NotImplemented
    return linear(input, weight, bias)


def _matmul_function(input: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
    """Send ``x @ w.T`` to the kernels; other products run on the dequantized weight."""
    from qhub.kernels.linear import linear

    # torch.matmul calls it "other", torch.mm "mat2".
    others = (*args, *kwargs.values())
    weight = others[0]
    if (
        len(others) > 1
        or out is not None
        or isinstance(input, QuantizedTensor)
        or not isinstance(weight, QuantizedTensor)
    ):
        return NotImplemented
    if weight.ndim != 2 or not weight.transposed or input.ndim < 1:
        return NotImplemented
    return linear(input, weight._like(weight.parts, transposed=False))


def _embedding_function(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Look up rows: only those that are asked for are dequantized, where the layout can tell them apart."""
    # Arguments after these are for training and for norms, which codes have none of.
    if not isinstance(weight, QuantizedTensor) or weight.ndim != 2 or weight.transposed:
        return NotImplemented
    if kwargs.get("max_norm") is not None or (len(args) > 1 and args[1] is not None):
        return NotImplemented
    if not input.numel():
        return torch.empty(*input.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
    taken = weight.quant_layout.take_rows(weight.parts, input.reshape(-1).long())
    if taken is None:
        return NotImplemented
    return taken[0].dequantize(taken[1], weight.dtype).reshape(*input.shape, weight.shape[1])


def _set_data(self: Tensor, value: Tensor) -> Any:
    if not isinstance(self, QuantizedTensor):
        return NotImplemented
    if not isinstance(value, QuantizedTensor):
        self.write_(value)
        return None
    with torch._C.DisableTorchFunctionSubclass():
        # Adopts dtype, device and shape of the new wrapper; the parts are ours to replace.
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
    self._set(value.quant_layout, value.parts, value.compute_dtype, value.policy, value.transposed)
    return None


def _require_grad(self: Tensor, value: bool = True) -> Any:
    if isinstance(self, QuantizedTensor) and value:
        raise UnsupportedError(NO_GRADIENT)
    return NotImplemented


def _clone_function(self: Tensor, *, memory_format: Any = None) -> Any:
    """Return a copy that knows that nothing else sees it: what is added to it need not fit its grid."""
    if torch.compiler.is_compiling() or not isinstance(self, QuantizedTensor):
        return NotImplemented
    copied = _clone(self)
    copied.scratch = True
    return copied


def _assignment(method: str) -> Callable:
    """Return what ``w += x`` and its like do: on a copy of a weight they give the exact, dense result.

    Python binds the name to whatever comes back, so the codes need not take the change. Tuners of adapters write
    ``w = weight.clone(); w += delta`` in their forward, and want the gradient of ``delta``. (``w.add_(delta)`` has
    nowhere to put another tensor.)
    """
    original = getattr(torch.Tensor, method)

    def assign(self: QuantizedTensor, other: Any) -> Any:
        return getattr(self.dequantize(), method)(other) if self.scratch else original(self, other)

    return assign


for _method in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"):
    setattr(QuantizedTensor, _method, _assignment(_method))

FUNCTIONS.update(
    {
        torch.clone: _clone_function,
        torch.Tensor.clone: _clone_function,
        torch.nn.functional.linear: _linear_function,
        torch.nn.functional.embedding: _embedding_function,
        torch.matmul: _matmul_function,
        torch.Tensor.matmul: _matmul_function,
        torch.Tensor.__matmul__: _matmul_function,
        torch.mm: _matmul_function,
        torch.Tensor.mm: _matmul_function,
        torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad_: _require_grad,
        torch.Tensor.requires_grad.__set__: _require_grad,  # type: ignore[attr-defined]
    }
)


# -- operators that keep a weight quantized ----------------------------------------------------------------------------


def _alias(self: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    return self._like(self.parts)


def _clone(self: QuantizedTensor, *, memory_format: Any = None) -> QuantizedTensor:
    return self._like({name: part.clone() for name, part in self.parts.items()})


def _to_copy(
    self: QuantizedTensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    if device is not None and torch.device(device).type != self.device.type:
        # The order was this device's.
        self = self.in_plain_order()
    parts = {name: part.to(device=device, non_blocking=non_blocking, copy=True) for name, part in self.parts.items()}
    return self._like(parts, dtype)


def _transpose(self: QuantizedTensor, first: int = 0, second: int = 1) -> Any:
    if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
        return NotImplemented
    return self._like(self.parts, transposed=not self.transposed)


def _permute(self: QuantizedTensor, dims: list[int]) -> Any:
    """Take ``w.T``, which torch spells as a permutation."""
    wanted, places = [dim % self.ndim for dim in dims], list(range(self.ndim))
    if wanted == places:
        return _alias(self)
    return _transpose(self, -2, -1) if wanted == [*places[:-2], places[-1], places[-2]] else NotImplemented


def _batch_index(self: QuantizedTensor, dim: int) -> bool:
    """Return whether ``dim`` counts matrices (a leading dimension), not rows or columns of one."""
    return dim % self.ndim < self.ndim - 2


def _each_part(self: QuantizedTensor, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    specs = self.quant_layout.part_specs()
    return {name: change(part) if specs[name].batched else part for name, part in self.parts.items()}


def _select(self: QuantizedTensor, dim: int, index: int) -> Any:
    if not _batch_index(self, dim):
        return NotImplemented
    return self._like(_each_part(self, lambda part: part.select(dim % self.ndim, int(index))))


def _slice(self: QuantizedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    dim = dim % self.ndim
    if _batch_index(self, dim):
        return self._like(_each_part(self, lambda part: aten.slice.Tensor(part, dim, start, end, step)))
    begin, stop, stride = slice(start, end, step).indices(self.shape[dim])
    if (begin, stop, stride) == (0, self.shape[dim], 1):
        return _alias(self)
    rows = self.ndim - 1 if self.transposed else self.ndim - 2
    if dim != rows or stride != 1 or stop <= begin:
        return NotImplemented
    cut = self.quant_layout.select_rows(self.parts, begin, stop)
    return NotImplemented if cut is None else self._like(cut[1], layout=cut[0])


def _split(self: QuantizedTensor, size: Any, dim: int = 0) -> Any:
    sizes = size if isinstance(size, (list, tuple)) else None
    total = self.shape[dim]
    if sizes is None:
        sizes = [min(size, total - at) for at in range(0, total, size)]
    pieces, at = [], 0
    for length in sizes:
        piece = _slice(self, dim, at, at + length)
        if piece is NotImplemented:
            return NotImplemented
        pieces.append(piece)
        at += length
    return pieces


def _unbind(self: QuantizedTensor, dim: int = 0) -> Any:
    if not _batch_index(self, dim):
        return NotImplemented
    return [_select(self, dim, index) for index in range(self.shape[dim])]


def _squeeze(self: QuantizedTensor, dim: Any = None) -> Any:
    if isinstance(dim, (list, tuple)):
        dims = [d % self.ndim for d in dim]
    else:
        dims = list(range(self.ndim)) if dim is None else [dim % self.ndim]
    dims = [d for d in dims if self.shape[d] == 1]
    if any(not _batch_index(self, d) for d in dims):
        return NotImplemented
    result = self
    for d in sorted(dims, reverse=True):
        result = _select(result, d, 0)
    return _alias(result)


def _index(self: QuantizedTensor, indices: Any) -> Any:
    if isinstance(self, QuantizedTensor) and len(indices) == 1 and self.ndim > 2 and indices[0].dtype != torch.bool:
        return self._like(_each_part(self, lambda part: part[indices[0]]))
    return NotImplemented


def _stack(tensors: list[Any], dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(t, QuantizedTensor) for t in tensors) or dim != 0:
        return NotImplemented
    if any(
        t.quant_layout != first.quant_layout or t.shape != first.shape or t.transposed != first.transposed
        for t in tensors
    ):
        return NotImplemented
    parts = {}
    for name, spec in first.quant_layout.part_specs().items():
        column = [t.parts[name] for t in tensors]
        if spec.batched:
            parts[name] = torch.stack(column)
        elif all(torch.equal(one, column[0]) for one in column[1:]):
            parts[name] = column[0]
        else:
            return NotImplemented
    return first._like(parts)


def _cat(tensors: list[Any], dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(t, QuantizedTensor) and t.transposed == first.transposed for t in tensors):
        return NotImplemented
    rows = first.ndim - 1 if first.transposed else first.ndim - 2
    if dim % first.ndim != rows:
        return NotImplemented
    parts, layouts = [t.parts for t in tensors], [t.quant_layout for t in tensors]
    merged = first.quant_layout.concat_rows(parts, layouts) or Stacked.of(layouts, parts)
    return NotImplemented if merged is None else first._like(merged[1], layout=merged[0])


def _view(self: QuantizedTensor, shape: Any) -> Any:
    wanted = [int(size) for size in shape]
    if -1 in wanted:
        known = 1
        for size in wanted:
            known *= size if size != -1 else 1
        wanted[wanted.index(-1)] = self.numel() // max(known, 1)
    return _alias(self) if tuple(wanted) == tuple(self.shape) else NotImplemented


def _copy(self: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(self, QuantizedTensor):
        self.copy_(source.dequantize())
        return self
    if isinstance(source, QuantizedTensor):
        same = source.quant_layout == self.quant_layout and source.transposed == self.transposed
        # A table may belong to other experts and layers too: it is never overwritten.
        specs = self.quant_layout.part_specs()
        tables = (
            ((self.parts[name], source.parts[name]) for name, spec in specs.items() if not spec.batched) if same else ()
        )
        if same and source.shape == self.shape and all(identical(pair) for pair in tables):
            for name, part in self.parts.items():
                part.copy_(source.parts[name], non_blocking=non_blocking)
            return self
        source = source.dequantize()
    self.check_gradients(source)
    return self.write_(source)


def _empty_like(self: QuantizedTensor, *args: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(self.shape, dtype=dtype or self.dtype, device=device or self.device)


OPERATORS.update(
    {
        aten.detach.default: _alias,
        aten.alias.default: _alias,
        aten.lift_fresh.default: _alias,
        aten.contiguous.default: _alias,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.t.default: _transpose,
        aten.transpose.int: _transpose,
        aten.permute.default: _permute,
        aten.select.int: _select,
        aten.slice.Tensor: _slice,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split,
        aten.unbind.int: _unbind,
        aten.squeeze.default: _squeeze,
        aten.squeeze.dim: _squeeze,
        aten.squeeze.dims: _squeeze,
        aten.index.Tensor: _index,
        aten.stack.default: _stack,
        aten.cat.default: _cat,
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten.copy_.default: _copy,
        aten.empty_like.default: _empty_like,
    }
)
