"""The numbers: bit for bit those of hqq, and what the method promises of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qhub_hqq.format import HqqFormat
from qhub_hqq.settings import Settings, code_shape
from qhub_hqq.solver import quantize, shrink

from qhub.errors import LayoutError


def test_codes_scales_and_zeros_are_those_of_hqq(golden: Any) -> None:
    layout = golden.layout
    parts = quantize(golden.weight, layout, golden.settings)
    layout.validate(parts)
    _, expected = HqqFormat({None: golden.settings}).unpack(layout, golden.entries)
    for name in ("qweight", "scales", "zeros"):
        assert parts[name].dtype == expected[name].dtype
        assert torch.equal(parts[name], expected[name]), name


def test_the_weight_is_left_alone(golden: Any) -> None:
    before = golden.weight.clone()
    quantize(golden.weight, golden.layout, golden.settings)
    assert torch.equal(golden.weight, before)


def _p_error(weight: torch.Tensor, settings: Settings) -> float:
    layout = settings.layout(*weight.shape, "w")
    error = weight.double() - layout.dequantize(quantize(weight, layout, settings)).double()
    return float(error.abs().pow(0.7).sum())


@pytest.mark.parametrize("nbits", [4, 3, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_solver_lowers_the_norm_that_it_minimizes(nbits: int, axis: int) -> None:
    """Heavy tails are what p < 1 is for: Student t with 3 degrees of freedom."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128) / (torch.randn(64, 128).square() + torch.randn(64, 128).square() + 0.1).sqrt() * 0.02
    fitted = _p_error(weight, Settings(nbits, 64, axis))
    plain = _p_error(weight, Settings(nbits, 64, axis, optimize=False))
    assert fitted < plain


@given(
    seed=st.integers(0, 10_000),
    nbits=st.sampled_from([8, 4, 3, 2, 1]),
    axis=st.sampled_from([0, 1]),
    group=st.sampled_from([8, 16, 64, None]),
    optimize=st.booleans(),
)
def test_an_error_is_at_most_a_step_beyond_the_range(
    seed: int, nbits: int, axis: int, group: int | None, optimize: bool
) -> None:
    """Without the solver a weight is half a step off at most (a whole one where rounding the zero shifts the range)."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    settings = Settings(nbits, group, axis, optimize=optimize, round_zero=False)
    layout = settings.layout(16, 64, "w")
    parts = quantize(weight, layout, settings)
    codes = layout.codes(parts)
    assert int(codes.max()) <= 2**nbits - 1
    if not optimize:
        steps = layout.grid.join(
            layout.grid.spread(parts["scales"]).expand(layout.grid.split(weight).shape), *weight.shape
        )
        # 2^-20: float32 rounding of codes up to 255 and zeros as large, in units of a step.
        assert bool(((weight - layout.dequantize(parts)).abs() <= steps * (0.5 + 255 * 2.0**-20)).all())


def test_constant_groups_come_back_exactly() -> None:
    weight = torch.tensor([0.0, 0.25, -3.0, 7.5]).repeat_interleave(64).reshape(4, 64)
    settings = Settings(4, 64, 1, round_zero=False)
    layout = settings.layout(4, 64, "w")
    assert torch.equal(layout.dequantize(quantize(weight, layout, settings)), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = torch.zeros(4, 64)
    weight[1, 2] = value
    settings = Settings()
    with pytest.raises(LayoutError, match="NaN or infinity"):
        quantize(weight, settings.layout(4, 64, "w"), settings)


def test_a_zero_point_beyond_float16_is_refused() -> None:
    """Weights near 1000 that differ by half an ulp's multiple: 255 steps over 0.5 put the zero at -510000."""
    weight = torch.full((4, 64), 1000.0, dtype=torch.float16)
    weight[:, ::2] += 0.5
    settings = Settings(8, 64, 1, round_zero=False)
    with pytest.raises(LayoutError, match=r"exceeds torch\.float16"):
        quantize(weight, settings.layout(4, 64, "w"), settings)


def test_shrink_is_the_generalized_soft_threshold() -> None:
    x = torch.cat([torch.linspace(-3, 3, 101), torch.tensor([0.0, 1e-30])])
    wide = x.double()
    expected = wide.sign() * (wide.abs() - wide.abs().pow(-0.3) / 10).clamp_min(0)
    expected[wide == 0] = 0
    torch.testing.assert_close(shrink(x, 10.0, 0.7).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(shrink(torch.zeros(3), 10.0, 0.7), torch.zeros(3))


def test_quantizing_equals_the_installed_hqq() -> None:
    """The same as the known answers, on weights of the size of a real layer; runs where hqq is installed."""
    hqq = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    weight = (torch.randn(512, 512) * 0.03).to(torch.bfloat16)
    for nbits in (4, 3):
        settings = Settings(nbits, 64, 1, round_zero=nbits == 4)
        layer = torch.nn.Linear(512, 512, bias=False)
        layer.weight.data = weight.clone()
        theirs = hqq.HQQLinear(
            layer,
            hqq.BaseQuantizeConfig(nbits=nbits, group_size=64, axis=1),
            compute_dtype=torch.bfloat16,
            device="cpu",
        )
        layout = settings.layout(512, 512, "w")
        parts = quantize(weight, layout, settings)
        assert torch.equal(layout.dequantize(parts, torch.bfloat16), theirs.dequantize())
        assert code_shape(layout) == (4096, 64)
