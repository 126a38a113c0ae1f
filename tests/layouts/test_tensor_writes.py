"""Writing into a quantized weight requantizes onto its layout, as near as the layout itself can come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qhub import QuantizedTensor
from qhub.errors import UnsupportedError
from qhub.merging import AdapterPolicy

from .cases import CASES, batch, case, fresh


def _weight(name: str, **options: object) -> QuantizedTensor:
    one = case(name)
    return QuantizedTensor.build(one.layout, fresh(one.parts), torch.float32, **options)  # type: ignore[arg-type]


def _noise(weight: QuantizedTensor, amplitude: float) -> Tensor:
    size = float(weight.dequantize().square().mean().sqrt())
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * size * amplitude


def _distance(weight: QuantizedTensor, dense: Tensor) -> float:
    return float((weight.dequantize().double() - dense).norm())


def _own_error(name: str, dense: Tensor, seed: int = 0) -> float:
    """Return how near the layout itself comes to ``dense``, the better of its own grid and a fitted one."""
    one = case(name, seed)
    written = (one.layout.requantize(dense, one.parts, policy) for policy in ("keep", "refit"))  # type: ignore[arg-type]
    return min(float((one.layout.dequantize(parts).double() - dense).norm()) for parts in written)


def _copy(weight: QuantizedTensor, dense: Tensor) -> None:
    weight.copy_(dense)


def _set_data(weight: QuantizedTensor, dense: Tensor) -> None:
    weight.data = dense


def _add(weight: QuantizedTensor, dense: Tensor) -> None:
    weight.add_(dense - weight.dequantize())


def _data_add(weight: QuantizedTensor, dense: Tensor) -> None:
    weight.data += dense - weight.dequantize()


def _data_copy(weight: QuantizedTensor, dense: Tensor) -> None:
    weight.data.copy_(dense)


def _through_transposed(weight: QuantizedTensor, dense: Tensor) -> None:
    weight.t().copy_(dense.t())


def _slice_all(weight: QuantizedTensor, dense: Tensor) -> None:
    weight[:] = dense


WRITES = [_copy, _set_data, _add, _data_add, _data_copy, _through_transposed, _slice_all]


@pytest.mark.parametrize("name", CASES)
def test_written_weight_is_as_near_as_the_layout_allows(name: str) -> None:
    weight = _weight(name)
    dense = weight.dequantize() + _noise(weight, 0.3)
    # A sum of two codebooks starts from other codes here than there, a rotation rounds: some room beyond the own error.
    limit = _own_error(name, dense) * 1.001
    weight.copy_(dense)
    assert _distance(weight, dense) <= limit
    weight.quant_layout.validate(weight.parts)
    weight.quant_layout.check_values(weight.parts)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "name",
    ["nf4_nested", "int8_outliers", "hqq3_axis0", "gptq4_act_order", "quip_e8p12_factor3", "aqlm_2x8", "q4_k", "nvfp4"],
)
def test_every_spelling_of_a_write(name: str, write: Callable[[QuantizedTensor, Tensor], None]) -> None:
    weight = _weight(name)
    dense = weight.dequantize() + _noise(weight, 0.3)
    write(weight, dense)
    assert isinstance(weight, QuantizedTensor)
    assert not weight.transposed
    assert _distance(weight, dense) <= _own_error(name, dense) * 1.001


@pytest.mark.parametrize("name", CASES)
def test_writing_its_own_value_changes_nothing(name: str) -> None:
    weight = _weight(name)
    before = weight.dequantize()
    weight.copy_(before)
    weight.data += torch.zeros(weight.shape)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("name", CASES)
def test_parts_keep_their_place(name: str) -> None:
    """A write stays in the tensors that the model holds: their storage, shape and dtype."""
    weight = _weight(name)
    places = {part: (value.data_ptr(), value.shape, value.dtype) for part, value in weight.parts.items()}
    weight.copy_(_noise(weight, 1.0))
    assert {part: (value.data_ptr(), value.shape, value.dtype) for part, value in weight.parts.items()} == places


@pytest.mark.parametrize("name", CASES)
def test_write_to_one_expert_leaves_the_others(name: str) -> None:
    layout, parts, _ = batch(name, 3)
    experts = QuantizedTensor.build(layout, fresh(parts), torch.float32)
    before = experts.dequantize()
    dense = before[1] + _noise(experts, 0.3)[1]
    experts[1].copy_(dense)
    after = experts.dequantize()
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert float((after[1] - dense).norm()) <= 1.001 * _own_error(name, dense, seed=1)


def test_copy_between_equal_layouts_is_exact() -> None:
    weight, other = _weight("nf4_nested"), case("nf4_nested", 1)
    source = QuantizedTensor.build(other.layout, other.parts, torch.float32)
    weight.copy_(source)
    assert torch.equal(weight.dequantize(), source.dequantize())


def test_copy_of_another_table_into_an_expert_leaves_the_others() -> None:
    """Experts share a table: taking over another one's would change all of them."""
    layout, parts, _ = batch("iq4_nl", 2)
    experts = QuantizedTensor.build(layout, fresh(parts), torch.float32)
    other = case("iq4_nl", 5)
    source = QuantizedTensor.build(other.layout, {**other.parts, "table": other.parts["table"] * 2}, torch.float32)
    before = experts.dequantize()
    experts[0].copy_(source)
    assert torch.equal(experts.dequantize()[1], before[1])
    assert float((experts.dequantize()[0] - source.dequantize()).norm()) < 0.1 * float(source.dequantize().norm())


def test_copy_out_is_dense() -> None:
    weight = _weight("awq")
    target = torch.zeros(weight.shape)
    target.copy_(weight)
    assert torch.equal(target, weight.dequantize())


@pytest.mark.parametrize("grid", ["keep", "refit", "best"])
def test_policy_rules_the_write(grid: str) -> None:
    one = case("gptq3_act_order")
    weight = _weight("gptq3_act_order", policy=AdapterPolicy(grid=grid))  # type: ignore[arg-type]
    dense = weight.dequantize() + _noise(weight, 0.3)
    weight.copy_(dense)
    expected = one.layout.requantize(dense, one.parts, grid)  # type: ignore[arg-type]
    assert all(torch.equal(weight.parts[part], value) for part, value in expected.items())


def test_refused_write_says_why_and_writes_nothing() -> None:
    weight = _weight("awq", policy=AdapterPolicy(refuse="its scales are folded into the layer before"))
    before = weight.dequantize()
    for write in WRITES:
        with pytest.raises(UnsupportedError, match="folded into the layer before"):
            write(weight, before + 1)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight = _weight("nf4_nested")
    before = weight.dequantize()
    dense = before.clone()
    dense[3, 5] = bad
    for write in (_copy, _set_data, _data_add):
        with pytest.raises(UnsupportedError, match="NaN or infinity"):
            write(weight, dense)
    assert torch.equal(weight.dequantize(), before)


def test_fill_and_scalar_operators() -> None:
    weight = _weight("hqq4_axis1")
    before = weight.dequantize()
    weight.mul_(0.5)
    # Halving a float scale is exact.
    torch.testing.assert_close(weight.dequantize(), before / 2, rtol=0, atol=float(before.abs().max()) / 15)
    weight.zero_()
    assert not weight.dequantize().any()
    weight.fill_(0.25)
    torch.testing.assert_close(weight.dequantize(), torch.full(weight.shape, 0.25))


@pytest.mark.parametrize("change", ["+", "-", "*", "/"])
def test_a_copy_that_is_changed_is_dense_and_exact(change: str) -> None:
    """``w = weight.clone(); w += delta`` in the forward of a tuner: nothing is rounded, gradients reach the delta."""
    weight = _weight("nf4_ragged")
    parts = {name: part.clone() for name, part in weight.parts.items()}
    delta = (_noise(weight, 0.1) + 1).requires_grad_()
    exact = weight.dequantize()
    w = weight.clone()
    if change == "+":
        w += delta
        expected = exact + delta
    elif change == "-":
        w -= delta
        expected = exact - delta
    elif change == "*":
        w *= delta
        expected = exact * delta
    else:
        w /= delta
        expected = exact / delta
    assert not isinstance(w, QuantizedTensor) and torch.equal(w, expected)
    grads = [torch.autograd.grad(value.square().sum(), delta)[0] for value in (w, expected)]
    assert torch.equal(grads[0], grads[1])
    assert all(torch.equal(part, parts[name]) for name, part in weight.parts.items())


def test_what_needs_a_gradient_is_not_written_into_codes() -> None:
    weight = _weight("nf4_ragged")
    parts = {name: part.clone() for name, part in weight.parts.items()}
    delta = _noise(weight, 0.1).requires_grad_()
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    for target in (weight.clone(), parameter):
        for write in (lambda w: w.add_(delta), lambda w: w.copy_(delta), lambda w: w.mul_(delta)):
            with pytest.raises(UnsupportedError, match="would lose the gradient"):
                write(target)
    with pytest.raises(UnsupportedError, match="would lose the gradient"):
        parameter += delta
    assert all(torch.equal(part, parts[name]) for name, part in weight.parts.items())
    with torch.no_grad():
        parameter += delta
    assert isinstance(parameter, QuantizedTensor)
    assert any(not torch.equal(part, parts[name]) for name, part in weight.parts.items())


def test_a_merge_through_data_drops_the_gradient_as_on_a_dense_weight() -> None:
    weight = _weight("nf4_ragged")
    before = weight.dequantize()
    weight.data += _noise(weight, 0.5).requires_grad_()
    assert isinstance(weight, QuantizedTensor) and not weight.requires_grad
    assert not torch.equal(weight.dequantize(), before)
