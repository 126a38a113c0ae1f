"""Sees the products of inputs with a model's weights while the model runs, whatever module makes them.

``nn.Linear``, GPT-2's transposed linear, a router's bare parameter, one expert of a fused stack: all end in one of a
few functions of torch, one argument of which lies in the memory of a parameter. So no table of module classes is
needed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from qhub.calibration.memory import RunMemory

__all__ = ["Key", "Products", "features_of", "keys_of"]

_MATMULS = {
    torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip
_ADDMMS = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}


@dataclass(frozen=True, order=True)
class Key:
    """Names one matrix: a parameter, and which of its fused experts (None: the parameter is the matrix)."""

    name: str
    expert: int | None = None

    def __str__(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


class Products(TorchFunctionMode):
    """Calls ``seen(key, x)`` for every product of an input ``x`` (..., K) with one of ``weights``.

    ``weights``: {name: parameter}, 2-D or, with experts leading, 3-D; all on a device, none replaced while this is
    active. ``memory``: asked for each product of one matrix before it is made, and told it afterwards; None: every
    product is made. ``idle``: matrices whose products nobody looks at in this run: zeros stand for them. An exception
    from ``seen`` ends the model's run and passes through.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        seen: Callable[[Key, Tensor], None],
        memory: RunMemory | None = None,
        idle: Collection[Key] = (),
    ) -> None:
        super().__init__()
        spans = sorted((w.data_ptr(), w.data_ptr() + w.nbytes, name) for name, w in weights.items() if w.numel())
        self._starts = [start for start, _, _ in spans]
        self._spans = spans
        self._weights = weights
        self._seen = seen
        self._memory = memory
        self._idle = idle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = None
        if func is torch.nn.functional.linear:
            key = self._look(args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"])
        elif func in _ADDMMS and len(args) > 2:
            key = self._look(args[1], args[2])
        elif func in _MATMULS and len(args) > 1:
            left, right = (args[1], args[0]) if func is Tensor.__rmatmul__ else (args[0], args[1])
            key = self._look(left, right)
        if key in self._idle and func is torch.nn.functional.linear:
            x, weight = args[0], args[1]
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        if self._memory is None:
            return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            key = Key("attention")
        if key is None:
            return func(*args, **kwargs)
        value = self._memory.recall(key)
        if value is None:
            value = func(*args, **kwargs)
            self._memory.keep(key, value)
        return value

    def _look(self, x: Any, weight: Any) -> Key | None:
        """Report a product; return its matrix if it is a product with exactly one."""
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.device.type == "meta":
            return None
        pointer = weight.data_ptr()
        place = bisect_right(self._starts, pointer) - 1
        if place < 0 or pointer >= self._spans[place][1]:
            return None
        start, _, name = self._spans[place]
        parameter = self._weights[name]
        if parameter.ndim == 2:
            self._seen(Key(name), x)
            # A part of it (a fused projection used half by half) is another product each time.
            return Key(name) if weight.numel() == parameter.numel() else None
        size = parameter[0].nbytes
        first = (pointer - start) // size
        if weight.ndim == 3 and x.ndim == 3:
            for offset in range(weight.shape[0]):
                self._seen(Key(name, first + offset), x[offset])
            return None
        self._seen(Key(name, first), x)
        return Key(name, first) if weight.nbytes == size else None


def keys_of(name: str, experts: int | None) -> list[Key]:
    """Return the matrices of a parameter."""
    return [Key(name)] if experts is None else [Key(name, index) for index in range(experts)]


def features_of(x: Tensor) -> Tensor:
    """Return ``x`` (..., K) as (tokens, K)."""
    return x.reshape(-1, x.shape[-1])


def same_input(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same numbers in the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def common_inputs(calls: Iterable[tuple[Key, Tensor]]) -> list[list[Key]]:
    """Group the matrices that read the same input, in the order of their first products.

    ``calls``: the products of one run, inputs still alive. A matrix that is used several times belongs with another
    only if it does every time.
    """
    inputs: dict[Key, list[Tensor]] = {}
    for key, x in calls:
        inputs.setdefault(key, []).append(x)
    groups: list[list[Key]] = []
    for key, mine in inputs.items():
        for group in groups:
            theirs = inputs[group[0]]
            if len(theirs) == len(mine) and all(same_input(a, b) for a, b in zip(mine, theirs, strict=True)):
                group.append(key)
                break
        else:
            groups.append([key])
    return groups
