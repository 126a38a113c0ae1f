"""Inputs are rounded as their scheme says: checked against the formats' own tables in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qhub.errors import LayoutError
from qhub.layouts import Activation, Float8, Grid
from qhub.layouts.activations import float8_input, round_float4, rounded_input


def inputs(m=5, k=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator) * torch.tensor([1e-3, 1.0, 30.0, 1e3, 0.0])[:m, None]


def nearest_of(values, x):
    """Return of ``values`` (count,) float64 the nearest to each of ``x``; in a tie either will do, so the distance."""
    return (x.double()[..., None] - values).abs().amin(-1)


def float8_values(name):
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{name}")).double()
    return codes[torch.isfinite(codes)]


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("granularity", ["row", "tensor", "group"])
def test_float8_rounds_to_the_nearest_value_under_the_largest_magnitude(name, granularity):
    scheme = Activation(kind="float8", format=name, granularity=granularity, group=16 if granularity == "group" else 0)
    x = inputs()
    found = rounded_input(x, scheme, {})
    values = float8_values(name)
    for row in range(5):
        for start in range(0, 40, 16 if granularity == "group" else 40):
            piece = x[row, start : start + 16] if granularity == "group" else x[row]
            whole = x if granularity == "tensor" else piece
            got = found[row, start : start + 16] if granularity == "group" else found[row]
            scale = float(whole.abs().max()) / float(values.max())
            if scale == 0:
                assert not bool(got.any())
                continue
            # The scale itself is rounded to float32, and so is the product with it.
            slack = 4 * 2.0**-24 * float(whole.abs().max())
            assert bool(((got.double() - piece.double()).abs() <= nearest_of(values * scale, piece) + slack).all())


def test_a_stored_scale_is_the_only_one():
    scheme = Activation(kind="float8", granularity="tensor", static=True)
    x = torch.tensor([[0.11, 1.0, -5.0, 1000.0]])
    found = rounded_input(x, scheme, {"input_scale": torch.tensor(0.01)})
    # 11 is an E4M3 number and 100 lies between 96 and 104, 500 and 1e5 saturate at 448.
    assert found.tolist()[0] == pytest.approx([0.11, 0.96, -4.48, 4.48], rel=1e-6)


def test_magnitudes_above_the_limit_saturate():
    x = torch.tensor([[1.0, 2.0, 100.0], [0.5, 0.25, 1.0]])
    found = rounded_input(x, Activation(kind="float8", limit=4.48), {})
    assert found[0].tolist() == pytest.approx([0.96, 1.92, 4.48], rel=1e-6) or found[0].tolist() == pytest.approx(
        [1.04, 2.08, 4.48], rel=1e-6
    )
    assert torch.equal(found[1], rounded_input(x[1:], Activation(kind="float8"), {})[0])


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_scales_are_rounded_up_to_powers_of_two(granularity):
    x = torch.tensor([[3.0, 448.0], [1.5, 449.0]])
    codes, scale = float8_input(x, Activation(kind="float8", granularity=granularity, scale_format="ue8m0"), {})
    assert scale.flatten().tolist() == ([1.0, 2.0] if granularity == "row" else [2.0])
    assert float(codes.float().abs().max()) <= 448


@given(seed=st.integers(0, 1000), static=st.booleans(), granularity=st.sampled_from(["row", "tensor"]))
def test_codes_and_scales_are_what_is_rounded(seed, static, granularity):
    scheme = Activation(kind="float8", granularity="tensor" if static else granularity, static=static)
    parts = {"input_scale": torch.tensor(0.013)} if static else {}
    codes, scale = float8_input(inputs(seed=seed), scheme, parts)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape in ((5, 1), (1, 1))
    assert torch.equal(codes.float() * scale, rounded_input(inputs(seed=seed), scheme, parts))


def test_float4_rounds_ties_to_even():
    x = torch.tensor([0.25, 0.2501, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, -0.75, -9.0])
    assert round_float4(x).tolist() == [0, 0.5, 1, 1, 2, 2, 4, 4, 6, 6, -1, -6]


def test_groups_of_4_bit_floats_have_exponents_as_ocp_says():
    # 5.9 has the exponent 2, E2M1's largest too: scale 1. 8 has the exponent 3: scale 2, and 15 saturates at 12.
    x = torch.tensor([[5.9, 1.0, 0.3, 0.0], [8.0, 15.0, 1.0, 0.6]])
    scheme = Activation(kind="float4", granularity="group", group=4, scale_format="e8m0fnu")
    assert rounded_input(x, scheme, {}).tolist() == [[6, 1, 0.5, 0], [8, 12, 1, 1]]


@pytest.mark.parametrize(
    "values", [{"granularity": "group"}, {"group": 16}, {"static": True, "granularity": "row"}, {"bits": 1}]
)
def test_impossible_schemes_are_refused(values):
    with pytest.raises(LayoutError):
        Activation(kind="float8", **values)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_stored_scale_must_be_above_zero_and_finite(scale):
    scheme = Activation(kind="float8", granularity="tensor", static=True)
    layout = Float8(out_features=2, in_features=4, grid=Grid("block", 2, 4), activation=scheme)
    parts = {
        "qweight": torch.zeros(2, 4).to(torch.float8_e4m3fn),
        "scales": torch.ones(1, 1),
        "input_scale": torch.tensor(scale),
    }
    layout.validate(parts)
    with pytest.raises(LayoutError, match="input_scale"):
        layout.check_values(parts)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_of_the_weight_must_be_above_zero_and_finite(scale):
    layout = Float8(out_features=2, in_features=4, grid=Grid("block", 2, 4))
    parts = {"qweight": torch.zeros(2, 4).to(torch.float8_e4m3fn), "scales": torch.tensor([[scale]])}
    with pytest.raises(LayoutError, match="scales"):
        layout.check_values(parts)


def test_schemes_have_names_of_their_own():
    usual = Activation(kind="float8")
    others = [
        dataclasses.replace(usual, granularity="tensor"),
        dataclasses.replace(usual, granularity="tensor", static=True),
        dataclasses.replace(usual, limit=2.0),
        dataclasses.replace(usual, scale_format="ue8m0"),
        dataclasses.replace(usual, format="e5m2"),
        dataclasses.replace(usual, granularity="group", group=128),
    ]
    names = [one.scheme for one in (usual, *others)]
    assert names[0] == "float8"
    assert len(set(names)) == len(names)
