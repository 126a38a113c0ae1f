"""Scales and codes: those of transformers, and where a block is cut off by the matrix's end those of its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from qhub_fp8.rounding import quantize
from qhub_fp8.settings import Settings, float8_layout, halves

from qhub.errors import LayoutError
from qhub.layouts import Activation, Float8, Stacked


def weight(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def upstream(w, block, scale_fmt):
    """Return what transformers' own operation makes of a weight."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    found = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": [w]})
    return found["x.weight"], found["x.weight_scale_inv"]


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(32, 16), (64, 80), None], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_codes_and_scales_are_those_of_transformers(block, scale_fmt, seed, same_bytes):
    w = weight(64, 80, seed)
    w[:32, :16] = 0.0
    codes, scales = upstream(w, block, scale_fmt)
    layout = float8_layout(64, 80, block, "e4m3fn", Activation())
    parts = quantize(w, layout, {}, powers_of_two=scale_fmt == "ue8m0")
    layout.validate(parts)
    assert same_bytes(parts["qweight"], codes)
    assert same_bytes(parts["scales"], scales.reshape(layout.scale_shape))


@pytest.mark.parametrize("codes", ["e4m3fn", "e5m2"])
def test_a_block_that_the_matrix_cuts_off_has_a_scale_of_its_own(codes):
    w = weight(70, 100)
    w[64:, 96:] *= 50
    layout = float8_layout(70, 100, (32, 48), codes, Activation())
    parts = quantize(w, layout, {})
    assert parts["scales"].shape == (3, 3)
    top = torch.finfo(layout.dtype).max
    found = layout.dequantize(parts)
    for i in range(3):
        for j in range(3):
            piece = w[32 * i : 32 * i + 32, 48 * j : 48 * j + 48]
            largest = float(piece.abs().max())
            assert float(parts["scales"][i, j]) == pytest.approx(largest / top, rel=1e-6)
            got = found[32 * i : 32 * i + 32, 48 * j : 48 * j + 48]
            # Half a step: 2^-4 (E4M3) or 2^-3 (E5M2) of a value, and of the smallest normal number below it.
            half = 2.0**-4 if codes == "e4m3fn" else 2.0**-3
            smallest = largest / top * (2.0**-6 if codes == "e4m3fn" else 2.0**-14)
            assert bool(((got - piece).abs() <= half * piece.abs().clamp_min(smallest) * 1.001).all())


def test_stacked_projections_have_blocks_of_their_own():
    assert halves("model.layers.0.mlp.experts.gate_up_proj", 96) == 2
    assert halves("model.layers.0.mlp.experts.down_proj", 96) == 1
    w = torch.cat([weight(48, 64), weight(48, 64, 1) * 9])
    for block, kind in (((32, 32), Stacked), ((16, 32), Float8), (None, Float8)):
        layout = float8_layout(96, 64, block, "e4m3fn", Activation(), projections=2)
        assert type(layout) is kind
        together = layout.dequantize(quantize(w, layout, {}))
        one = float8_layout(48, 64, block, "e4m3fn", Activation())
        apart = [one.dequantize(quantize(half, one, {})) for half in w.split(48)]
        assert torch.equal(together, torch.cat(apart))


def test_static_scales_put_the_largest_input_on_448():
    layout = Settings(None, "static").layout(8, 16)
    seen = {"max_abs": torch.arange(16.0), "tokens": torch.tensor(5)}
    assert float(quantize(weight(8, 16), layout, seen)["input_scale"]) == pytest.approx(15 / 448)
    nothing = {"max_abs": torch.ones(16), "tokens": torch.tensor(0)}
    assert float(quantize(weight(8, 16), layout, nothing)["input_scale"]) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    w = weight(8, 16)
    w[3, 4] = value
    with pytest.raises(LayoutError, match="NaN or infinity"):
        quantize(w, Settings(None, "none").layout(8, 16), {})


@pytest.mark.parametrize(
    ("block", "scheme", "name"),
    [
        ((128, 128), "dynamic", "float8"),
        ((128, 32), "dynamic", "float8 group32"),
        (None, "dynamic", "float8"),
        ((128, 32), "static", "float8 tensor static"),
        (None, "none", "none"),
    ],
)
def test_inputs_are_rounded_in_groups_as_wide_as_the_blocks(block, scheme, name):
    assert Settings(block, scheme).layout(64, 96).activation.scheme == name
