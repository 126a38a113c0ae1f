"""Gradients through what is bound to a weight: how they find the dense weight, and what they keep alive."""

from __future__ import annotations

import gc
import importlib
import weakref

import pytest
import torch
from torch.nn import functional as F

from qhub.kernels import dispatch
from qhub.modules import QuantLinear
from qhub.tensor import QuantizedTensor

from .conftest import affine


def layer(dtype: torch.dtype = torch.float32, bias: bool = False) -> QuantLinear:
    made = QuantLinear.hollow(64, 48, torch.nn.Parameter(torch.randn(48, dtype=dtype)) if bias else None, dtype)
    made.weight = torch.nn.Parameter(QuantizedTensor.build(*affine(), dtype), requires_grad=False)
    return made


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_under_autocast(offer, cast, bias):
    offer(a={"bind": True})
    made = layer(torch.bfloat16, bias)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    # Bound to both dtypes, so that the second time goes the short way.
    for _ in range(2):
        x.grad = None
        with torch.autocast("cpu", dtype=cast):
            y = made(x)
        assert y.dtype == cast
        y.sum().backward()
    weight = made.weight.dequantize(torch.float64)
    # One rounding of each weight and one of the gradient, to 8 bits each; between them sums of 48 numbers in float32.
    bound = 2 * 2.0**-8 * weight.abs().sum(0) + 48 * 2.0**-24 * weight.abs().sum(0)
    assert x.grad.dtype == torch.bfloat16
    assert bool(((x.grad.double() - weight.sum(0)).abs() <= bound).all())


def test_a_decoder_is_looked_up_once_for_a_weight(offer, monkeypatch):
    seen, asked = [], []

    def decode(layout, parts, dtype):
        seen.append(dtype)
        return layout.dequantize(parts, dtype)

    offer(a={"bind": True}, d={"impl": decode, "role": "dense"})
    made = layer()
    x = torch.randn(2, 64, requires_grad=True)
    made(x).sum().backward()
    module = importlib.import_module("qhub.kernels.dense")
    original = module.decoder
    monkeypatch.setattr(module, "decoder", lambda *arguments: asked.append(arguments) or original(*arguments))
    y, other = made(x), made(x)
    seen.clear()
    asked.clear()
    y.sum().backward()
    assert seen == [torch.float32] and not asked
    # Between a forward and its backward all choices may become void.
    monkeypatch.setenv("QHUB_KERNEL", "reference")
    dispatch.forget()
    other.sum().backward()
    assert seen == [torch.float32] and len(asked) == 1


def test_codes_written_between_forward_and_backward_are_an_error(offer):
    offer(a={"bind": True})
    made = layer()
    x = torch.randn(2, 64, requires_grad=True)
    for _ in range(2):
        y = made(x)
        made.weight.parts["scales"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_tensors_that_outlive_a_transform(offer):
    """What torch.func left behind is a tensor like others; autograd follows it to the input."""
    offer(a={"bind": True})
    made, kept = layer(), []
    x = torch.randn(2, 64, requires_grad=True)

    def leaves(value):
        kept.append(2 * value)
        return value.sum()

    for _ in range(2):
        x.grad = None
        torch.func.grad(leaves)(x)
        made(kept[-1]).sum().backward()
        assert torch.allclose(x.grad, 2 * made.weight.dequantize().sum(0).expand(2, 64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_that_is_gone_takes_no_memory(offer, grad):
    """No cycle holds its tensors until Python looks for cycles."""
    offer(a={"bind": True})
    made = layer()
    held = [weakref.ref(part) for part in made.weight.parts.values()]
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(grad):
            y = made(torch.randn(2, 64, requires_grad=grad))
        del made
        # A graph keeps what its backward needs.
        assert all((ref() is not None) == grad for ref in held)
        del y
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def test_equal_layouts_are_one_object():
    layout, parts = affine()
    again, others = affine(seed=1)
    assert again is not layout and again == layout
    one, other = (QuantizedTensor.build(*pair, torch.float32) for pair in ((layout, parts), (again, others)))
    assert one.quant_layout is other.quant_layout
    x = torch.randn(2, 64)
    assert torch.allclose(F.linear(x, other), F.linear(x, other.dequantize()), rtol=1e-4, atol=1e-4)
