"""LLM.int8(): integer products, outlier columns, and inputs rounded for weights that are no int8 matrix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from qhub_cpu.int8 import int8_product
from qhub_cpu.linear import few_rows, many_rows

from qhub.kernels import reference
from qhub.kernels.dispatch import choose
from qhub.layouts import Activation


def _outliers(x: torch.Tensor) -> torch.Tensor:
    # Small entries beside the large one: an outlier column leaves the integer product whole.
    x[0, 7], x[-1, 50] = 5.0, -4.0
    return x


def _close(y: torch.Tensor, x: torch.Tensor, case, bias: torch.Tensor, unit: float) -> bool:
    expected = reference.linear_int8(x.float(), case.layout, case.parts, bias.float()).double()
    # The codes are the same; sums are float32 of up to K terms in both, then one rounding to the dtype.
    sums = (12 + x.shape[1]) * 2.0**-24 * (x.double().abs() @ case.terms.T * (1 + 1 / 64) + bias.double().abs())
    return bool(((y.double() - expected).abs() <= sums + unit * expected.abs() * (1 + 2.0**-6)).all())


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 16, 17, 64])
@pytest.mark.parametrize("threshold", [0.0, 3.0], ids=["all rounded", "outliers"])
@pytest.mark.parametrize("k", [192, 100], ids=["K 192", "K 100"])
def test_integer_products(make, inputs, dtype, unit, m, threshold, k):
    case = make["int8"](k=k, threshold=threshold)
    x, bias = inputs(case.layout, m, dtype)
    x = _outliers(x)
    assert choose(case.layout, case.parts, dtype).name(m) == "cpu-int8"
    y = int8_product(x, case.layout, case.parts, bias)
    assert y.dtype == dtype
    assert _close(y, x, case, bias, unit[dtype])


@pytest.mark.parametrize("run", [few_rows, many_rows, int8_product])
def test_known_small_product(make, run):
    case = make["int8"](n=1, k=32, threshold=6.0)
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, :4] = torch.tensor([1, 2, 3, 4])
    parts = {"qweight": codes, "scales": torch.tensor([[127.0]])}
    x = torch.zeros(2, 32)
    # Row 0: step 2.54/127 = 0.02; 1.009 is 50.45 steps, rounded to 50. Column 3 has an outlier, so row 1's 0.123 stays
    # whole.
    x[0, :4] = torch.tensor([2.54, 1.009, 0.0, 10.0])
    x[1, :4] = torch.tensor([0.0, 0.0, 1.27, 0.123])
    y = run(x, case.layout, parts)
    assert torch.allclose(
        y[:, 0].double(), torch.tensor([2.54 + 2 * 1.0 + 4 * 10.0, 3 * 1.27 + 4 * 0.123]).double(), rtol=1e-6
    )


@pytest.mark.parametrize("run", [few_rows, many_rows, int8_product])
def test_rows_of_zeros(make, run):
    case = make["int8"]()
    x = torch.zeros(3, 192)
    x[1] = 1.0
    y = run(x, case.layout, case.parts)
    assert torch.equal(y[0], torch.zeros_like(y[0])) and torch.equal(y[2], torch.zeros_like(y[2]))
    assert y.isfinite().all() and (y[1] != 0).any()


@pytest.mark.parametrize("run", [few_rows, many_rows, int8_product])
@pytest.mark.parametrize("threshold", [0.0, 3.0], ids=["all rounded", "outliers"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(make, run, threshold, value):
    case = make["int8"](threshold=threshold)
    x = torch.ones(2, 192)
    x[0, 5] = value
    y = run(x, case.layout, case.parts)
    expected = reference.linear_int8(x, case.layout, case.parts)
    assert torch.equal(y.isfinite(), expected.isfinite())


def test_every_column_an_outlier(make, inputs, unit):
    case = make["int8"](threshold=1e-6)
    x, bias = inputs(case.layout, 3, torch.float32)
    assert _close(int8_product(x, case.layout, case.parts, bias), x, case, bias, unit[torch.float32])


@pytest.mark.parametrize(("run", "m"), [(few_rows, 3), (few_rows, 5), (many_rows, 12)])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_inputs_of_other_layouts(make, inputs, run, m, bits, dtype, unit):
    case = make["affine"](bits, k=200, group=32)
    case.layout = dataclasses.replace(case.layout, activation=Activation("int8", 3.0))
    x, bias = inputs(case.layout, m, dtype)
    x = _outliers(x)
    choice = choose(case.layout, case.parts, dtype)
    assert choice.name(m) == f"cpu-affine-{'few' if run is few_rows else 'many'}"
    assert ("signed codes" if bits == 8 else "bits") in choice.refused["cpu-int8"]
    assert _close(run(x, case.layout, case.parts, bias), x, case, bias, unit[dtype])
