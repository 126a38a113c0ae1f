"""4-bit floats under E4M3 and E8M0 scales: against the formats' definitions, weight by weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qhub.errors import LayoutError
from qhub.layouts.float4 import float4_codes, float4_table, mxfp4, nvfp4, quantize_float4
from qhub.layouts.packing import pack, unpack
from qhub.layouts.powers import powers_above, shared_exponents

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES = E2M1 + [-value for value in E2M1]


def weight(n=6, k=70, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_codes_are_those_of_the_table():
    table = float4_table()
    assert table.tolist() == VALUES
    assert float4_codes(table).tolist() == list(range(16))
    # Halfway: 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5 go to the even code.
    assert float4_codes(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0])).tolist() == [0, 2, 2, 4, 4, 6, 6, 7]


@given(seed=st.integers(0, 10_000), divide=st.booleans())
def test_nvfp4_decodes_to_code_times_scale_times_the_scale_over_it(seed, divide):
    n, k = 3, 35
    layout = nvfp4(n, k, divide=divide)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (n, k), generator=generator)
    scales = torch.rand(n, 3, generator=generator).mul(400).add(1).to(torch.float8_e4m3fn)
    over = torch.rand(1, generator=generator) + 0.1
    parts = {"qweight": pack(codes, 4), "table": float4_table(), "scales": scales, "scales_super": over}
    layout.validate(parts)
    dense = layout.dequantize(parts)
    for i in range(n):
        for j in range(k):
            scale = float(scales[i, j // 16].float())
            exact = VALUES[int(codes[i, j])] * (scale / float(over) if divide else scale * float(over))
            assert float(dense[i, j]) == pytest.approx(exact, rel=3 * 2.0**-24)


@given(seed=st.integers(0, 10_000))
def test_mxfp4_decodes_exactly(seed):
    n, k = 2, 40
    layout = mxfp4(n, k)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (n, k), generator=generator)
    exponents = torch.randint(90, 160, (n, 2), generator=generator, dtype=torch.uint8)
    parts = {"qweight": pack(codes, 4), "table": float4_table(), "scales": exponents.view(torch.float8_e8m0fnu)}
    layout.validate(parts)
    dense = layout.dequantize(parts).double()
    for i in range(n):
        for j in range(k):
            assert float(dense[i, j]) == VALUES[int(codes[i, j])] * 2.0 ** (int(exponents[i, j // 32]) - 127)


@pytest.mark.parametrize("divide", [True, False])
def test_nvfp4_puts_the_largest_magnitudes_where_nvidia_does(divide):
    w, layout = weight(), nvfp4(6, 70, divide=divide)
    parts = quantize_float4(w, layout)
    layout.validate(parts)
    layout.check_values(parts)
    over = float(parts["scales_super"])
    top = float(w.abs().max())
    assert (2688 / top if divide else top / 2688) == pytest.approx(over, rel=1e-6)
    factor = 1 / over if divide else over
    found = layout.dequantize(parts)
    for i in range(6):
        for start in range(0, 70, 16):
            piece = w[i, start : start + 16]
            # The scale is the E4M3 number nearest to what puts the group's largest magnitude on 6, in units of `over`.
            wanted = float(piece.abs().max()) / 6 / factor
            stored = float(parts["scales"][i, start // 16].float())
            assert abs(stored - wanted) <= 2.0**-4 * wanted + 2.0**-10
            # Nearest code: half the widest gap at most, or what lies beyond 6.
            worst = (found[i, start : start + 16] - piece).abs().max()
            assert float(worst) <= stored * factor * 1.001


@pytest.mark.parametrize(("factor", "stored"), [(1e-2, None), (1e-7, 2.0**-9), (0.0, 2.0**-9)])
def test_no_scale_of_nvfp4_is_0(factor, stored):
    w = weight()
    w[0, :16] *= factor
    parts = quantize_float4(w, nvfp4(6, 70))
    found = float(parts["scales"][0, 0].float())
    wanted = float(w[0, :16].abs().max()) / 6 * float(parts["scales_super"])
    assert found == stored if stored is not None else abs(found - wanted) <= 2.0**-4 * wanted


def test_mxfp4_takes_the_exponent_of_the_largest_magnitude():
    w = torch.zeros(1, 96)
    w[0, 0], w[0, 1], w[0, 40] = 5.9, 0.26, -16.0
    parts = quantize_float4(w, mxfp4(1, 96))
    assert parts["scales"].float().tolist() == [[1.0, 4.0, 1.0]]
    assert unpack(parts["qweight"], 4, 96)[0, [0, 1, 40, 95]].tolist() == [7, 1, 14, 0]


def test_a_scale_over_all_may_be_given():
    parts = quantize_float4(weight(), nvfp4(6, 70), super_scale=torch.tensor(1000.0))
    assert parts["scales_super"].tolist() == [1000.0]


def test_batches_are_quantized_matrix_by_matrix():
    both = torch.stack([weight(seed=1), weight(seed=2) * 100])
    for layout in (nvfp4(6, 70), mxfp4(6, 70)):
        together = quantize_float4(both, layout)
        for index in range(2):
            alone = quantize_float4(both[index], layout)
            for name in ("qweight", "scales"):
                assert torch.equal(together[name][index].view(torch.uint8), alone[name].view(torch.uint8)), name


def test_a_weight_that_is_not_finite_is_refused():
    w = weight()
    w[0, 0] = math.inf
    with pytest.raises(LayoutError, match="NaN or infinity"):
        quantize_float4(w, mxfp4(6, 70))


@pytest.mark.parametrize("layout", [mxfp4(6, 70), nvfp4(6, 70)], ids=["mxfp4", "nvfp4"])
def test_refitting_is_as_good_as_quantizing(layout):
    w = weight()
    parts = quantize_float4(w, layout)
    first = float((layout.dequantize(parts) - w).norm())
    again = layout.requantize(w * 3, parts, "refit")
    assert again["scales"].dtype == parts["scales"].dtype
    assert float((layout.dequantize(again) - 3 * w).norm()) <= 3 * first * 1.1
    # On its own grid nothing moves.
    kept = layout.requantize(layout.dequantize(parts), parts)
    assert torch.equal(layout.dequantize(kept), layout.dequantize(parts))


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_powers_above_are_the_smallest_that_are_not_below(value):
    found = float(powers_above(torch.tensor(value)).float())
    assert found >= value > found / 2


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_shared_exponents_are_floors(value):
    found = float(shared_exponents(torch.tensor(value), 6.0).float())
    assert found == 2.0 ** (math.floor(math.log2(value)) - 2) or math.frexp(value)[1] - 3 == math.log2(found)
