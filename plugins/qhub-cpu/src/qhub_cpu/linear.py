"""The kernels: products with a few rows of x straight from the codes, with many through decoded panels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qhub.layouts import Affine, Lookup, Parts
from qhub.layouts.transforms import transform_input, transform_output
from qhub_cpu.launch import launcher, rounder
from qhub_cpu.plans import FLOAT_KINDS, Plan, plan_of
from qhub_cpu.products import decoder, product
from qhub_cpu.threads import openmp, share_out
from qhub_cpu.variants import F32, NONE

__all__ = ["few_rows", "many_rows"]

# Weights times rows that make a thread worth starting: about 4 us of work, several times what waking one costs.
_GRAIN = 1 << 16

# Bytes of decoded weights that are multiplied while they are still in the cache.
_PANEL = 4 << 20


def few_rows(x: Tensor, layout: Affine | Lookup, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` (M, N) in x's dtype for x (M, K) float32, bfloat16 or float16.

    Weights are decoded in registers, each once per four rows of x, and summed in float32.
    """
    if layout.transforms:
        return _transformed(few_rows, x, layout, parts, bias)
    plan, taken, _kept = plan_of(layout, parts)
    body = plan.bodies.get(None)
    if body is None:
        body = plan.bodies[None] = product(plan.variant).address
    m, n, half = x.shape[0], layout.out_features, x.dtype is torch.float16
    y = torch.empty((m, n), dtype=torch.float32) if half else x.new_empty(m, n)
    kind = FLOAT_KINDS[x.dtype]
    added = (0, NONE) if bias is None else (bias.data_ptr(), FLOAT_KINDS[bias.dtype])
    given = (m, x.data_ptr(), kind, y.data_ptr(), F32 if half else kind, *added, *taken)
    _launch(plan, body, 0, n, m * layout.in_features, given)
    return y.to(x.dtype) if half else y


def many_rows(x: Tensor, layout: Affine | Lookup, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W.T + bias`` (M, N) in x's dtype for x (M, K) float32, bfloat16 or float16.

    Weights are decoded to x's dtype (float32 where inputs are rounded to int8) a panel of rows at a time, and torch
    multiplies.
    """
    if layout.transforms:
        return _transformed(many_rows, x, layout, parts, bias)
    plan, taken, _kept = plan_of(layout, parts)
    dtype = x.dtype
    if layout.activation.kind == "int8":
        x = _rounded(x, layout.activation.threshold)
        bias = None if bias is None else bias.float()
    kind = FLOAT_KINDS[x.dtype]
    body = plan.bodies.get(kind)
    if body is None:
        body = plan.bodies[kind] = decoder(plan.variant, kind).address
    n, k = layout.out_features, layout.in_features
    height = max(1, _PANEL // (k * x.element_size()))
    if height >= n:
        weight = torch.empty((n, k), dtype=x.dtype)
        _launch(plan, body, 0, n, k, (0, 0, F32, weight.data_ptr(), kind, 0, NONE, *taken))
        return torch.nn.functional.linear(x, weight, bias).to(dtype)
    y = torch.empty((x.shape[0], n), dtype=dtype)
    panel = torch.empty((height, k), dtype=x.dtype)
    for first in range(0, n, height):
        last = min(first + height, n)
        weight = panel[: last - first]
        # The code counts rows from the first of the matrix.
        target = panel.data_ptr() - first * k * panel.element_size()
        _launch(plan, body, first, last, k, (0, 0, F32, target, kind, 0, NONE, *taken))
        y[:, first:last] = torch.nn.functional.linear(x, weight, None if bias is None else bias[first:last])
    return y


def _rounded(x: Tensor, threshold: float) -> Tensor:
    """Return x as the float32 that its int8 codes stand for, outlier columns unrounded."""
    m, k = x.shape
    rows = torch.empty((m, k), dtype=torch.float32)
    columns = torch.empty(k, dtype=torch.uint8)
    rounder()(x.data_ptr(), FLOAT_KINDS[x.dtype], m, k, rows.data_ptr(), threshold, columns.data_ptr())
    return rows


def _transformed(
    run: Callable[..., Tensor], x: Tensor, layout: Affine | Lookup, parts: Parts, bias: Tensor | None
) -> Tensor:
    """Return the product of ``run`` between the layout's input and output steps, which are computed in float32."""
    bare = _without_transforms(layout)
    core = {name: parts[name] for name in bare.core_specs()}
    # Where inputs are rounded, what is rounded is the input in its own dtype, as in the reference.
    inner = transform_input(x if layout.activation.kind == "int8" else x.float(), layout, parts)
    y = transform_output(run(inner.contiguous(), bare, core).float(), layout, parts)
    return (y if bias is None else y + bias.float()).to(x.dtype)


@cache
def _without_transforms(layout: Affine | Lookup) -> Affine | Lookup:
    return dataclasses.replace(layout, transforms=())


def _launch(plan: Plan, body: int, first: int, last: int, work: int, given: tuple[int, ...]) -> None:
    """Run ``body`` on rows [first, last) of W, which cost ``work`` each.

    ``given``: the entry point's arguments from M on.
    """
    threads = min(torch.get_num_threads(), (last - first) * work // _GRAIN, last - first)
    run = launcher()
    if threads <= 1:
        run(plan.address, body, 0, 0, 0, 1, first, last, *given)
        return
    runtime = openmp()
    if runtime is not None:
        run(plan.address, body, runtime.fork, runtime.thread, runtime.count, threads, first, last, *given)
    else:
        share_out(lambda start, stop: run(plan.address, body, 0, 0, 0, 1, start, stop, *given), last - first, threads)
