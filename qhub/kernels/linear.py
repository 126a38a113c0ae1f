"""The product ``y = x @ W.T + bias`` with a quantized W: eager, under autograd, and as torch.compile's operator."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from qhub.kernels import dispatch
from qhub.kernels.dispatch import Choice, choose
from qhub.layouts import Layout, Parts
from qhub.layouts.keys import layout_key, layout_of

__all__ = ["linear", "linear_parts"]


def linear_parts(
    x: Tensor,
    layout: Layout,
    parts: Parts,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memo: dict[Any, Choice] | None = None,
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
        y = _Linear.apply(x, layout, parts, bias, memo)
    else:
        y = _forward(x, layout, parts, bias, memo)
    return y if y.dtype == out_dtype else y.to(out_dtype)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` for a 2-D :class:`qhub.QuantizedTensor` held as (out, in)."""
    return linear_parts(x, weight.quant_layout, weight.parts, bias, weight.compute_dtype, weight.memo, weight.key)


def _forward(
    x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None, memo: dict[Any, Choice] | None = None
) -> Tensor:
    if x.shape[-1] != layout.in_features:
        raise ValueError(f"the input has {x.shape[-1]} features, the quantized weight takes {layout.in_features}")
    flat = x.reshape(-1, layout.in_features)
    m = flat.shape[0]
    if m == 0:
        return x.new_empty(*x.shape[:-1], layout.out_features)
    if memo is None:
        choice = choose(layout, parts, x.dtype)
    else:
        key = (x.dtype, dispatch.epoch, os.environ.get("QHUB_KERNEL"))
        found = memo.get(key)
        choice = memo[key] = choose(layout, parts, x.dtype) if found is None else found
    run = choice.pick(m)
    y = run(flat.contiguous(), layout, parts, bias)
    return y.reshape(*x.shape[:-1], layout.out_features)


def _input_gradient(grad: Tensor, layout: Layout, parts: Parts) -> Tensor:
    # Rounding of activations has no useful derivative: the gradient passes straight through it, as LLM.int8() training
    # does.
    return torch.matmul(grad, layout.dequantize(parts, grad.dtype))


class _Linear(torch.autograd.Function):
    """Saves codes, not a float weight: backward dequantizes once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None, memo: dict[Any, Choice] | None
    ) -> Tensor:
        ctx.layout = layout
        ctx.names = tuple(parts)
        ctx.save_for_backward(*parts.values())
        return _forward(x, layout, parts, bias, memo)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, ctx.layout, dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias, None


def _unkey(key: str, parts: list[Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    layout, names = layout_of(key)
    return layout, dict(zip(names, parts, strict=True))


@torch.library.custom_op("qhub::linear", mutates_args=())
def _linear_op(x: Tensor, parts: list[Tensor], layout: str, out_features: int, bias: Tensor | None) -> Tensor:
    described, named = _unkey(layout, parts)
    # An operator may not return a view of its input; every kernel makes a new tensor, and so does the empty case.
    return _forward(x, described, named, bias)


@_linear_op.register_fake
def _(x: Tensor, parts: list[Tensor], layout: str, out_features: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("qhub::linear_backward", mutates_args=())
def _linear_backward_op(grad: Tensor, parts: list[Tensor], layout: str, in_features: int) -> Tensor:
    described, named = _unkey(layout, parts)
    return _input_gradient(grad, described, named)


@_linear_backward_op.register_fake
def _(grad: Tensor, parts: list[Tensor], layout: str, in_features: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, layout, _, _ = inputs
    ctx.layout, ctx.in_features = layout, x.shape[-1]
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qhub.linear_backward(grad, list(ctx.saved_tensors), ctx.layout, ctx.in_features)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, [None] * len(ctx.saved_tensors), None, None, grad_bias


_linear_op.register_autograd(_backward, setup_context=_setup)
