"""The product with a quantized weight, for every layout: values, activation schemes, experts, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qhub import QuantizedTensor
from qhub.errors import UnsupportedError

from . import oracle
from .cases import CASES, UNIT, Case, batch, case

pytestmark = pytest.mark.usefixtures("reference_kernel")

# Half the distance of neighbouring numbers, relative: 8 significant bits.
BF16 = 2.0**-8


def _weight(name: str, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    one = case(name)
    return QuantizedTensor.build(one.layout, one.parts, dtype)


def _input(one: Case, rows: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = np.random.default_rng(seed).standard_normal((rows, one.layout.in_features)) * 1.5
    # Two columns reach the threshold of LLM.int8(), one of them in the last row only.
    x[0, 5], x[-1, 7] = 7.5, -9.25
    x = oracle.rounded(x, dtype)
    # An input half-way between two codes is rounded either way, by the last bit of a scale: it proves nothing.
    if one.layout.activation.kind == "int8":
        steps = np.array([[oracle.int8_step(row, one.layout.activation.threshold)] for row in x])
        x[oracle.near_tie(np.rint, x / steps)] = 0
    elif one.layout.activation.kind == "float8":
        x[oracle.near_tie(oracle.e4m3_rounded, x / oracle.float8_step(x))] = 0
    return torch.from_numpy(x).to(dtype)


def _expected(one: Case, x: Tensor) -> Tensor:
    """Return the product in float64, inputs rounded as the layout's activation scheme says."""
    values, dense = x.double().numpy(), one.dense.numpy()
    if one.layout.activation.kind == "int8":
        return torch.from_numpy(oracle.int8_linear(values, dense, one.layout.activation.threshold))
    if one.layout.activation.kind == "float8":
        return torch.from_numpy(oracle.float8_linear(values, dense))
    return x.double() @ one.dense.T


def _bound(one: Case, x: Tensor, expected: Tensor) -> Tensor:
    """Return the largest error of each output that rounding explains.

    The weight carries its own error; K products are added in float32, at most one rounding each; an activation scheme
    rounds input, scale and product a few times more. In bfloat16, weight, rounded input and output are rounded once
    each.
    """
    size = x.double().abs() @ one.dense.abs().T
    bound = x.double().abs().sum(-1, keepdim=True) * one.tolerance + (x.shape[-1] + 8) * UNIT * size
    if x.dtype == torch.bfloat16:
        bound = bound + BF16 * (2 * size + expected.abs())
    return bound


def _assert_close(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    excess = (found.double() - expected).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float((found.double() - expected).abs().max()):.3e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_linear_equals_the_dense_product(name: str, dtype: torch.dtype) -> None:
    one, weight = case(name), _weight(name, dtype)
    for rows in (1, 3, 17):
        x = _input(one, rows, dtype)
        y = F.linear(x, weight)
        assert y.dtype == dtype
        assert type(y) is Tensor
        expected = _expected(one, x)
        _assert_close(y, expected, _bound(one, x, expected))


@pytest.mark.parametrize("name", CASES)
def test_bound_is_far_below_the_result(name: str) -> None:
    """In float32 the bound above allows a thousandth of what a wrong weight would change."""
    one = case(name)
    x = _input(one, 17, torch.float32)
    expected = _expected(one, x)
    assert float(_bound(one, x, expected).max()) < 5e-3 * float(expected.square().mean().sqrt())


@pytest.mark.parametrize("name", CASES)
def test_bias_and_leading_dimensions(name: str) -> None:
    one, weight = case(name), _weight(name)
    x = _input(one, 6, torch.float32)
    bias = torch.linspace(-1, 1, one.layout.out_features)
    expected = _expected(one, x) + bias.double()
    y = F.linear(x.reshape(2, 3, -1), weight, bias)
    assert y.shape == (2, 3, one.layout.out_features)
    _assert_close(y.reshape(6, -1), expected, _bound(one, x, expected) + UNIT * expected.abs())
    assert F.linear(x[:0], weight, bias).shape == (0, one.layout.out_features)
    assert torch.equal(F.linear(input=x, weight=weight, bias=bias), y.reshape(6, -1))


@pytest.mark.parametrize("name", ["nf4_nested", "gptq4_act_order", "quip_e8p12", "aqlm_2x8", "e4m3_ragged_blocks"])
def test_other_spellings_of_the_product(name: str) -> None:
    one, weight = case(name), _weight(name)
    x = _input(one, 3, torch.float32)
    y = F.linear(x, weight)
    for found in (x @ weight.t(), torch.matmul(x, weight.T), x.mm(weight.mT), torch.mm(x, weight.transpose(0, 1))):
        assert torch.equal(found, y)
    assert F.linear(x[0], weight).shape == y[0].shape
    # One row may be summed in another order than three.
    torch.testing.assert_close(F.linear(x[0], weight), y[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.matmul(input=x, other=weight.T), y)
    assert torch.equal(torch.mm(input=x, mat2=weight.T), y)


def test_int8_scheme_keeps_outlier_columns() -> None:
    """Rounding everything to int8 would be off by far more than the bound: the outliers set the step."""
    one, weight = case("int8_outliers"), _weight("int8_outliers")
    x = _input(one, 3, torch.float32)
    naive = torch.from_numpy(oracle.int8_linear(x.double().numpy(), one.dense.numpy(), float("inf")))
    expected = _expected(one, x)
    assert float((naive - expected).abs().max()) > 20 * float(_bound(one, x, expected).max())
    _assert_close(F.linear(x, weight), expected, _bound(one, x, expected))


@pytest.mark.parametrize("name", ["int8_outliers", "e4m3_dynamic"])
def test_row_of_zeros_gives_zero(name: str) -> None:
    one, weight = case(name), _weight(name)
    x = _input(one, 3, torch.float32)
    x[1] = 0
    y = F.linear(x, weight)
    assert bool(torch.isfinite(y).all())
    assert not y[1].any()


@pytest.mark.parametrize("name", CASES)
def test_experts_are_indexed_as_one_tensor(name: str) -> None:
    layout, parts, _ = batch(name, 3)
    experts = QuantizedTensor.build(layout, parts, torch.float32)
    assert experts.shape == (3, layout.out_features, layout.in_features)
    x = _input(case(name), 3, torch.float32)
    for index, expert in enumerate(experts):
        assert isinstance(expert, QuantizedTensor)
        expected = F.linear(x, _weight_of(name, index))
        assert torch.equal(F.linear(x, expert), expected)
        assert torch.equal(F.linear(x, experts[index - 3]), expected)
    picked = experts[torch.tensor([2, 0])]
    assert isinstance(picked, QuantizedTensor)
    assert torch.equal(picked.dequantize(), experts.dequantize()[[2, 0]])
    assert isinstance(experts[1:], QuantizedTensor)
    assert torch.equal(experts[1:].dequantize(), experts.dequantize()[1:])
    assert torch.equal(torch.stack(experts.unbind(0)).dequantize(), experts.dequantize())


def _weight_of(name: str, seed: int) -> QuantizedTensor:
    one = case(name, seed)
    return QuantizedTensor.build(one.layout, one.parts, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_gradient_reaches_the_input_and_no_code(name: str) -> None:
    one, weight = case(name), _weight(name)
    x = _input(one, 3, torch.float32).requires_grad_()
    bias = torch.zeros(one.layout.out_features, requires_grad=True)
    y = F.linear(x, weight, bias)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    assert x.grad is not None and bias.grad is not None
    # Straight through the rounding of activations: the gradient is that of the dense product in any case.
    size = upstream.double().abs() @ one.dense.abs()
    bound = upstream.double().abs().sum(-1, keepdim=True) * one.tolerance + (y.shape[-1] + 8) * UNIT * size
    _assert_close(x.grad, upstream.double() @ one.dense, bound)
    torch.testing.assert_close(bias.grad, upstream.sum(0))
    assert not weight.requires_grad and weight.grad is None
    assert all(part.grad is None and not part.requires_grad for part in weight.parts.values())


@pytest.mark.parametrize("name", ["nf4_ragged", "aqlm_3x6_2d_blocks", "quip_e8p12_factor3"])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    weight = _weight(name)
    x = _input(case(name), 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: F.linear(value, weight), x)


def test_weight_cannot_require_gradients() -> None:
    weight = _weight("awq")
    with pytest.raises(UnsupportedError, match="Train an adapter"):
        weight.requires_grad_()
    with pytest.raises(UnsupportedError, match="Train an adapter"):
        weight.requires_grad = True
    weight.requires_grad_(False)


def test_compute_dtype_rules_the_product() -> None:
    one = case("nf4_nested")
    weight = QuantizedTensor.build(one.layout, one.parts, torch.float32, compute_dtype=torch.bfloat16)
    x = _input(one, 3, torch.float32)
    y = F.linear(x, weight)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x.bfloat16(), weight).float())
    assert not torch.equal(y, F.linear(x, _weight("nf4_nested")))


def test_wrong_number_of_features_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        F.linear(torch.zeros(2, 255), _weight("awq"))


@pytest.mark.parametrize("name", CASES)
def test_an_output_can_be_changed_in_place(name: str) -> None:
    """Adapters write ``result += ...`` into what a layer returned; autograd refuses that for views from a function."""
    weight = _weight(name)
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
    delta = torch.ones(weight.shape[0], requires_grad=True)
    y = F.linear(x, weight)
    y += delta
    y[:, 1:] += delta
    y.sum().backward()
    # Of 6 rows, 4 get it twice.
    assert torch.equal(delta.grad, torch.full_like(delta, 10.0))  # type: ignore[arg-type]
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, weight).sum().backward()
    assert torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]
