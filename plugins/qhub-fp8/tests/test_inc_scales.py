"""Scale methods: against Intel's formulas, written out here in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from qhub_fp8.inc import FP8Config
from qhub_fp8.inc.methods import DYNAMIC_ONLY, SCALE_METHODS
from qhub_fp8.inc.plan import layout_of, quantize
from qhub_fp8.inc.scales import DEVICES, scale_of_input, scales_of_weight

E4M3 = torch.float8_e4m3fn
STATIC = sorted(set(SCALE_METHODS) - DYNAMIC_ONLY)


def weight(n=12, k=40, seed=0):
    rows = torch.logspace(-2, 1, n)[:, None]
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * rows


def hardware(value, device):
    """Round up to one of the scales that cost nothing: 2^-8, 2^-4, 1, 2^4 on Gaudi 2, any power of two on Gaudi 3."""
    scales = [2.0**-8, 2.0**-4, 1.0, 2.0**4] if device == "GAUDI2" else [2.0**e for e in range(-55, 8)]
    return next((one for one in scales if one >= value), scales[-1])


@pytest.mark.parametrize("device", ["GAUDI2", "GAUDI3"])
@pytest.mark.parametrize("largest", [1e-4, 0.03, 0.9, 1.0, 7.5, 300.0, 60000.0])
def test_inputs(device, largest):
    top = 240.0 if device == "GAUDI2" else 448.0
    plain = largest / (top * 0.25)
    expected = {
        "unit_scale": 1.0,
        "hw_aligned_single_scale": 16.0 if device == "GAUDI2" else 128.0,
        "maxabs_arbitrary": plain,
        "maxabs_pow2": 2.0 ** math.ceil(math.log2(plain)),
        "maxabs_hw": hardware(2.0 ** math.ceil(math.log2(plain)), device),
        "act_maxabs_hw_weights_pcs_opt_pow2": hardware(2.0 ** math.ceil(math.log2(plain)), device),
    }
    for name, scale in expected.items():
        rule = SCALE_METHODS[name].activation
        found = scale_of_input(torch.tensor(largest), rule, "e4m3fn", DEVICES[device], torch.float32)
        assert float(found) == pytest.approx(scale, rel=1e-6), name


@pytest.mark.parametrize("device", ["GAUDI2", "GAUDI3"])
def test_weights_by_their_largest_magnitude(device):
    w, top = weight(), 240.0 if device == "GAUDI2" else 448.0
    plain = float(w.abs().max()) / (top * 0.5)
    rows = (w.abs().amax(1) / (top * 0.5)).tolist()
    power = 2.0 ** math.ceil(math.log2(plain))
    expected = {
        "maxabs_arbitrary": [plain],
        "maxabs_pow2": [power],
        "maxabs_hw": [hardware(power, device)],
        "act_maxabs_pow2_weights_pcs_maxabs_pow2": [2.0 ** math.ceil(math.log2(one)) for one in rows],
    }
    for name, scales in expected.items():
        found = scales_of_weight(w, SCALE_METHODS[name].weight, "e4m3fn", DEVICES[device], torch.float32)
        assert found.flatten().tolist() == pytest.approx(scales, rel=1e-6), name


def squared_error(w, scale, top=240.0):
    return float(((w / scale).clamp(-top, top).to(E4M3).float() * scale - w).double().square().sum())


def test_weights_by_the_least_error():
    w = weight(seed=3)
    device = DEVICES["GAUDI2"]
    hw = scales_of_weight(w, SCALE_METHODS["maxabs_hw_opt_weight"].weight, "e4m3fn", device, torch.float32)
    errors = {scale: squared_error(w, scale) for scale in (16.0, 1.0, 2.0**-4, 2.0**-8)}
    assert errors[float(hw)] == min(errors.values())
    powers = scales_of_weight(w, SCALE_METHODS["maxabs_pow2_opt_weight"].weight, "e4m3fn", device, torch.float32)
    assert squared_error(w, float(powers)) == min(squared_error(w, 2.0**e) for e in range(-10, 10))
    rule = SCALE_METHODS["act_maxabs_pow2_weights_pcs_opt_pow2"].weight
    for row, scale in zip(w, scales_of_weight(w, rule, "e4m3fn", device, torch.float32).flatten(), strict=True):
        base = 2.0 ** math.ceil(math.log2(float(row.abs().max()) / 120.0))
        best = min(squared_error(row, base * 2.0**e) for e in range(-3, 5))
        assert squared_error(row, float(scale)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("codes", ["E4M3", "E5M2"])
@pytest.mark.parametrize("method", STATIC)
def test_every_method_gives_a_layer_that_is_near(method, codes):
    config = FP8Config(scale_method=method, fp8_config=codes)
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    layout = layout_of(config, 24, 64)
    parts = quantize(config, w, layout, {"max_abs": torch.full((64,), 3.0), "tokens": torch.tensor(4)})
    layout.validate(parts)
    layout.check_values(parts)
    assert parts["scales"].dtype == torch.bfloat16
    # Rounding to 3 (2) explicit bits; a scale of 16 (E5M2 loses nothing by it) leaves few codes for numbers near 1.
    coarse = {"hw_aligned_single_scale": 0.2}.get(method, 0.04)
    error = float((layout.dequantize(parts) - w).norm() / w.norm())
    assert error < (max(coarse, 0.07) if codes == "E5M2" else coarse)
    assert float(parts["qweight"].float().abs().max()) <= (240 if codes == "E4M3" else 57344)


def test_zeros_take_any_scale():
    config = FP8Config()
    layout = layout_of(config, 4, 8)
    parts = quantize(config, torch.zeros(4, 8), layout, {"max_abs": torch.zeros(8), "tokens": torch.tensor(3)})
    layout.check_values(parts)
    assert not bool(layout.dequantize(parts).any())


def test_tokens_may_have_scales_of_their_own():
    config = FP8Config(scale_method="maxabs_pcs_pow2", dynamic_quantization=True)
    assert layout_of(config, 4, 8).activation.scheme == "float8 top=120.0 scale_format=ue8m0"
    assert not config.measures
