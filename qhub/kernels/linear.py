"""The product ``y = x @ W.T + bias`` with a quantized W: eager, under autograd, and as torch.compile's operator."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from qhub.kernels import dispatch
from qhub.kernels.binding import Bound
from qhub.kernels.dense import dense
from qhub.kernels.dispatch import choose
from qhub.layouts import Layout, Parts
from qhub.layouts.keys import layout_key, layout_of

__all__ = ["linear", "linear_parts"]


def linear_parts(
    x: Tensor,
    layout: Layout,
    parts: Parts,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memo: dict[Any, Any] | None = None,
    key: str | None = None,
) -> Tensor:
    """Return ``x @ W.T + bias`` for x (..., K), in x's dtype; gradients flow to x and bias, never to the parts.

    ``compute_dtype``: the product runs in it; None: in x's. ``memo``: where the weight keeps its kernel choices; None
    looks them up in the process-wide table, which hashes the layout at each call. ``key``: of :func:`layout_key`, if
    known.
    """
    out_dtype = x.dtype
    # torch knows no autocast on the meta device, and raises when asked.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        out_dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(out_dtype)
    if compute_dtype is not None and x.dtype != compute_dtype:
        x = x.to(compute_dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if torch.compiler.is_compiling():
        y = torch.ops.qhub.linear(x, list(parts.values()), key or layout_key(layout), layout.out_features, bias)
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _recorded(x, _bound(layout, parts, x.dtype, memo), bias)
    else:
        y = _forward(x, layout, parts, bias, memo)
    return y if y.dtype == out_dtype else y.to(out_dtype)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` for a 2-D :class:`qhub.QuantizedTensor` held as (out, in)."""
    # The short way: this weight has multiplied such an input before, and nothing asks for another dtype.
    if not torch.compiler.is_compiling() and x.__class__ is Tensor:
        dtype = x.dtype
        bound = weight.memo.get(dtype)
        if (
            bound is not None
            and bound.epoch == dispatch.epoch
            and (weight.compute_dtype is None or weight.compute_dtype == dtype)
            and (bias is None or bias.dtype == dtype)
            and (
                not torch.is_autocast_enabled(bound.device_type) or torch.get_autocast_dtype(bound.device_type) == dtype
            )
        ):
            if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
                return _recorded(x, bound, bias)
            return bound(x, bias)
    return linear_parts(x, weight.quant_layout, weight.parts, bias, weight.compute_dtype, weight.memo, weight.key)


def _forward(
    x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None, memo: dict[Any, Any] | None = None
) -> Tensor:
    return _bound(layout, parts, x.dtype, memo)(x, bias)


def _bound(layout: Layout, parts: Parts, dtype: torch.dtype, memo: dict[Any, Any] | None) -> Bound:
    """Return the kernels bound to a weight; made anew where the choice may have changed."""
    found = None if memo is None else memo.get(dtype)
    if found is not None and found.epoch == dispatch.epoch:
        return found
    choice = choose(layout, parts, dtype)
    if memo is None:
        return Bound(choice, layout, parts, {}, dispatch.epoch)
    if any(isinstance(one, Bound) and one.epoch != dispatch.epoch for one in memo.values()):
        memo.clear()
    bound = Bound(choice, layout, parts, memo, dispatch.epoch)
    # A meta device decides nothing.
    if bound.device_type != "meta":
        memo[dtype] = bound
    return bound


def _times(v: Tensor, layout: Layout, parts: Parts, transposed: bool, bound: Bound | None = None) -> Tensor:
    """Return ``v @ W``, or ``v @ W.T`` if ``transposed``, with W dequantized once to v's dtype.

    ``bound``: what knows already how to dequantize it. Rounding of activations has no useful derivative: gradients pass
    straight through it, as LLM.int8() training does.
    """
    decode = dense if bound is None or bound.epoch != dispatch.epoch else bound.decoding(v.dtype)
    weight = decode(layout, parts, v.dtype)
    return torch.matmul(v, weight.t() if transposed else weight)


class _Linear(torch.autograd.Function):
    """Saves the parts by reference, and no float of the weight; nothing at all if only the bias wants a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Bound, bias: Tensor | None) -> Tensor:
        ctx.bound = bound
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*bound.parts.values())
        return bound(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        grad_x = grad_bias = None
        bound, needed = ctx.bound, ctx.needs_input_grad
        if needed[0]:
            # Not the tensors that were bound: torch refuses those written into since, and hooks may hold others.
            parts = dict(zip(bound.parts, ctx.saved_tensors, strict=True))
            # A function of autograd costs the host more than the rest of this; only a second derivative asks for one.
            if torch.is_grad_enabled():
                grad_x = _Times.apply(grad, bound.layout, parts, False)
            else:
                grad_x = _times(grad, bound.layout, parts, False, bound)
        if needed[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, grad_bias


# What Function.apply of torch calls in the end. Before that it looks for what this function has not, a context that is
# set up apart and arguments by name: a third of its time.
_apply = super(torch.autograd.Function, _Linear).apply
_unwrap = torch._C._functorch.unwrap_if_dead


def _recorded(x: Tensor, bound: Bound, bias: Tensor | None) -> Tensor:
    """Return ``bound(x, bias)`` as a node of autograd's graph."""
    if torch._C._are_functorch_transforms_active():
        return _Linear.apply(x, bound, bias)
    return _apply(_unwrap(x), bound, None if bias is None else _unwrap(bias))


class _Times(torch.autograd.Function):
    """Is :func:`_times`, lean in its own backward too: what double backward runs."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, layout: Layout, parts: Parts, transposed: bool) -> Tensor:
        ctx.layout, ctx.transposed = layout, transposed
        ctx.names = tuple(parts)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*parts.values())
        return _times(v, layout, parts, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        parts = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        return _Times.apply(grad, ctx.layout, parts, not ctx.transposed), None, None, None


def _unkey(key: str, parts: list[Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    layout, names = layout_of(key)
    return layout, dict(zip(names, parts, strict=True))


class _Kept:
    """Holds what was bound to the tensors of a weight, with the first of them. A copy of the tensor starts without."""

    __slots__ = ("key", "memo", "rest")

    def __init__(self, key: str = "", rest: list[Tensor] | None = None) -> None:
        self.key, self.rest = key, rest or []
        self.memo: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _memo_of(parts: list[Tensor], key: str) -> dict[Any, Any]:
    """Return where compiled code, which has the tensors of a weight and not the weight, keeps what was bound to
    them."""
    rest = parts[1:]
    kept = getattr(parts[0], "_qhub_bound", None)
    if kept is None or kept.key != key or len(kept.rest) != len(rest) or any(map(operator.is_not, kept.rest, rest)):
        kept = _Kept(key, rest)
        parts[0]._qhub_bound = kept  # type: ignore[attr-defined]
    return kept.memo


@torch.library.custom_op("qhub::linear", mutates_args=())
def _linear_op(x: Tensor, parts: list[Tensor], layout: str, out_features: int, bias: Tensor | None) -> Tensor:
    described, named = _unkey(layout, parts)
    # An operator may not return a view of its input; every kernel makes a new tensor, and so does the empty case.
    return _forward(x, described, named, bias, _memo_of(parts, layout))


@_linear_op.register_fake
def _(x: Tensor, parts: list[Tensor], layout: str, out_features: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("qhub::times", mutates_args=())
def _times_op(v: Tensor, parts: list[Tensor], layout: str, features: int, transposed: bool) -> Tensor:
    described, named = _unkey(layout, parts)
    return _times(v, described, named, transposed)


@_times_op.register_fake
def _(v: Tensor, parts: list[Tensor], layout: str, features: int, transposed: bool) -> Tensor:
    return v.new_empty(*v.shape[:-1], features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, layout, _, _ = inputs
    ctx.layout, ctx.in_features, ctx.count = layout, x.shape[-1], len(parts)
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qhub.times(grad, list(ctx.saved_tensors), ctx.layout, ctx.in_features, False)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, [None] * ctx.count, None, None, grad_bias


def _setup_times(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, parts, layout, _, transposed = inputs
    ctx.layout, ctx.features, ctx.transposed = layout, v.shape[-1], transposed
    ctx.save_for_backward(*parts)


def _backward_times(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    product = torch.ops.qhub.times(grad, parts, ctx.layout, ctx.features, not ctx.transposed)
    return product, [None] * len(parts), None, None, None


_linear_op.register_autograd(_backward, setup_context=_setup)
_times_op.register_autograd(_backward_times, setup_context=_setup_times)
